"""The quarantine: when a busy worker makes room for a suspect.

A suspect is a message under which workers crashed before. It is handed out only to a worker that
holds nothing, so that another crash takes no other task with it. An idle worker gets it at once.
Where all workers are busy, one of them has to go *quiet*: it fetches nothing until its running
tasks have ended.

::

    no suspects ── noted ──▶ waiting (random) ──▶ quiet ── patience ends ──▶ waiting (longer)
         ▲                                          │
         └───────── no suspects are left ◀──────────┘

The first wait is random, so that not all workers go quiet at once. Patience ends, so that one long
task does not idle a worker for hours; it is longer the next time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

_BEFORE = (1.0, 4.0)  # seconds, at random, in which an idle worker may take the suspect
_PATIENCE = 30.0  # seconds to be quiet the first time; twice as long each further time
_BETWEEN = (30.0, 90.0)  # seconds between two attempts, at random


class Quarantine:
    """The quarantine of one incarnation.

    Args:
        clock: Seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._patience = _PATIENCE
        self._begins: float | None = None
        self._ends = 0.0

    def note(self, *, suspects: bool) -> None:
        """Note whether suspects wait in the worker's queues."""
        if not suspects:
            self._begins, self._patience = None, _PATIENCE
        elif self._begins is None:
            self._begin_after(_BEFORE)

    @property
    def quiet(self) -> bool:
        """Return whether to fetch nothing until no task is held."""
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
