"""Drivers that fail at one call, chosen by name and number: for tests of what uses drivers.

::

    plan = Plan(Step("consumer.settle", 2), Way.UNHEARD)
    app = TaskQueue("app", broker=FlakyBroker(MemoryBroker(), plan))

A `Plan` without a step fails nothing and counts: run something once, and `Plan.calls` says which
steps there are to fail at. All drivers made from one `FlakyBroker`, its clones and its result
backend among them, share its plan.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from aiotaskq.contract.broker import Broker, Consumer, Lease, Traits
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.records import (
    ConsumerInfo,
    DeadLetter,
    DeadLimits,
    Depth,
    DueSchedules,
    Grant,
    Maintained,
    News,
    StoredSchedule,
)
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.contract.settlement import Settlement
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable, Unavailable

Value = TypeVar("Value")


class Way(StrEnum):
    """How a call fails. The caller sees the same each time: its server cannot be reached."""

    UNSENT = "unsent"  # it never takes effect
    SENT = "sent"  # it takes effect a little later, beside what the caller does next
    UNHEARD = "unheard"  # it has taken effect, and only the answer is lost


class Step(NamedTuple):
    """One call of a run."""

    call: str  # such as "consumer.fetch"
    number: int  # 1 is the first of this name


class Plan:
    """At which call what shares it fails, and how. Safe to use from any thread.

    Args:
        step: The call that fails; None: none does.
        way: How it fails.
        deadly: Whether the process dies there: every later call fails unsent, and consumers are
            not closed. Their leases stay as they are, for others to end.
        struck: Called when the step is reached, by whatever thread reaches it.

    Attributes:
        calls: How many calls there were, by name.
        grants: The leases of all consumers that were made.
        hit: Whether the step was reached.
    """

    def __init__(
        self,
        step: Step | None = None,
        way: Way = Way.UNSENT,
        *,
        deadly: bool = False,
        struck: Callable[[], object] = lambda: None,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.grants: list[Grant] = []
        self.hit = False
        self._step = step
        self._way = way
        self._deadly = deadly
        self._struck = struck
        self._lock = threading.Lock()

    @property
    def dead(self) -> bool:
        """Whether the process is to be taken for dead."""
        return self._deadly and self.hit

    def enter(self, call: str) -> Way | None:
        """Count a call; return how it is to fail, None if it is not."""
        with self._lock:
            if self.dead:
                return Way.UNSENT
            self.calls[call] += 1
            if self._step != (call, self.calls[call]):
                return None
            self.hit = True
        self._struck()
        return self._way


class _Wire:
    """What one driver object sends its calls through."""

    def __init__(self, plan: Plan, part: str, error: type[Unavailable]) -> None:
        self.plan = plan
        self._part = part
        self._error = error
        self._flying: set[asyncio.Task[Any]] = set()

    async def call(
        self,
        name: str,
        work: Callable[[], Awaitable[Value]],
        late: Callable[[Value], None] = lambda _: None,
    ) -> Value:
        """Make a call, or fail as planned. `late` gets the answer that the caller does not."""
        way = self.plan.enter(f"{self._part}.{name}")
        if way is None:
            return await work()
        if way is not Way.UNSENT:
            flight = asyncio.ensure_future(self._fly(work, late))
            self._flying.add(flight)
            flight.add_done_callback(self._flying.discard)
            if way is Way.UNHEARD:
                await flight
        raise self._error(f"{self._part}.{name} fails as planned: {way}")

    async def landed(self) -> None:
        """Wait for the calls that are under way unheard."""
        if self._flying:
            await asyncio.wait(self._flying)

    def cancel(self) -> None:
        """Cancel them."""
        for flight in self._flying:
            flight.cancel()

    @staticmethod
    async def _fly(work: Callable[[], Awaitable[Value]], late: Callable[[Value], None]) -> None:
        late(await work())


class FlakyBroker:
    """A broker that fails as planned, over another one."""

    traits: ClassVar[Traits] = Traits()

    def __init__(self, inner: Broker, plan: Plan) -> None:
        self.traits = inner.traits  # type: ignore[misc]  # those of what is below
        self._inner = inner
        self._plan = plan
        self._wire = _Wire(plan, "broker", BrokerUnavailable)
        self._schedules = _Wire(plan, "schedules", BrokerUnavailable)

    @property
    def url(self) -> str:
        return self._inner.url

    def clone(self) -> Self:
        return type(self)(self._inner.clone(), self._plan)

    def backend(self) -> ResultBackend | None:
        inner = self._inner.backend()
        return None if inner is None else FlakyBackend(inner, self._plan)

    async def open(self) -> None:
        await self._wire.call("open", self._inner.open)

    async def close(self) -> None:
        await self._wire.landed()
        await self._schedules.landed()
        await self._inner.close()

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        return await self._wire.call("publish", lambda: self._inner.publish(batch, call_id=call_id))

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> FlakyConsumer:
        inner = self._inner.consumer(queues, name=name, lease=lease, about=about)
        self._plan.grants.append(inner.grant)
        return FlakyConsumer(inner, self._plan)

    def schedules(self) -> FlakySchedules:
        return FlakySchedules(self._inner.schedules(), self._schedules)

    def lease(self, grant: Grant) -> FlakyLease:
        return FlakyLease(self._inner.lease(grant), self._plan)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        return await self._wire.call("consumers", self._inner.consumers)

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        return await self._wire.call("cancel", lambda: self._inner.cancel(ids, running=running))

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        return await self._wire.call("maintain", lambda: self._inner.maintain(limits))

    async def depth(self) -> Mapping[str, Depth]:
        return await self._wire.call("depth", self._inner.depth)

    async def purge(self, queue: str) -> int:
        return await self._wire.call("purge", lambda: self._inner.purge(queue))

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        return await self._wire.call("dead", lambda: self._inner.dead(queue, limit, before=before))

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return await self._wire.call("revive", lambda: self._inner.revive(queue, letters))

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return await self._wire.call("discard", lambda: self._inner.discard(queue, keys))


class FlakyConsumer:
    """A consumer of a `FlakyBroker`."""

    def __init__(self, inner: Consumer, plan: Plan) -> None:
        self.id = inner.id
        self._inner = inner
        self._plan = plan
        self._wire = _Wire(plan, "consumer", BrokerUnavailable)
        self._fetches = _Wire(plan, "consumer", BrokerUnavailable)
        self._unheard: list[Delivery] = []  # taken by a call whose answer was lost

    @property
    def grant(self) -> Grant:
        return self._inner.grant

    async def open(self) -> None:
        await self._wire.call("open", self._inner.open)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        return await self._fetches.call(
            "fetch", lambda: self._fetch(limit, wait, order), self._unheard.extend
        )

    async def _fetch(
        self, limit: int, wait: float, order: Sequence[str] | None
    ) -> Sequence[Delivery]:
        # As with any driver, what a lost call took comes with the next.
        if asyncio.current_task() not in self._fetches._flying:
            await self._fetches.landed()
        if self._unheard:
            found = self._unheard[:limit]
            del self._unheard[:limit]
            return found
        return await self._inner.fetch(limit, wait, order=order)

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        return await self._wire.call("settle", lambda: self._inner.settle(batch))

    async def news(self) -> News:
        return await self._wire.call("news", self._inner.news)

    async def close(self) -> None:
        self._fetches.cancel()
        await self._fetches.landed()
        await self._wire.landed()
        if not self._plan.dead:
            await self._inner.close()


class FlakySchedules:
    """The schedules of a `FlakyBroker`, which waits for their calls when it is closed."""

    def __init__(self, inner: ScheduleStore, wire: _Wire) -> None:
        self._inner = inner
        self._wire = wire

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        return await self._wire.call("load", lambda: self._inner.load(ids))

    async def due(self, limit: int) -> DueSchedules:
        return await self._wire.call("due", lambda: self._inner.due(limit))

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        return await self._wire.call(
            "compare_and_swap", lambda: self._inner.compare_and_swap(schedule_id, seen, new, batch)
        )


class FlakyLease:
    """A lease of a `FlakyBroker`."""

    def __init__(self, inner: Lease, plan: Plan) -> None:
        self._inner = inner
        self._wire = _Wire(plan, "lease", BrokerUnavailable)

    async def renew(self) -> bool:
        return await self._wire.call("renew", self._inner.renew)

    async def end(self, note: str) -> int:
        return await self._wire.call("end", lambda: self._inner.end(note))

    async def close(self) -> None:
        await self._wire.landed()
        await self._inner.close()


class FlakyBackend:
    """A result backend that fails as planned, over another one."""

    wants_arguments: ClassVar[bool] = False

    def __init__(self, inner: ResultBackend, plan: Plan) -> None:
        self.wants_arguments = inner.wants_arguments  # type: ignore[misc]  # of what is below
        self._inner = inner
        self._plan = plan
        self._wire = _Wire(plan, "backend", BackendUnavailable)

    @property
    def url(self) -> str:
        return self._inner.url

    def clone(self) -> Self:
        return type(self)(self._inner.clone(), self._plan)

    async def open(self) -> None:
        await self._wire.call("open", self._inner.open)

    async def close(self) -> None:
        await self._wire.landed()
        await self._inner.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        return await self._wire.call("store", lambda: self._inner.store(batch, ttl))

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return await self._wire.call("load", lambda: self._inner.load(ids))

    def subscribe(self) -> AsyncIterator[Sequence[str | Outcome]]:
        return self._inner.subscribe()  # it waits an unreachable server out by itself

    async def forget(self, ids: Collection[str]) -> int:
        return await self._wire.call("forget", lambda: self._inner.forget(ids))
