"""Conformance tests of `Consumer.settle`: the kinds of settlement, and receipts."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.testing.conformance.rig import (
    PATIENCE,
    BrokerSuite,
    Rig,
    envelope,
    expect_nothing,
    ids_of,
)


def every_kind(delivery: Delivery) -> list[Settlement]:
    """Return each settlement that a delivery can get."""
    return [
        Done(delivery),
        Again(delivery, envelope("intruder")),
        Dead(delivery, "intruder"),
        Release(delivery),
    ]


class SettlementTests(BrokerSuite):
    """The effect of each settlement, once for each delivery."""

    async def test_done_forgets_the_envelope(self, rig: Rig) -> None:
        consumer, [got] = await rig.hold("a")
        assert not await consumer.settle([Done(got)])
        await expect_nothing(consumer)
        assert await rig.depth() == Depth()

    async def test_an_empty_batch_settles_nothing(self, rig: Rig) -> None:
        consumer, _ = await rig.hold("a")
        assert not await consumer.settle([])
        assert await rig.depth() == Depth(held=1)

    async def test_again_replaces_the_envelope(self, rig: Rig) -> None:
        consumer, [got] = await rig.hold("a", body=b"first")
        assert not await consumer.settle([Again(got, envelope("a", body=b"second"))])
        assert await rig.depth() == Depth(ready=1)
        [got] = await rig.receive(consumer, 1)
        assert (got.id, got.body, got.crashes) == ("a", b"second", 0)
        assert not await consumer.settle([Done(got)])
        await expect_nothing(consumer)

    async def test_again_goes_to_the_tail_of_the_queue(self, rig: Rig) -> None:
        consumer, [got] = await rig.hold("a")
        await rig.publish("b", "c")
        await consumer.settle([Again(got, envelope("a"))])
        assert await rig.finish(consumer, 3) == ["b", "c", "a"]

    async def test_again_may_delay(self, rig: Rig) -> None:
        consumer, [got] = await rig.hold("a")
        due = await rig.harness.now() + self.delay
        assert not await consumer.settle([Again(got, envelope("a", not_before=due))])
        assert await rig.depth() == rig.countable(Depth(delayed=1))
        await expect_nothing(consumer)
        await rig.harness.pass_time(self.delay)
        assert await rig.finish(consumer, 1) == ["a"]

    async def test_again_may_change_the_queue_and_the_id(self, rig: Rig, broker: Broker) -> None:
        consumer, [got] = await rig.hold("a")
        await consumer.settle([Again(got, envelope("b", queue="parked"))])
        assert await broker.depth() == {"parked": Depth(ready=1)}
        assert await rig.finish(await rig.consumer("parked"), 1) == ["b"]

    async def test_again_wakes_a_waiting_fetch(self, rig: Rig) -> None:
        holder, [got] = await rig.hold("a")
        consumer = await rig.consumer("p")
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(0)
        await holder.settle([Again(got, envelope("a", queue="p"))])
        async with asyncio.timeout(PATIENCE):
            assert ids_of(await waiting) == ["a"]

    @pytest.mark.usefixtures("needs_order")
    async def test_release_goes_to_the_head_in_order_and_counts_nothing(self, rig: Rig) -> None:
        await rig.publish(*"abcdef")
        consumer = await rig.consumer()
        held = await rig.receive(consumer, 3, limit=3)
        assert not await consumer.settle([Release(one) for one in held])
        assert await rig.depth() == Depth(ready=6)
        other = await rig.consumer()
        got = await rig.receive(other, 6)
        assert ids_of(got) == list("abcdef")
        assert [one.crashes for one in got] == [0] * 6

    async def test_a_batch_may_mix_every_kind(self, rig: Rig, broker: Broker) -> None:
        consumer, [a, b, c, d, e] = await rig.hold(*"abcde")
        due = await rig.harness.now() + 3600.0
        batch: list[Settlement] = [
            Done(a),
            Again(b, envelope("b", not_before=due)),
            Dead(c, "bad"),
            Release(d),
        ]
        assert not await consumer.settle(batch)
        assert await rig.depth() == rig.countable(Depth(ready=1, delayed=1, held=1, dead=1))
        assert ids_of(await broker.dead("q")) == ["c"]
        assert ids_of(await rig.receive(await rig.consumer(), 1)) == ["d"]
        assert not await consumer.settle([Done(e)])

    async def test_the_same_batch_twice_takes_effect_once(self, rig: Rig, broker: Broker) -> None:
        consumer, [a, b, c, d] = await rig.hold(*"abcd")
        batch: list[Settlement] = [
            Done(a),
            Again(b, envelope("b")),
            Dead(c, "bad"),
            Release(d),
        ]
        assert not await consumer.settle(batch)
        assert ids_of(await consumer.settle(batch)) == list("abcd")
        assert ids_of(await consumer.settle(batch)) == list("abcd")
        assert await rig.depth() == Depth(ready=2, dead=1)
        assert len(await broker.dead("q")) == 1
        assert sorted(await rig.finish(consumer, 2)) == ["b", "d"]

    async def test_a_batch_with_lost_deliveries_settles_the_others(self, rig: Rig) -> None:
        consumer, [a, b, c] = await rig.hold(*"abc")
        await consumer.settle([Done(b)])
        assert ids_of(await consumer.settle([Done(a), Dead(b, "late"), Done(c)])) == ["b"]
        assert await rig.depth() == Depth()

    async def test_a_delivery_that_is_given_twice_in_a_batch_is_settled_once(
        self, rig: Rig
    ) -> None:
        consumer, [a, b] = await rig.hold(*"ab")
        assert ids_of(await consumer.settle([Done(a), Release(b), Done(a)])) == ["a"]
        assert await rig.depth() == Depth(ready=1)
        assert await rig.finish(consumer, 1) == ["b"]

    async def test_a_delivery_of_another_consumer_is_not_settled(self, rig: Rig) -> None:
        broker = await rig.harness.broker()
        await rig.publish("a")
        holder = await rig.consumer(broker=broker)
        [got] = await rig.receive(holder, 1)
        for other in (await rig.consumer(broker=broker), await rig.consumer()):
            for one in every_kind(got):
                assert ids_of(await other.settle([one])) == ["a"]
        assert await rig.depth() == Depth(held=1)
        assert not await holder.settle([Done(got)])

    async def test_a_closed_consumer_settles_nothing(self, rig: Rig) -> None:
        consumer, [got] = await rig.hold("a")
        await consumer.close()
        for one in every_kind(got):
            assert ids_of(await consumer.settle([one])) == ["a"]
        assert await rig.depth() == Depth(ready=1)

    @pytest.mark.parametrize("kind", range(4), ids=["Done", "Again", "Dead", "Release"])
    async def test_a_receipt_is_void_after_each_kind(self, rig: Rig, kind: int) -> None:
        consumer, [got] = await rig.hold("a")
        assert not await consumer.settle([every_kind(got)[kind]])
        before = await rig.depth()
        for late in every_kind(got):
            assert ids_of(await consumer.settle([late])) == ["a"]
        assert await rig.depth() == before

    async def test_the_receipt_of_an_earlier_delivery_is_void_for_the_same_consumer(
        self, rig: Rig
    ) -> None:
        consumer, [old] = await rig.hold("a")
        await consumer.settle([Release(old)])
        [new] = await rig.receive(consumer, 1)
        for late in every_kind(old):
            assert ids_of(await consumer.settle([late])) == ["a"]
        assert await rig.depth() == Depth(held=1)
        assert not await consumer.settle([Done(new)])
        assert await rig.depth() == Depth()

    async def test_the_receipt_of_an_earlier_delivery_is_void_after_again(self, rig: Rig) -> None:
        consumer, [old] = await rig.hold("a")
        await consumer.settle([Again(old, envelope("a"))])
        [new] = await rig.receive(consumer, 1)
        for late in every_kind(old):
            assert ids_of(await consumer.settle([late])) == ["a"]
        assert await rig.depth() == Depth(held=1)
        assert not await consumer.settle([Done(new)])

    async def test_one_of_two_copies_is_settled_without_the_other(self, rig: Rig) -> None:
        consumer, [first, second] = await rig.hold("a", "a")
        assert not await consumer.settle([Done(first)])
        assert ids_of(await consumer.settle([Done(first)])) == ["a"]
        assert await rig.depth() == Depth(held=1)
        assert not await consumer.settle([Release(second)])
        assert await rig.finish(consumer, 1) == ["a"]
