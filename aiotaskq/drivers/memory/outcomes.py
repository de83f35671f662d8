"""Outcomes in plain containers: the half of a `MemoryStore` that serves result backends.

Theory of operation. An outcome has an end: the time at which it is forgotten. Ends lie in a heap,
and each operation first drops what has ended, so that an expired outcome is never seen. An outcome
that is not final may be replaced, with another end; its old entry stays in the heap and is
ignored when it comes up. *Invariant: each outcome with an end has an entry in the heap that is not
later than its end.*

All is changed under one lock, so between two steps of a thread another one sees nothing half done.
A final outcome and the word of it to the subscribers are one step: a subscriber that registers
either finds the outcome or is told.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Collection, Sequence

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.memory.notify import MemorySubscriber


class MemoryOutcomes:
    """The outcomes of a store. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._time_shift = 0.0  # seconds that tests let pass on top of the real time
        self._outcomes: dict[str, tuple[float, Outcome]] = {}  # each with its end
        self._ends: list[tuple[float, str]] = []  # a heap
        self._subscribers: set[MemorySubscriber] = set()

    def now(self) -> float:
        """Return the time of the store, as Unix time."""
        return time.time() + self._time_shift

    def store(self, batch: Sequence[Outcome], ttl: float | None) -> list[str]:
        """Keep outcomes and tell the subscribers of the final ones; return the refused ids."""
        with self._lock:
            now = self.now()
            self._drop_ended(now)
            end = float("inf") if ttl is None else now + ttl
            refused: list[str] = []
            arrived: list[str] = []
            for outcome in batch:
                name = outcome.task_id
                kept = self._outcomes.get(name)
                if kept is not None and kept[1].status.final:
                    refused.append(name)
                    continue
                self._outcomes[name] = end, outcome
                if ttl is not None:
                    heapq.heappush(self._ends, (end, name))
                if outcome.status.final:
                    arrived.append(name)
            if arrived:
                for subscriber in self._subscribers:
                    subscriber.tell(arrived)
            return refused

    def load(self, ids: Collection[str]) -> dict[str, Outcome]:
        """Return the outcomes that exist now."""
        with self._lock:
            self._drop_ended(self.now())
            return {name: self._outcomes[name][1] for name in ids if name in self._outcomes}

    def forget(self, ids: Collection[str]) -> int:
        """Drop outcomes; return the number of those that existed."""
        with self._lock:
            self._drop_ended(self.now())
            return sum(self._outcomes.pop(name, None) is not None for name in ids)

    def add_subscriber(self, subscriber: MemorySubscriber) -> None:
        """Tell a subscriber of every final outcome from now on."""
        with self._lock:
            self._subscribers.add(subscriber)

    def remove_subscriber(self, subscriber: MemorySubscriber) -> None:
        """End a subscription."""
        with self._lock:
            self._subscribers.discard(subscriber)

    def read(self, subscriber: MemorySubscriber) -> list[str] | None:
        """Return the new ids of a subscriber; see `MemorySubscriber.read`."""
        with self._lock:
            return subscriber.read()

    def _drop_ended(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            end, name = heapq.heappop(self._ends)
            kept = self._outcomes.get(name)
            # A later outcome may have brought a later end.
            if kept is not None and kept[0] <= end:
                del self._outcomes[name]
