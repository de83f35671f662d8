"""When a busy worker makes room for a suspect: a task that workers died of before.

A suspect is handed out only to a worker that holds nothing, so that it takes no others with it.
On an idle worker it starts at once. Where all are busy, one of them has to take nothing more until
what it runs has ended: it is quiet. So that not all of them are quiet at once, each
waits for a random time first; so that one long task does not idle a worker for hours, it
gives up after a while, and waits longer the next time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

_BEFORE = (1.0, 4.0)  # seconds that a suspect waits for an idle worker, at random
_PATIENCE = 30.0  # seconds to be quiet the first time; twice as long each further time
_BETWEEN = (30.0, 90.0)  # seconds between two attempts, at random


class Quarantine:
    """Decides for one incarnation.

    Args:
        clock: Seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._patience = _PATIENCE
        self._begins: float | None = None
        self._ends = 0.0

    def note(self, *, suspects: bool) -> None:
        """Take note of whether suspects wait in the worker's queues."""
        if not suspects:
            self._begins, self._patience = None, _PATIENCE
        elif self._begins is None:
            self._begin_after(_BEFORE)

    @property
    def quiet(self) -> bool:
        """Whether to take nothing more until nothing is held."""
        if self._begins is None or self._clock() < self._begins:
            return False
        if self._clock() < self._ends:
            return True
        self._patience *= 2
        self._begin_after(_BETWEEN)
        return False

    def _begin_after(self, pause: tuple[float, float]) -> None:
        self._begins = self._clock() + random.uniform(*pause)
        self._ends = self._begins + self._patience
