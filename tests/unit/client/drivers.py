"""Drivers in memory that tests of the client can make slow, unreachable or silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Self

from msgspec import Raw

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker
from aiotaskq.errors import BatchRefused


class RecordingBroker(MemoryBroker):
    """A memory broker that can be slow or fail, and records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[str], str | None]] = []
        self.errors: list[
            Exception
        ] = []  # raised by the next calls, after they have stored their batch
        self.gate: asyncio.Event | None = None
        self.opened = self.closed = 0

    def clone(self) -> Self:
        return self  # the sessions of an application use this one

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        self.calls.append(([one.id for one in batch], call_id))
        if self.gate is not None:
            await self.gate.wait()
        refused = await super().publish(batch, call_id=call_id)
        if self.errors:
            raise self.errors.pop(0)
        return refused


class RefusingBroker(RecordingBroker):
    """A memory broker with ids that it refuses, each with the error that is given for it.

    Attributes:
        refusals: The errors by id.
        whole: Whether a refusal refuses the whole batch, as a driver does that stores all or none.
    """

    def __init__(self, refusals: Mapping[str, Exception], *, whole: bool) -> None:
        super().__init__()
        self.refusals = refusals
        self.whole = whole

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        errors = {
            at: self.refusals[one.id] for at, one in enumerate(batch) if one.id in self.refusals
        }
        if errors and self.whole:
            self.calls.append(([one.id for one in batch], call_id))
            raise next(iter(errors.values()))
        rest = [one for at, one in enumerate(batch) if at not in errors]
        answer = await super().publish(rest, call_id=call_id)
        if errors:
            raise BatchRefused(errors, answer=answer)
        return answer


class RecordingBackend(MemoryBackend):
    """A memory backend that can fail or push nothing, and records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.subscriptions = 0
        self.unsubscribed = 0
        self.loads: list[set[str]] = []
        self.load_errors: list[Exception] = []
        self.arrival_error: Exception | None = None
        self.deaf = False
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        self.loads.append(set(ids))
        await asyncio.sleep(0)
        if self.load_errors:
            raise self.load_errors.pop(0)
        return await super().load(ids)

    async def subscribe(self) -> AsyncIterator[Sequence[str]]:
        self.subscriptions += 1
        try:
            await asyncio.sleep(0)
            if self.arrival_error is not None:
                raise self.arrival_error
            if self.deaf:
                yield []
                await asyncio.Event().wait()
            arrivals = super().subscribe()
            try:
                async for ids in arrivals:
                    yield ids
            finally:
                await arrivals.aclose()  # type: ignore[attr-defined]  # a generator
        finally:
            self.unsubscribed += 1


def envelope(name: str, size: int = 1) -> Envelope:
    return Envelope(id=name, queue="q", body=b"x" * size)


def outcome(task_id: str, status: TaskStatus = TaskStatus.SUCCESS) -> Outcome:
    return Outcome(task_id=task_id, status=status, result=Raw(b"1"))


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)
