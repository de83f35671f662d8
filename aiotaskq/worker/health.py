"""The health of a worker: problems that last, and counts of events that should be rare.

Only rare events are counted here; a task that succeeds costs nothing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection

from aiotaskq import events
from aiotaskq.backoff import Backoff
from aiotaskq.errors import AioTaskQError
from aiotaskq.events import Observers
from aiotaskq.readable import get_logger, on_one_line

logger = get_logger("aiotaskq.worker")

_BUDGET_PERIOD = 60.0  # seconds

SICK_AFTER = 5.0
"""Seconds for which a server may be away before the worker says that it is not healthy."""


class Health:
    """The health of one worker over all its incarnations. It belongs to the worker's event loop.

    Attributes:
        counts: The number of `refused` outcomes (they came too late), `stuck` tasks (they did not
            end when they were cancelled), `buried` tasks (they became dead letters), `reclaimed`
            tasks (this worker took them back from dead workers), `unknown` tasks (they went back to
            their queue), `lost` leases, `trimmed` dead letters (the oldest, dropped), `blocked`
            event loops, `unsettled` deliveries (the broker refused to settle them) and entries of
            the store that were set `aside` (the driver could not read them).
    """

    def __init__(self, observers: Observers, worker: str) -> None:
        self._observers = observers
        self._worker = worker
        self._problems: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    @property
    def problems(self) -> tuple[str, ...]:
        """The present problems, in words; none: the worker is healthy."""
        return tuple(self._problems.values())

    def complain(self, about: str, problem: str) -> None:
        """Note a problem that lasts until `recover` is called for it."""
        before, self._problems[about] = self._problems.get(about), problem
        if before is None:
            logger.error("%s is not healthy: %s", self._worker, problem)
            self._tell()

    def recover(self, about: str) -> None:
        """Note that a problem is over."""
        if self._problems.pop(about, None) is not None:
            if not self._problems:
                logger.warning("%s is healthy again", self._worker)
            self._tell()

    def _tell(self) -> None:
        if self._observers.heard(events.HealthChanged):
            self._observers.emit(events.HealthChanged(worker=self._worker, problems=self.problems))

    def refused(self, ids: Collection[str]) -> None:
        """Count outcomes that came too late, and tell of them."""
        for task_id in ids:
            self.counts["refused"] += 1
            logger.warning("the outcome of %s came too late and was dropped", on_one_line(task_id))
            if self._observers.heard(events.Refused):
                self._observers.emit(events.Refused(task_id=task_id))


class LineBudget:
    """A bound on the lines of one kind in the log: anybody can send messages that cause them.

    Args:
        what: The kind, in words, for the line that tells how many were left out.
        most: The most lines in each `_BUDGET_PERIOD`.
    """

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self._since = time.monotonic()
        self._written = 0
        self._left_out = 0

    def level(self) -> int:
        """Return the level for the next line: errors as far as the bound allows, then debug."""
        now = time.monotonic()
        if now >= self._since + _BUDGET_PERIOD:
            if self._left_out:
                logger.error("%d more %s since then", self._left_out, self._what)
            self._since, self._written, self._left_out = now, 0, 0
        if self._written >= self._most:
            self._left_out += 1
            if self._left_out == 1:
                logger.error("there are more %s; they are counted for now", self._what)
            return logging.DEBUG
        self._written += 1
        return logging.ERROR


class Outage:
    """The times at which one operation fails, mostly because its server is away.

    Gives the pause before the next attempt, logs the beginning and the end, and notes a problem
    when it lasts longer than `SICK_AFTER`.

    Args:
        health: Where the problem is noted.
        what: The effect, such as "cannot fetch tasks".
        pauses: Seconds: the first pause, and the longest.
    """

    def __init__(self, health: Health, what: str, pauses: tuple[float, float]) -> None:
        self._health = health
        self._what = what
        self._backoff = Backoff(*pauses)
        self._began = 0.0
        # The same operation of an earlier incarnation may have noted a problem, and its object is
        # gone: nobody else would ever end it.
        health.recover(what)

    @property
    def on(self) -> bool:
        """Return whether the last attempt failed."""
        return self._backoff.failures > 0

    def pause(self, error: Exception) -> float:
        """Note a failure and return the seconds to wait, longer each time."""
        now = time.monotonic()
        if not self._backoff.failures:
            self._began = now
            # An exception that is none of this package is a fault, and its traceback is wanted.
            fault = None if isinstance(error, AioTaskQError) else error
            logger.warning("%s, trying again: %s", self._what, error, exc_info=fault)
        elif now - self._began > SICK_AFTER:
            self._health.complain(self._what, f"{self._what}: {error}")
        return self._backoff.next()

    def over(self) -> None:
        """Note a success."""
        if self._backoff.failures:
            self._backoff.reset()
            logger.warning("%s: over", self._what)
            self._health.recover(self._what)
