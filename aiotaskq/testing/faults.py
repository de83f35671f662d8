"""Fault injection: drivers that fail at one call, chosen by its name and number.

For tests of code that uses drivers::

    plan = FaultPlan(FaultPoint("consumer.settle", 2), FaultKind.REPLY_LOST)
    app = TaskQueue("app", broker=FlakyBroker(MemoryBroker(), plan))

A `FaultPlan` without a point fails nothing and counts: run the code once, and `FaultPlan.calls`
lists the points at which it can fail. All drivers made from one `FlakyBroker`, its clones and its
result backend among them, share its plan.

Theory of operation. A call is counted under the lock of the plan, and fails if it is the planned
one. Its caller gets an error at once, or, where only the reply is lost, when the call has taken
effect. A call that goes on without its caller is a task of `_FaultyCalls`; `close` waits for it, so
that nothing takes effect later. When the plan is deadly, each call after the fault fails without
being sent, and `close` does not reach the consumer below: a process that died closes nothing.
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


class FaultKind(StrEnum):
    """The ways in which a call fails. Its caller sees the same each time: no reply came."""

    NOT_SENT = "not sent"  # it never takes effect
    DELAYED = "delayed"  # it takes effect a little later, beside the next calls of the caller
    REPLY_LOST = "reply lost"  # it has taken effect


class FaultPoint(NamedTuple):
    """One call of a run."""

    call: str  # such as "consumer.fetch"
    number: int  # 1 is the first of this name


class FaultPlan:
    """The call at which drivers fail, and how. Safe to use from any thread.

    Args:
        point: The call that fails; None: no call does.
        kind: How it fails.
        deadly: Whether the process dies there: every later call fails unsent, and consumers are
            not closed. Their leases stay as they are, for others to end.
        on_fault: Called when the point is reached, by the thread that reaches it.

    Attributes:
        calls: The number of calls so far, by name.
        grants: The leases of all consumers that were made.
        hit: Whether the point was reached.
    """

    def __init__(
        self,
        point: FaultPoint | None = None,
        kind: FaultKind = FaultKind.NOT_SENT,
        *,
        deadly: bool = False,
        on_fault: Callable[[], object] = lambda: None,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.grants: list[Grant] = []
        self.hit = False
        self._point = point
        self._kind = kind
        self._deadly = deadly
        self._on_fault = on_fault
        self._lock = threading.Lock()

    @property
    def dead(self) -> bool:
        """Return whether the process counts as dead."""
        return self._deadly and self.hit

    def count(self, call: str) -> FaultKind | None:
        """Count a call; return how it fails, None if it does not."""
        with self._lock:
            if self.dead:
                return FaultKind.NOT_SENT
            self.calls[call] += 1
            if self._point != (call, self.calls[call]):
                return None
            self.hit = True
        self._on_fault()
        return self._kind


class _FaultyCalls:
    """The calls of one driver object, which fail as planned."""

    def __init__(self, plan: FaultPlan, part: str, error: type[Unavailable]) -> None:
        self.plan = plan
        self._part = part
        self._error = error
        self._unheard: set[asyncio.Task[Any]] = set()  # calls under way without their callers

    async def call(
        self,
        name: str,
        work: Callable[[], Awaitable[Value]],
        on_lost_reply: Callable[[Value], None] = lambda _: None,
    ) -> Value:
        """Make a call, or fail as planned. `on_lost_reply` gets the reply that is lost."""
        kind = self.plan.count(f"{self._part}.{name}")
        if kind is None:
            return await work()
        if kind is not FaultKind.NOT_SENT:
            task = asyncio.ensure_future(self._go_on(work, on_lost_reply))
            self._unheard.add(task)
            task.add_done_callback(self._unheard.discard)
            if kind is FaultKind.REPLY_LOST:
                await task
        raise self._error(f"{self._part}.{name} fails as planned: {kind}")

    def is_one(self, task: asyncio.Task[Any] | None) -> bool:
        """Tell whether a task is a call under way without its caller."""
        return task in self._unheard

    async def finish(self) -> None:
        """Wait for the calls that are under way without their callers."""
        if self._unheard:
            await asyncio.wait(self._unheard)

    def cancel(self) -> None:
        """Cancel these calls."""
        for task in self._unheard:
            task.cancel()

    @staticmethod
    async def _go_on(
        work: Callable[[], Awaitable[Value]], on_lost_reply: Callable[[Value], None]
    ) -> None:
        on_lost_reply(await work())


class FlakyBroker:
    """A broker that passes calls on to another one, and fails as planned."""

    traits: ClassVar[Traits] = Traits()

    def __init__(self, inner: Broker, plan: FaultPlan) -> None:
        self.traits = inner.traits  # type: ignore[misc]  # those of the other one
        self._inner = inner
        self._plan = plan
        self._calls = _FaultyCalls(plan, "broker", BrokerUnavailable)
        self._schedule_calls = _FaultyCalls(plan, "schedules", BrokerUnavailable)

    @property
    def url(self) -> str:
        return self._inner.url

    def clone(self) -> Self:
        return type(self)(self._inner.clone(), self._plan)

    def backend(self) -> ResultBackend | None:
        inner = self._inner.backend()
        return None if inner is None else FlakyBackend(inner, self._plan)

    async def open(self) -> None:
        await self._calls.call("open", self._inner.open)

    async def close(self) -> None:
        await self._calls.finish()
        await self._schedule_calls.finish()
        await self._inner.close()

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        return await self._calls.call(
            "publish", lambda: self._inner.publish(batch, call_id=call_id)
        )

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> FlakyConsumer:
        inner = self._inner.consumer(queues, name=name, lease=lease, about=about)
        self._plan.grants.append(inner.grant)
        return FlakyConsumer(inner, self._plan)

    def schedules(self) -> FlakySchedules:
        return FlakySchedules(self._inner.schedules(), self._schedule_calls)

    def lease(self, grant: Grant) -> FlakyLease:
        return FlakyLease(self._inner.lease(grant), self._plan)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        return await self._calls.call("consumers", self._inner.consumers)

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        return await self._calls.call("cancel", lambda: self._inner.cancel(ids, running=running))

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        return await self._calls.call("cancelled_among", lambda: self._inner.cancelled_among(ids))

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        return await self._calls.call("maintain", lambda: self._inner.maintain(limits))

    async def depth(self) -> Mapping[str, Depth]:
        return await self._calls.call("depth", self._inner.depth)

    async def purge(self, queue: str) -> int:
        return await self._calls.call("purge", lambda: self._inner.purge(queue))

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        return await self._calls.call("dead", lambda: self._inner.dead(queue, limit, before=before))

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return await self._calls.call("revive", lambda: self._inner.revive(queue, letters))

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return await self._calls.call("discard", lambda: self._inner.discard(queue, keys))


class FlakyConsumer:
    """A consumer of a `FlakyBroker`."""

    def __init__(self, inner: Consumer, plan: FaultPlan) -> None:
        self.id = inner.id
        self._inner = inner
        self._plan = plan
        self._calls = _FaultyCalls(plan, "consumer", BrokerUnavailable)
        self._fetches = _FaultyCalls(plan, "consumer", BrokerUnavailable)
        self._taken_unheard: list[Delivery] = []  # taken by a call whose reply was lost

    @property
    def grant(self) -> Grant:
        return self._inner.grant

    async def open(self) -> None:
        await self._calls.call("open", self._inner.open)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        return await self._fetches.call(
            "fetch", lambda: self._fetch(limit, wait, order), self._taken_unheard.extend
        )

    async def _fetch(
        self, limit: int, wait: float, order: Sequence[str] | None
    ) -> Sequence[Delivery]:
        # As with any driver, messages that a lost call took come with the next one.
        if not self._fetches.is_one(asyncio.current_task()):
            await self._fetches.finish()
        if self._taken_unheard:
            found = self._taken_unheard[:limit]
            del self._taken_unheard[:limit]
            return found
        return await self._inner.fetch(limit, wait, order=order)

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        return await self._calls.call("settle", lambda: self._inner.settle(batch))

    async def news(self) -> News:
        return await self._calls.call("news", self._inner.news)

    async def close(self) -> None:
        self._fetches.cancel()
        await self._fetches.finish()
        await self._calls.finish()
        if not self._plan.dead:
            await self._inner.close()


class FlakySchedules:
    """The schedules of a `FlakyBroker`, whose `close` waits for their calls."""

    def __init__(self, inner: ScheduleStore, calls: _FaultyCalls) -> None:
        self._inner = inner
        self._calls = calls

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        return await self._calls.call("load", lambda: self._inner.load(ids))

    async def due(self, limit: int) -> DueSchedules:
        return await self._calls.call("due", lambda: self._inner.due(limit))

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        return await self._calls.call(
            "compare_and_swap", lambda: self._inner.compare_and_swap(schedule_id, seen, new, batch)
        )


class FlakyLease:
    """A lease of a `FlakyBroker`."""

    def __init__(self, inner: Lease, plan: FaultPlan) -> None:
        self._inner = inner
        self._calls = _FaultyCalls(plan, "lease", BrokerUnavailable)

    async def renew(self) -> bool:
        return await self._calls.call("renew", self._inner.renew)

    async def end(self, note: str) -> int:
        return await self._calls.call("end", lambda: self._inner.end(note))

    async def close(self) -> None:
        await self._calls.finish()
        await self._inner.close()


class FlakyBackend:
    """A result backend that passes calls on to another one, and fails as planned."""

    wants_arguments: ClassVar[bool] = False

    def __init__(self, inner: ResultBackend, plan: FaultPlan) -> None:
        self.wants_arguments = inner.wants_arguments  # type: ignore[misc]  # that of the other one
        self._inner = inner
        self._plan = plan
        self._calls = _FaultyCalls(plan, "backend", BackendUnavailable)

    @property
    def url(self) -> str:
        return self._inner.url

    def clone(self) -> Self:
        return type(self)(self._inner.clone(), self._plan)

    async def open(self) -> None:
        await self._calls.call("open", self._inner.open)

    async def close(self) -> None:
        await self._calls.finish()
        await self._inner.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        return await self._calls.call("store", lambda: self._inner.store(batch, ttl))

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return await self._calls.call("load", lambda: self._inner.load(ids))

    def subscribe(self) -> AsyncIterator[Sequence[str | Outcome]]:
        return self._inner.subscribe()  # the driver waits by itself until the server is back

    async def forget(self, ids: Collection[str]) -> int:
        return await self._calls.call("forget", lambda: self._inner.forget(ids))
