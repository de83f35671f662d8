"""Outcomes in plain containers, and those who wait for them."""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress

from aiotaskq.contract.outcome import Outcome

UNHEARD_AT_MOST = 100_000  # arrivals kept for one subscriber that does not listen


class Bell:
    """Wakes one waiting coroutine, once, from any thread. Rung under the store's lock only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.create_future()
        self._rung = False

    def ring(self) -> None:
        if self._rung:
            return
        self._rung = True
        # A loop that was closed has nobody left to wake.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._heard.set_result, None)

    async def wait(self, seconds: float | None) -> None:
        """Return when it is rung, or after some seconds."""
        await asyncio.wait([self._heard], timeout=seconds)


class Ear:
    """One subscriber to arrivals. Changed under the store's lock only."""

    def __init__(self) -> None:
        self.bell = Bell()
        self._unheard: list[str] = []
        self._missed = False

    def tell(self, ids: list[str]) -> None:
        self._unheard += ids
        if len(self._unheard) > UNHEARD_AT_MOST:
            self._unheard.clear()
            self._missed = True
        self.bell.ring()

    def empty(self) -> list[str] | None:
        heard, missed = self._unheard, self._missed
        self._unheard, self._missed = [], False
        if missed:
            # Told first: what is left behind it is told next time.
            self._unheard = heard
            return []
        return heard or None


class OutcomeStore:
    """The half of a `MemoryStore` that keeps outcomes. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._time_shift = 0.0  # for tests: seconds that have passed without passing
        self._outcomes: dict[str, tuple[float, Outcome]] = {}  # with the end of its time
        self._ends: list[tuple[float, str]] = []  # a heap of these
        self._ears: set[Ear] = set()

    def now(self) -> float:
        """Return the Unix time that the store goes by."""
        return time.time() + self._time_shift

    def store(self, batch: Sequence[Outcome], ttl: float | None) -> list[str]:
        with self._lock:
            now = self.now()
            self._drop_old(now)
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
                for ear in self._ears:
                    ear.tell(arrived)
            return refused

    def load(self, ids: Collection[str]) -> dict[str, Outcome]:
        with self._lock:
            self._drop_old(self.now())
            return {name: self._outcomes[name][1] for name in ids if name in self._outcomes}

    def forget(self, ids: Collection[str]) -> int:
        with self._lock:
            self._drop_old(self.now())
            return sum(self._outcomes.pop(name, None) is not None for name in ids)

    def _drop_old(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            end, name = heapq.heappop(self._ends)
            kept = self._outcomes.get(name)
            # A later outcome may have brought a later end.
            if kept is not None and kept[0] <= end:
                del self._outcomes[name]

    def listen(self, ear: Ear, *, on: bool) -> None:
        """Begin or end a subscription."""
        with self._lock:
            (self._ears.add if on else self._ears.discard)(ear)

    def hear(self, ear: Ear) -> list[str] | None:
        """Return what arrived, [] if something was missed, None if there is nothing new."""
        with self._lock:
            return ear.empty()
