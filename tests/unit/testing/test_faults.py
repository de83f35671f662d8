"""`FlakyBroker`: the planned fault, and the contract that it keeps."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable
from aiotaskq.testing import FaultKind, FaultPlan, FaultPoint, FlakyBroker
from aiotaskq.testing.conformance.rig import PATIENCE, envelope, ids_of

LEASE = 60.0


@pytest.mark.parametrize(
    ("way", "stored"), [(FaultKind.NOT_SENT, 0), (FaultKind.DELAYED, 1), (FaultKind.REPLY_LOST, 1)]
)
async def test_the_chosen_call_fails_and_no_other(way: FaultKind, stored: int) -> None:
    plan = FaultPlan(FaultPoint("broker.publish", 2), way)
    broker = FlakyBroker(MemoryBroker(), plan).clone()
    await broker.publish([envelope("a")])
    with pytest.raises(BrokerUnavailable, match=r"broker\.publish"):
        await broker.publish([envelope("b")])
    assert plan.hit
    await broker.publish([envelope("c")])
    await broker.close()  # it waits for calls without their callers
    assert await broker.depth() == {"q": Depth(ready=2 + stored)}
    assert plan.calls == {"broker.publish": 3, "broker.depth": 1}


@pytest.mark.parametrize("way", list(FaultKind))
async def test_messages_of_a_lost_fetch_come_with_the_next(way: FaultKind) -> None:
    broker = FlakyBroker(MemoryBroker(), FaultPlan(FaultPoint("consumer.fetch", 1), way))
    await broker.publish([envelope(one) for one in "abc"])
    consumer = broker.consumer(["q"], name="w", lease=LEASE)
    await consumer.open()
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(2, PATIENCE)
    got = [*await consumer.fetch(1, PATIENCE), *await consumer.fetch(9, PATIENCE)]
    got += await consumer.fetch(9, 0)
    assert ids_of(got) == ["a", "b", "c"]
    assert not await consumer.settle([Done(one) for one in got])
    await consumer.close()


async def test_a_fetch_that_still_waits_unheard_holds_nothing_up() -> None:
    broker = FlakyBroker(
        MemoryBroker(), FaultPlan(FaultPoint("consumer.fetch", 1), FaultKind.DELAYED)
    )
    consumer = broker.consumer(["q"], name="w", lease=LEASE)
    await consumer.open()
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(1, 10 * PATIENCE)
    async with asyncio.timeout(PATIENCE):
        await consumer.close()


async def test_a_dead_process_does_nothing_more_and_closes_nothing() -> None:
    inner = MemoryBroker()
    plan = FaultPlan(FaultPoint("consumer.settle", 1), FaultKind.NOT_SENT, deadly=True)
    broker = FlakyBroker(inner, plan)
    backend = broker.backend()
    assert backend is not None
    await broker.publish([envelope("a")])
    consumer = broker.consumer(["q"], name="w", lease=LEASE)
    await consumer.open()
    [got] = await consumer.fetch(1, 0)
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            await consumer.settle([Done(got)])
    with pytest.raises(BackendUnavailable):
        await backend.load(["a"])
    with pytest.raises(BrokerUnavailable):
        await broker.lease(consumer.grant).renew()
    await consumer.close()
    assert await inner.depth() == {"q": Depth(held=1)}
    assert plan.grants == [consumer.grant]
    assert await inner.lease(consumer.grant).end("killed") == 1
