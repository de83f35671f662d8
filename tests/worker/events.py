"""Recorded events, and waiting for conditions, in tests of workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from aiotaskq import TaskQueue
from aiotaskq.events import Event

LONG = 120.0  # seconds until something that must happen has failed


class EventRecorder:
    """The events of some kinds so far, and a way to wait for more."""

    def __init__(self, app: TaskQueue, *kinds: type[Event]) -> None:
        self.events: list[Any] = []
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for kind in kinds:
            app.observers.add(kind, self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self._more.set()

    async def count(self, wanted: int) -> list[Any]:
        """Wait for that many events, and return them."""
        async with asyncio.timeout(LONG):
            while len(self.events) < wanted:
                self._more.clear()
                await self._more.wait()
        return self.events

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


async def until(true: Callable[[], bool]) -> None:
    """Wait until a condition is true, by looking again and again."""
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "it never became true"
        await asyncio.sleep(0.005)
