"""What the worker's tests share: ears, gates, and a broker that can be cut off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

from aiotaskq import TaskQueue
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
from aiotaskq.events import Event

LONG = 30.0  # seconds: what takes longer has failed; nothing waits for it otherwise


class Heard:
    """Every event of some kinds, and a way to wait for the next."""

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
        """Return the events once there are as many."""
        async with asyncio.timeout(LONG):
            while len(self.events) < wanted:
                self._more.clear()
                await self._more.wait()
        return self.events

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


async def until(true: Callable[[], bool]) -> None:
    """Wait until something is true that nobody tells of."""
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "it never became true"
        await asyncio.sleep(0.005)


class Weather:
    """Whether the servers can be reached; shared by all clones of a driver."""

    def __init__(self) -> None:
        self.broker_down = False
        self.backend_down = False

    def check_broker(self) -> None:
        if self.broker_down:
            raise BrokerUnavailable("the broker is away")

    def check_backend(self) -> None:
        if self.backend_down:
            raise BackendUnavailable("the result backend is away")


class FlakyBroker:
    """A broker in memory that can be cut off."""

    traits: ClassVar[Traits] = MemoryBroker.traits

    def __init__(self, weather: Weather, inner: MemoryBroker | None = None) -> None:
        self.weather = weather
        self.inner = MemoryBroker() if inner is None else inner

    @property
    def url(self) -> str:
        return "flaky://"

    def schedules(self) -> ScheduleStore:
        return self.inner.schedules()

    def clone(self) -> Self:
        return type(self)(self.weather, self.inner.clone())

    def backend(self) -> ResultBackend | None:
        return FlakyBackend(self.weather, self.inner.backend())

    async def open(self) -> None:
        self.weather.check_broker()

    async def close(self) -> None:
        pass

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        self.weather.check_broker()
        return await self.inner.publish(batch, call_id=call_id)

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> Consumer:
        inner = self.inner.consumer(queues, name=name, lease=lease, about=about)
        return FlakyConsumer(self.weather, inner)

    def lease(self, grant: Grant) -> Lease:
        return FlakyLease(self.weather, self.inner.lease(grant))

    async def consumers(self) -> Sequence[ConsumerInfo]:
        return await self.inner.consumers()

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        self.weather.check_broker()
        return await self.inner.cancel(ids, running=running)

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        self.weather.check_broker()
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


class FlakyConsumer:
    def __init__(self, weather: Weather, inner: Consumer) -> None:
        self.weather = weather
        self.inner = inner
        self.id = inner.id

    async def open(self) -> None:
        self.weather.check_broker()
        await self.inner.open()

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        end = time.monotonic() + wait
        while True:
            self.weather.check_broker()
            found = await self.inner.fetch(limit, 0.01 if wait else 0, order=order)
            if found or time.monotonic() >= end:
                return found

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        self.weather.check_broker()
        return await self.inner.settle(batch)

    async def news(self) -> News:
        self.weather.check_broker()
        return await self.inner.news()

    @property
    def grant(self) -> Grant:
        return self.inner.grant

    async def close(self) -> None:
        if not self.weather.broker_down:
            await self.inner.close()


class FlakyLease:
    def __init__(self, weather: Weather, inner: Lease) -> None:
        self.weather = weather
        self.inner = inner

    async def renew(self) -> bool:
        self.weather.check_broker()
        return await self.inner.renew()

    async def end(self, note: str) -> int:
        self.weather.check_broker()
        return await self.inner.end(note)

    async def close(self) -> None:
        pass


class FlakyBackend:
    wants_arguments: ClassVar[bool] = False

    def __init__(self, weather: Weather, inner: MemoryBackend) -> None:
        self.weather = weather
        self.inner = inner

    @property
    def url(self) -> str:
        return "flaky://"

    def clone(self) -> Self:
        return type(self)(self.weather, self.inner.clone())

    async def open(self) -> None:
        self.weather.check_backend()

    async def close(self) -> None:
        pass

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        self.weather.check_backend()
        return await self.inner.store(batch, ttl)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return await self.inner.load(ids)

    def subscribe(self) -> AsyncIterator[Sequence[str]]:
        return self.inner.subscribe()

    async def forget(self, ids: Collection[str]) -> int:
        return await self.inner.forget(ids)
