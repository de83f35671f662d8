"""The rig of the broker suite: brokers and consumers of one test, and fixtures of all parts.

Theory of operation. A test has one client of its own, opened when first asked for, and each of its
consumers has another one, as workers in several processes have. The harness owns all clients. At
the end of a test the rig closes the consumers first, which releases their messages, and the harness
closes the clients and empties the store; both also happen after a failure. Tests wait for events
with `PATIENCE` as the limit, and never for a state by sleeping. `MOMENT` is slept only where
something must not happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, ClassVar, TypeVar

import pytest

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import SUSPECT, Delivery, Envelope
from aiotaskq.contract.records import DeadLimits, Depth, Maintained
from aiotaskq.contract.settlement import Done, Settlement
from aiotaskq.errors import BrokerUnavailable, Unavailable
from aiotaskq.testing.conformance.harness import BrokerHarness, LethalHarness

Value = TypeVar("Value")

PATIENCE = 120.0
"""Seconds to wait for something that must happen. No passing test takes as long."""

MOMENT = 0.1
"""Seconds to wait for something that must not happen."""

TRIES = 50
"""Attempts at something that has to be quick, of which a busy machine may delay many."""

BOUND = 2000
"""The most messages of each kind that one call of `maintain` may move, to keep no one waiting."""


class Rig:
    """Brokers and consumers of one test, opened on demand and closed at its end."""

    def __init__(self, harness: BrokerHarness, *, lease: float) -> None:
        self.harness = harness
        self.lease = lease
        self._main: Broker | None = None
        self._consumers: list[Consumer] = []

    async def broker(self) -> Broker:
        """Return the client of the test itself."""
        if self._main is None:
            self._main = await self.harness.broker()
        return self._main

    async def consumer(
        self, *queues: str, broker: Broker | None = None, about: bytes = b""
    ) -> Consumer:
        """Return an open consumer of `queues`, on a client of its own unless one is given."""
        broker = broker or await self.harness.broker()
        consumer = broker.consumer(queues or ("q",), name="suite", lease=self.lease, about=about)
        await consumer.open()
        self._consumers.append(consumer)
        return consumer

    async def publish(self, *ids: str, **fields: Any) -> list[Envelope]:
        """Store one envelope for each id, in one batch."""
        batch = [envelope(one, **fields) for one in ids]
        assert not await (await self.broker()).publish(batch)
        return batch

    async def hold(self, *ids: str, **fields: Any) -> tuple[Consumer, list[Delivery]]:
        """Store envelopes and have a consumer take them."""
        batch = await self.publish(*ids, **fields)
        consumer = await self.consumer(*{one.queue for one in batch})
        return consumer, await self.receive(consumer, len(ids))

    async def receive(self, consumer: Consumer, count: int, limit: int = 1000) -> list[Delivery]:
        """Fetch exactly `count` deliveries; call `maintain` between the calls, as workers do."""
        got: list[Delivery] = []
        broker = await self.broker()
        try:
            async with asyncio.timeout(PATIENCE):
                while len(got) < count:
                    got += await consumer.fetch(min(limit, count - len(got)), 2 * MOMENT)
                    if len(got) < count:
                        await broker.maintain()
        except TimeoutError:
            pytest.fail(f"received {len(got)} of {count} deliveries: {ids_of(got)}")
        return got

    async def finish(self, consumer: Consumer, count: int) -> list[str]:
        """Receive and settle `count` deliveries, expect no more, and return their ids."""
        got = await self.receive(consumer, count)
        assert not await consumer.settle([done(one) for one in got])
        await expect_nothing(consumer)
        return ids_of(got)

    async def lapse(self) -> Maintained:
        """Let the leases of all consumers made so far lapse, and reclaim their messages."""
        if isinstance(self.harness, LethalHarness):
            return Maintained(reclaimed=await self.harness.kill(*self._consumers))
        await self.harness.pass_time(self.lease + 1.0)
        return await maintain(await self.broker())

    async def depth(self, queue: str = "q") -> Depth:
        """Return the counts of one queue."""
        return (await (await self.broker()).depth()).get(queue, Depth())

    def countable(self, depth: Depth) -> Depth:
        """Return a depth as the broker counts it: some cannot count delayed messages."""
        assert self._main is not None
        if self._main.traits.counts_delayed:
            return depth
        return Depth(ready=depth.ready, held=depth.held, dead=depth.dead)

    async def renew(self, consumer: Consumer) -> bool:
        """Renew a consumer's lease as a worker does: in a thread, on another event loop."""
        lease = (await self.broker()).lease(consumer.grant)

        async def go() -> bool:
            try:
                return await lease.renew()
            finally:
                await lease.close()

        return await on_another_loop(go())

    async def end(self, consumer: Consumer, note: str = "killed") -> int:
        """End a consumer's lease as an observer of its death does: with a client of its own."""
        if isinstance(self.harness, LethalHarness):
            return await self.harness.kill(consumer)
        broker = (await self.broker()).clone()

        async def go() -> int:
            await broker.open()
            lease = broker.lease(consumer.grant)
            try:
                return await lease.end(note)
            finally:
                await lease.close()
                await broker.close()

        return await on_another_loop(go())

    async def crash(self, *ids: str, times: int = SUSPECT, **fields: Any) -> None:
        """Store envelopes, and end `times` consumers, each while it holds all of them."""
        await self.publish(*ids, **fields)
        for _ in range(times):
            consumer = await self.consumer(fields.get("queue", "q"))
            await self.receive(consumer, len(ids))
            assert await self.end(consumer) == len(ids)

    async def close(self) -> None:
        """Close the consumers. The harness closes the brokers."""
        for consumer in self._consumers:
            await consumer.close()


class BrokerSuite:
    """The fixtures that the parts of the suite share.

    Attributes:
        lease: The seconds of each consumer's lease.
        delay: The seconds by which tests delay an envelope.

    Lower them where the harness's `pass_time` really sleeps.
    """

    lease: ClassVar[float] = 60.0
    delay: ClassVar[float] = 5.0

    @pytest.fixture
    async def rig(self, harness: BrokerHarness) -> AsyncIterator[Rig]:
        rig = Rig(harness, lease=self.lease)
        yield rig
        await rig.close()

    @pytest.fixture
    async def broker(self, rig: Rig) -> Broker:
        return await rig.broker()

    @pytest.fixture
    async def needs_leases(self, broker: Broker) -> None:
        needs(broker, "leases")

    @pytest.fixture
    async def needs_order(self, broker: Broker) -> None:
        needs(broker, "order")

    @pytest.fixture
    async def needs_clock(self, broker: Broker) -> None:
        needs(broker, "clock")

    @pytest.fixture
    async def needs_delayed_counts(self, broker: Broker) -> None:
        needs(broker, "counts_delayed")

    @pytest.fixture
    async def needs_idempotence(self, broker: Broker) -> None:
        needs(broker, "idempotent")


def envelope(name: str, **fields: Any) -> Envelope:
    """Return an envelope of queue ``q`` whose body holds its id."""
    return Envelope(
        **{"id": name, "queue": "q", "body": f"body of {name}".encode(errors="replace"), **fields}
    )


def ids_of(items: Iterable[Any]) -> list[str]:
    """Return the ids of deliveries, envelopes or dead letters."""
    return [item.id for item in items]


def done(delivery: Delivery) -> Settlement:
    """Return the settlement of a finished task."""
    return Done(delivery)


async def on_another_loop(work: Coroutine[Any, Any, Value]) -> Value:
    """Run a coroutine on an event loop of its own, in a thread that ends with it."""
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, asyncio.run, work)


def needs(broker: Broker, trait: str) -> None:
    """Skip the test where the broker lacks a trait."""
    if not getattr(broker.traits, trait):
        pytest.skip(f"{type(broker).__name__}.traits.{trait} is False")


async def expect_nothing(consumer: Consumer) -> None:
    """Check that there is nothing to fetch, neither at once nor in a moment."""
    assert ids_of(await consumer.fetch(10, 0)) == []
    assert ids_of(await consumer.fetch(10, MOMENT)) == []


async def maintain(broker: Broker, limits: DeadLimits | None = None) -> Maintained:
    """Call `maintain` until it has nothing left to do; return the sums of all rounds."""
    limits = DeadLimits() if limits is None else limits
    rounds = [await broker.maintain(limits)]
    while rounds[-1] != Maintained():
        assert len(rounds) < 1000, "maintain never comes to an end"
        assert max(rounds[-1].promoted, rounds[-1].reclaimed, rounds[-1].trimmed) <= BOUND
        rounds.append(await broker.maintain(limits))
    return Maintained(
        promoted=sum(one.promoted for one in rounds),
        reclaimed=sum(one.reclaimed for one in rounds),
        trimmed=sum(one.trimmed for one in rounds),
    )


@asynccontextmanager
async def maintaining(broker: Broker) -> AsyncIterator[None]:
    """Call `maintain` again and again beside the test, as other workers do."""

    async def loop() -> None:
        while True:
            await broker.maintain()
            await asyncio.sleep(MOMENT)

    task = asyncio.create_task(loop())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def expect_unavailable(calls: Mapping[str, Callable[[], Awaitable[object]]]) -> None:
    """Make each call, and fail with the names of those that do not raise `BrokerUnavailable`."""
    silent: list[str] = []
    for name, call in calls.items():
        async with asyncio.timeout(PATIENCE):
            try:
                await call()
            except BrokerUnavailable:
                continue
        silent.append(name)
    assert not silent


async def retry_unavailable(call: Callable[[], Awaitable[Value]]) -> Value:
    """Repeat a call until the server is reached again, as users of a driver do."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(MOMENT)
