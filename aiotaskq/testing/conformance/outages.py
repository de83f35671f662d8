"""Conformance tests of brokers while their server is unreachable, and after that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.settlement import Done
from aiotaskq.errors import BrokerUnavailable, LeaseLost
from aiotaskq.testing.conformance.harness import BrokerHarness
from aiotaskq.testing.conformance.rig import (
    MOMENT,
    PATIENCE,
    BrokerSuite,
    Rig,
    envelope,
    expect_unavailable,
    ids_of,
    retry_unavailable,
)

Value = TypeVar("Value")


class OutageTests(BrokerSuite):
    """Each call raises `BrokerUnavailable`, nothing is lost, and the same objects work later."""

    @pytest.fixture
    def cuttable(self, harness: BrokerHarness) -> BrokerHarness:
        if not harness.can_cut:
            pytest.skip(f"{type(harness).__name__}.can_cut is False")
        return harness

    async def test_every_call_raises_broker_unavailable_during_an_outage(
        self, rig: Rig, cuttable: BrokerHarness, broker: Broker
    ) -> None:
        consumer, [got] = await rig.hold("a")
        other = broker.consumer(["q"], name="suite", lease=self.lease)
        lease = broker.lease(consumer.grant)
        assert await lease.renew()
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "publish": lambda: broker.publish([envelope("b")]),
            "publish under an id": lambda: broker.publish([envelope("b")], call_id="c"),
            "cancel": lambda: broker.cancel(["x"]),
            "cancel what waits": lambda: broker.cancel(["x"], running=False),
            "maintain": broker.maintain,
            "depth": broker.depth,
            "purge": lambda: broker.purge("q"),
            "dead": lambda: broker.dead("q"),
            "revive": lambda: broker.revive("q", [("key", envelope("c"))]),
            "discard": lambda: broker.discard("q", ["key"]),
            "consumers": broker.consumers,
            "open": other.open,
            "fetch": lambda: consumer.fetch(1, 0),
            "fetch and wait": lambda: consumer.fetch(1, MOMENT),
            "settle": lambda: consumer.settle([Done(got)]),
            "news": consumer.news,
            "renew": lease.renew,
            "end": lambda: lease.end("killed"),
        }
        await cuttable.cut()
        await expect_unavailable(calls)
        await cuttable.mend()
        await lease.close()
        await other.close()

    async def test_opening_a_driver_during_an_outage_raises(
        self, rig: Rig, cuttable: BrokerHarness, broker: Broker
    ) -> None:
        clone = broker.clone()
        await cuttable.cut()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(BrokerUnavailable):
                await clone.open()
            await clone.close()
        await cuttable.mend()

    async def test_closing_during_an_outage_does_not_raise(
        self, rig: Rig, cuttable: BrokerHarness
    ) -> None:
        broker = await cuttable.broker()
        consumer = await rig.consumer(broker=broker)
        await rig.publish("a")
        await rig.receive(consumer, 1)
        lease = broker.lease(consumer.grant)
        await lease.renew()
        await cuttable.cut()
        async with asyncio.timeout(PATIENCE):
            await lease.close()
            await consumer.close()
            await consumer.close()
            await broker.close()
        await cuttable.mend()
        await rig.lapse()
        assert await rig.finish(await rig.consumer(), 1) == ["a"]

    async def test_the_same_objects_work_after_an_outage(
        self, rig: Rig, cuttable: BrokerHarness, broker: Broker
    ) -> None:
        await rig.publish("before")
        consumer = await rig.consumer()
        await cuttable.cut()
        for call in (lambda: broker.publish([envelope("x")]), lambda: consumer.fetch(1, 0)):
            with pytest.raises(BrokerUnavailable):
                await call()
        await cuttable.mend()
        await retry_unavailable(lambda: broker.publish([envelope("after")], call_id="c"))
        got: list[Delivery] = []
        async with asyncio.timeout(PATIENCE):
            while len(got) < 2:
                try:
                    got += await consumer.fetch(10, MOMENT)
                except LeaseLost:  # of a broker without the trait `leases`
                    consumer = await rig.consumer()
                except BrokerUnavailable:
                    await asyncio.sleep(MOMENT)
        assert ids_of(got) == ["before", "after"]

    async def test_a_waiting_fetch_ends_when_an_outage_begins(
        self, rig: Rig, cuttable: BrokerHarness, broker: Broker
    ) -> None:
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 3.0))
        await asyncio.sleep(MOMENT)
        await cuttable.cut()
        async with asyncio.timeout(PATIENCE):
            [outcome] = await asyncio.gather(waiting, return_exceptions=True)
        # A client that cannot notice the outage returns an empty batch when the wait is over.
        assert isinstance(outcome, BrokerUnavailable) or outcome == []
        await cuttable.mend()

    async def test_settling_again_after_an_outage_takes_effect_once(
        self, rig: Rig, cuttable: BrokerHarness, broker: Broker
    ) -> None:
        consumer, held = await rig.hold("a", "b")
        batch = [Done(one) for one in held]
        await cuttable.cut()
        with pytest.raises(BrokerUnavailable):
            await consumer.settle(batch)
        await cuttable.mend()
        gone = await retry_unavailable(lambda: consumer.settle(batch))
        # All were settled; or, without the trait `leases`, all were taken back.
        if gone:
            assert sorted(await rig.finish(await rig.consumer(), len(gone))) == sorted(ids_of(gone))
        assert (await rig.depth()).ready == 0

    async def test_an_empty_batch_needs_no_broker(
        self, rig: Rig, cuttable: BrokerHarness, broker: Broker
    ) -> None:
        await cuttable.cut()
        assert not await broker.publish([])
        await cuttable.mend()
