"""Conformance tests of `Broker.cancel`: waiting, held and unknown messages."""

from __future__ import annotations

import asyncio

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Done, Release
from aiotaskq.testing.conformance.rig import (
    PATIENCE,
    BrokerSuite,
    Rig,
    envelope,
    expect_nothing,
    ids_of,
)


class CancelTests(BrokerSuite):
    """Waiting messages are dropped; held ones are in the news of their consumers, or spared."""

    async def test_a_cancelled_message_is_never_delivered(self, rig: Rig, broker: Broker) -> None:
        await rig.publish("a", "b", "c")
        await rig.publish("d", "e", delay=self.delay)
        assert not await broker.cancel(["b", "d", "unknown"])
        assert not await broker.cancel([])
        await rig.harness.pass_time(self.delay)
        assert sorted(await rig.finish(await rig.consumer(), 3)) == ["a", "c", "e"]

    async def test_an_id_stays_cancelled_until_it_is_published(
        self, rig: Rig, broker: Broker
    ) -> None:
        await broker.cancel(["a"])
        await broker.cancel(["c"], running=False)
        await rig.publish("a", "b", "c")
        await rig.publish("c", delay=self.delay)
        await rig.harness.pass_time(self.delay)
        assert await rig.finish(await rig.consumer(), 1) == ["b"]

    async def test_the_ids_that_stay_cancelled_can_be_asked_for(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.hold("held")
        await broker.cancel(["a", "b"])
        await broker.cancel(["c", "held"], running=False)
        await rig.publish("a", "d")
        found = await broker.cancelled_among(["a", "b", "c", "d", "held", "unknown"])
        assert sorted(found) == ["a", "b", "c"]
        assert not await broker.cancelled_among(["d"])
        assert not await broker.cancelled_among([])

    async def test_a_consumer_hears_once_that_a_message_it_holds_was_cancelled(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, held = await rig.hold("a", "b")
        await broker.cancel(["a"])
        told = await _cancelled_news(consumer)
        assert "a" in told
        assert "b" not in told
        assert "a" not in (await consumer.news()).cancelled
        assert not await consumer.settle([Done(one) for one in held])

    async def test_a_cancelled_message_is_not_delivered_after_it_was_released(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, [a, b, c] = await rig.hold(*"abc")
        await broker.cancel(["a", "b"])
        await consumer.settle([Release(a), Again(b, envelope("b")), Release(c)])
        assert await rig.finish(consumer, 1) == ["c"]

    async def test_a_cancelled_message_is_not_delivered_after_its_consumer_died(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.hold("a", "b")
        await broker.cancel(["a"])
        await rig.lapse()
        assert await rig.finish(await rig.consumer(), 1) == ["b"]

    async def test_again_may_replace_a_cancelled_message_by_one_with_another_id(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, [got] = await rig.hold("a")
        await broker.cancel(["a"])
        assert not await consumer.settle([Again(got, envelope("b"))])
        assert await rig.finish(consumer, 1) == ["b"]

    async def test_held_messages_are_spared_and_returned_with_running_false(
        self, rig: Rig, broker: Broker
    ) -> None:
        holder, [a, b, c] = await rig.hold(*"abc")
        await rig.publish("d", "e")
        held = await broker.cancel(["a", "b", "d", "unknown"], running=False)
        assert sorted(held) == ["a", "b"]
        assert {"a", "b"}.isdisjoint((await holder.news()).cancelled)
        assert not await holder.settle([Done(c), Release(a), Again(b, envelope("b"))])
        consumer = await rig.consumer()
        assert sorted(await rig.finish(consumer, 3)) == ["a", "b", "e"]
        assert not await broker.cancel(["a", "b"], running=False)

    async def test_a_spared_message_survives_its_consumer_and_can_be_cancelled_later(
        self, rig: Rig, broker: Broker
    ) -> None:
        holder, _ = await rig.hold("a", "b")
        assert sorted(await broker.cancel(["a", "b"], running=False)) == ["a", "b"]
        assert await rig.end(holder) == 2
        consumer = await rig.consumer()
        [a, b] = await rig.receive(consumer, 2)
        assert ids_of([a, b]) == ["a", "b"]
        await broker.cancel(["a"])
        assert "a" in await _cancelled_news(consumer)
        await consumer.settle([Again(a, envelope("a")), Release(b)])
        assert not await broker.cancel(["b"], running=False)
        await expect_nothing(consumer)
        assert (await rig.depth()).held == 0

    async def test_a_message_that_was_cancelled_before_is_not_spared(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, [got] = await rig.hold("a")
        await broker.cancel(["a"])
        await broker.cancel(["a"], running=False)
        assert "a" in await _cancelled_news(consumer)
        assert not await consumer.settle([Again(got, envelope("a"))])
        await expect_nothing(consumer)

    async def test_a_delayed_retry_is_cancelled(self, rig: Rig, broker: Broker) -> None:
        consumer, [got] = await rig.hold("a")
        await consumer.settle([Again(got, envelope("a", delay=self.delay))])
        assert not await broker.cancel(["a"], running=False)
        await rig.harness.pass_time(self.delay)
        await broker.maintain()
        await expect_nothing(consumer)
        assert await rig.depth() == Depth()


async def _cancelled_news(consumer: Consumer) -> set[str]:
    """Ask for news until there are some: they may take a moment."""
    told: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while not told:
            told |= set((await consumer.news()).cancelled)
            await asyncio.sleep(0.01)
    return told
