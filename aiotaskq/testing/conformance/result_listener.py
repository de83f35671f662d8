"""A subscriber to a result backend that runs beside a test, and helpers for outcomes.

Theory of operation. A `ResultListener` runs in a task of its own, which `listening` cancels at the
end. It appends items in the order of their arrival, and a test waits for ids or for an item. After
an empty item outcomes may have been missed: then a test that waits for ids loads them, as callers
of a subscription do. An id counts as received or as loaded, whichever comes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.results import ResultBackend
from aiotaskq.testing.conformance.rig import PATIENCE


class ResultListener:
    """Collects the items of a subscription, in a task beside the test."""

    def __init__(self, backend: ResultBackend) -> None:
        self.items: list[list[str]] = []
        self._backend = backend
        self._news = asyncio.Event()
        self._read = 0  # the number of items that the test has seen
        self._found: set[str] = set()

    async def listen(self) -> None:
        iterator = self._backend.subscribe()
        try:
            async for item in iterator:
                self.items.append([one if isinstance(one, str) else one.task_id for one in item])
                self._news.set()
        finally:
            await close(iterator)

    def received(self) -> set[str]:
        """Return every id that was yielded so far."""
        return {name for item in self.items for name in item}

    async def wait_for(self, ids: Collection[str]) -> None:
        """Wait until all ids were yielded, or were loaded after an empty item."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not set(ids) <= self.received() | self._found:
                    await self._news.wait()
                    self._news.clear()
                    await self._look(ids)
        except TimeoutError:
            pytest.fail(f"not received: {sorted(set(ids) - self.received())[:20]}")

    async def item(self, number: int) -> list[str]:
        """Wait for the item of that number, from 0."""
        try:
            async with asyncio.timeout(PATIENCE):
                while len(self.items) <= number:
                    await self._news.wait()
                    self._news.clear()
        except TimeoutError:
            pytest.fail(f"item {number} was not received; there are {self.items}")
        self._read = number + 1
        return self.items[number]

    async def _look(self, ids: Collection[str]) -> None:
        news, self._read = self.items[self._read :], len(self.items)
        if any(not item for item in news):
            loaded = await self._backend.load(ids)
            self._found |= {name for name, one in loaded.items() if one.status.final}


async def close(iterator: AsyncIterator[Sequence[str | Outcome]]) -> None:
    """Close a subscription."""
    assert isinstance(iterator, AsyncGenerator)
    await iterator.aclose()


@asynccontextmanager
async def listening(backend: ResultBackend) -> AsyncIterator[ResultListener]:
    """Subscribe, and end the subscription afterwards."""
    listener = ResultListener(backend)
    task = asyncio.create_task(listener.listen())
    try:
        assert await listener.item(0) == []
        yield listener
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def outcome(task_id: str, status: TaskStatus = TaskStatus.SUCCESS, value: Any = None) -> Outcome:
    """Return an outcome with a JSON value."""
    return Outcome(task_id=task_id, status=status, result=Raw(msgspec.json.encode(value)))


def value(outcome: Outcome) -> Any:
    """Return the decoded value of an outcome."""
    return msgspec.json.decode(outcome.result)
