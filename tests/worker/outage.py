"""Drivers in memory whose servers are unreachable for as long as a test says.

During an outage all calls fail; `aiotaskq.testing.faults` is for one call that fails.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.broker import Consumer, Lease, Traits
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.records import (
    ConsumerInfo,
    DeadLetter,
    DeadLimits,
    Depth,
    Grant,
    Maintained,
    News,
)
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable


class Outage:
    """The reachability of the servers, shared by all clones of a driver."""

    def __init__(self) -> None:
        self.broker_down = False
        self.backend_down = False

    def check_broker(self) -> None:
        if self.broker_down:
            raise BrokerUnavailable("the broker is away")

    def check_backend(self) -> None:
        if self.backend_down:
            raise BackendUnavailable("the result backend is away")


class OutageBroker:
    """A memory broker that raises `BrokerUnavailable` during an outage."""

    traits: ClassVar[Traits] = MemoryBroker.traits

    def __init__(self, outage: Outage, inner: MemoryBroker | None = None) -> None:
        self.outage = outage
        self.inner = MemoryBroker() if inner is None else inner

    @property
    def url(self) -> str:
        return "outage://"

    def schedules(self) -> ScheduleStore:
        return self.inner.schedules()

    def clone(self) -> Self:
        return type(self)(self.outage, self.inner.clone())

    def backend(self) -> ResultBackend | None:
        return OutageBackend(self.outage, self.inner.backend())

    async def open(self) -> None:
        self.outage.check_broker()

    async def close(self) -> None:
        pass

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        self.outage.check_broker()
        return await self.inner.publish(batch, call_id=call_id)

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> Consumer:
        inner = self.inner.consumer(queues, name=name, lease=lease, about=about)
        return OutageConsumer(self.outage, inner)

    def lease(self, grant: Grant) -> Lease:
        return OutageLease(self.outage, self.inner.lease(grant))

    async def consumers(self) -> Sequence[ConsumerInfo]:
        return await self.inner.consumers()

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        self.outage.check_broker()
        return await self.inner.cancel(ids, running=running)

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        self.outage.check_broker()
        return await self.inner.cancelled_among(ids)

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        self.outage.check_broker()
        return await self.inner.maintain(limits)

    async def depth(self) -> Mapping[str, Depth]:
        return await self.inner.depth()

    async def purge(self, queue: str) -> int:
        return await self.inner.purge(queue)

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        return await self.inner.dead(queue, limit, before=before)

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return await self.inner.revive(queue, letters)

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return await self.inner.discard(queue, keys)


class OutageConsumer:
    def __init__(self, outage: Outage, inner: Consumer) -> None:
        self.outage = outage
        self.inner = inner
        self.id = inner.id

    async def open(self) -> None:
        self.outage.check_broker()
        await self.inner.open()

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        end = time.monotonic() + wait
        while True:
            self.outage.check_broker()
            found = await self.inner.fetch(limit, 0.01 if wait else 0, order=order)
            if found or time.monotonic() >= end:
                return found

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        self.outage.check_broker()
        return await self.inner.settle(batch)

    async def news(self) -> News:
        self.outage.check_broker()
        return await self.inner.news()

    @property
    def grant(self) -> Grant:
        return self.inner.grant

    async def close(self) -> None:
        if not self.outage.broker_down:
            await self.inner.close()


class OutageLease:
    def __init__(self, outage: Outage, inner: Lease) -> None:
        self.outage = outage
        self.inner = inner

    async def renew(self) -> bool:
        self.outage.check_broker()
        return await self.inner.renew()

    async def end(self, note: str) -> int:
        self.outage.check_broker()
        return await self.inner.end(note)

    async def close(self) -> None:
        pass


class OutageBackend:
    wants_arguments: ClassVar[bool] = False

    def __init__(self, outage: Outage, inner: MemoryBackend) -> None:
        self.outage = outage
        self.inner = inner

    @property
    def url(self) -> str:
        return "outage://"

    def clone(self) -> Self:
        return type(self)(self.outage, self.inner.clone())

    async def open(self) -> None:
        self.outage.check_backend()

    async def close(self) -> None:
        pass

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        self.outage.check_backend()
        return await self.inner.store(batch, ttl)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return await self.inner.load(ids)

    def subscribe(self) -> AsyncIterator[Sequence[str]]:
        return self.inner.subscribe()

    async def forget(self, ids: Collection[str]) -> int:
        return await self.inner.forget(ids)
