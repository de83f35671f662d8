"""Conformance tests of `Consumer.fetch`: order, batch sizes, waiting and cancelled calls."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Release
from aiotaskq.testing.conformance.rig import (
    MOMENT,
    PATIENCE,
    BrokerSuite,
    Rig,
    done,
    envelope,
    expect_nothing,
    ids_of,
    needs,
)


class FetchTests(BrokerSuite):
    """`Consumer.fetch`: the deliveries, their order, and the time at which it returns."""

    async def test_a_limit_far_above_the_queue_length_takes_the_whole_queue(self, rig: Rig) -> None:
        consumer = await rig.consumer()
        for count in (2500, 1000, 1):
            await rig.publish(*map(str, range(count)))
            got = list(await consumer.fetch(10_000, 0))
            assert sorted(one.id for one in got) == sorted(map(str, range(count)))
            assert not await consumer.settle([done(one) for one in got])
        assert not await consumer.fetch(10_000, 0)

    async def test_a_call_takes_no_more_than_the_limit(self, rig: Rig) -> None:
        await rig.publish(*"abcde")
        consumer = await rig.consumer()
        assert ids_of(await rig.receive(consumer, 3, limit=3)) == ["a", "b", "c"]
        assert len(await consumer.fetch(1, 1.0)) == 1
        assert await rig.depth() == Depth(ready=1, held=4)

    async def test_a_call_takes_all_due_messages_up_to_the_limit(self, rig: Rig) -> None:
        await rig.publish(*"abcde")
        consumer = await rig.consumer()
        assert ids_of(await consumer.fetch(4, PATIENCE)) == ["a", "b", "c", "d"]
        assert ids_of(await consumer.fetch(4, PATIENCE)) == ["e"]

    async def test_earlier_queues_are_drained_first(self, rig: Rig) -> None:
        await rig.publish("l1", "l2", queue="late")
        await rig.publish("e1", "e2", queue="early")
        consumer = await rig.consumer("early", "late")
        got = await consumer.fetch(3, PATIENCE)
        assert [(one.id, one.queue) for one in got] == [
            ("e1", "early"),
            ("e2", "early"),
            ("l1", "late"),
        ]
        await rig.publish("e3", queue="early")
        assert await rig.finish(consumer, 2) == ["e3", "l2"]

    async def test_other_queues_are_left_alone(self, rig: Rig) -> None:
        await rig.publish("a", queue="theirs")
        await expect_nothing(await rig.consumer("ours"))
        assert await rig.depth("theirs") == Depth(ready=1)

    async def test_higher_priorities_come_first_then_older_messages(
        self, rig: Rig, broker: Broker
    ) -> None:
        needs(broker, "priorities")
        levels = [0, 9, 5, 0, 9, 1, 5, 8]
        await broker.publish([envelope(f"{n}", priority=p) for n, p in enumerate(levels)])
        got = await rig.receive(await rig.consumer(), len(levels))
        assert ids_of(got) == ["1", "4", "7", "2", "6", "5", "0", "3"]
        assert [one.priority for one in got] == [9, 9, 8, 5, 5, 1, 0, 0]

    async def test_the_order_of_queues_goes_before_priority(self, rig: Rig, broker: Broker) -> None:
        needs(broker, "priorities")
        await rig.publish("b", queue="late", priority=9)
        await rig.publish("a", queue="early", priority=0)
        assert await rig.finish(await rig.consumer("early", "late"), 2) == ["a", "b"]

    @pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
    async def test_one_call_may_drain_the_queues_in_another_order(
        self, rig: Rig, order: str
    ) -> None:
        for queue in "cab":
            await rig.publish(f"{queue}1", f"{queue}2", queue=queue)
        consumer = await rig.consumer(*"abc")
        got = await consumer.fetch(5, PATIENCE, order=order)
        first, second, third = tuple(order)
        expected = [f"{first}1", f"{first}2", f"{second}1", f"{second}2", f"{third}1"]
        assert ids_of(got) == expected
        assert [one.queue for one in got] == [one[0] for one in expected]
        assert not await consumer.settle([done(one) for one in got])
        assert await rig.finish(consumer, 1) == [f"{third}2"]

    async def test_a_call_takes_nothing_from_queues_that_its_order_leaves_out(
        self, rig: Rig
    ) -> None:
        for queue in "abc":
            await rig.publish(f"{queue}1", f"{queue}2", queue=queue)
        consumer = await rig.consumer(*"abc")
        got: list[str] = []
        async with asyncio.timeout(PATIENCE):
            for order, limit, count in (("b", 1, 1), ("ca", 3, 4), ("ca", 3, 5), ("b", 5, 6)):
                while len(got) < count:
                    got += ids_of(await consumer.fetch(limit, 0, order=order))
        assert got == ["b1", "c1", "c2", "a1", "a2", "b2"]

    async def test_an_order_holds_for_one_call_only(self, rig: Rig) -> None:
        for queue in "ab":
            await rig.publish(*(f"{queue}{number}" for number in range(5)), queue=queue)
        consumer = await rig.consumer("a", "b")
        got: list[str] = []
        for order in (("b", "a"), None, ["a", "b"], None, ("b", "a")):
            got += ids_of(await consumer.fetch(1, PATIENCE, order=order))
        assert got == ["b0", "a0", "a1", "a2", "b1"]

    @pytest.mark.usefixtures("needs_order")
    async def test_suspects_come_first_in_another_order_too(self, rig: Rig) -> None:
        await rig.crash("bad a", queue="a")
        await rig.crash("bad b", queue="b")
        await rig.publish("good a", queue="a")
        await rig.publish("good b", queue="b")
        consumer = await rig.consumer("a", "b")
        got: list[str] = []
        for _ in range(3):
            taken = await consumer.fetch(5, PATIENCE, order=("b", "a"))
            got += ids_of(taken)
            assert not await consumer.settle([done(one) for one in taken])
        assert got == ["bad b", "bad a", "good b", "good a"]

    async def test_a_waiting_fetch_in_another_order_is_woken_by_every_queue(self, rig: Rig) -> None:
        consumer = await rig.consumer("a", "b")
        for queue in "abba":
            waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE, order=("b", "a")))
            await asyncio.sleep(MOMENT)
            await rig.publish(f"to {queue}", queue=queue)
            async with asyncio.timeout(PATIENCE):
                assert ids_of(await waiting) == [f"to {queue}"]

    async def test_a_cancelled_call_in_another_order_loses_nothing(self, rig: Rig) -> None:
        ids = [f"{queue}{number}" for number in range(30) for queue in "ab"]
        consumer = await rig.consumer("a", "b")
        got: list[str] = []
        for turns, name in enumerate(ids):
            await rig.publish(name, queue=name[0])
            task = asyncio.create_task(consumer.fetch(1, 0, order=("b", "a")))
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                got += ids_of(await task)
        got += ids_of(await rig.receive(consumer, len(ids) - len(got)))
        assert sorted(got) == sorted(ids)

    async def test_without_a_wait_it_never_blocks(self, rig: Rig) -> None:
        consumer = await rig.consumer("q", "p")
        async with asyncio.timeout(PATIENCE):
            for _ in range(20):
                assert not await consumer.fetch(10, 0)

    async def test_an_empty_batch_is_returned_when_the_wait_is_over(self, rig: Rig) -> None:
        consumer = await rig.consumer()
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(PATIENCE):
            assert not await consumer.fetch(1, 3 * MOMENT)
        assert loop.time() - began >= 2 * MOMENT

    async def test_a_waiting_fetch_is_woken_by_a_publish(self, rig: Rig) -> None:
        consumer = await rig.consumer("q", "p")
        for queue in ("p", "q", "p"):
            waiting = asyncio.create_task(consumer.fetch(10, 2 * PATIENCE))
            await asyncio.sleep(MOMENT)
            assert not waiting.done()
            await rig.publish(f"to {queue}", queue=queue)
            async with asyncio.timeout(PATIENCE):
                assert ids_of(await waiting) == [f"to {queue}"]

    async def test_every_waiting_fetch_is_woken_when_there_is_enough_for_all(
        self, rig: Rig
    ) -> None:
        consumers = [await rig.consumer() for _ in range(5)]
        waiting = [asyncio.create_task(one.fetch(1, 2 * PATIENCE)) for one in consumers]
        await asyncio.sleep(MOMENT)
        await rig.publish(*"abcde")
        async with asyncio.timeout(PATIENCE):
            got = await asyncio.gather(*waiting)
        assert sorted(ids_of(one for batch in got for one in batch)) == list("abcde")

    async def test_a_waiting_fetch_is_woken_by_released_messages(self, rig: Rig) -> None:
        holder, [got] = await rig.hold("a")
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(MOMENT)
        await holder.settle([Release(got)])
        async with asyncio.timeout(PATIENCE):
            assert ids_of(await waiting) == ["a"]

    async def test_a_held_message_is_not_delivered_again(self, rig: Rig, broker: Broker) -> None:
        await rig.hold("a", "b")
        await broker.maintain()
        await expect_nothing(await rig.consumer())
        assert await rig.depth() == Depth(held=2)

    async def test_clients_that_fetch_at_once_never_share_a_delivery(self, rig: Rig) -> None:
        ids = [f"{n}" for n in range(300)]
        consumers = [await rig.consumer() for _ in range(4)]
        await rig.publish(*ids)
        taken: list[str] = []

        async def drain(consumer: Consumer) -> None:
            while got := await consumer.fetch(7, MOMENT):
                taken.extend(ids_of(got))

        await asyncio.gather(*map(drain, consumers))
        assert sorted(taken) == sorted(ids)

    @pytest.mark.parametrize("seed", range(3))
    async def test_cancelled_fetches_lose_nothing(self, rig: Rig, seed: int) -> None:
        consumer = await rig.consumer("q", "p")
        taken, ids = await self._cancel_many(rig, [consumer], random.Random(seed))
        rest = await rig.receive(consumer, len(ids) - len(taken))
        assert sorted(ids_of(taken + rest)) == sorted(ids)
        assert not await consumer.settle([done(one) for one in taken + rest])
        await expect_nothing(consumer)

    @pytest.mark.parametrize("seed", range(3))
    async def test_cancelled_fetches_lose_nothing_when_their_consumers_close(
        self, rig: Rig, seed: int
    ) -> None:
        consumers = [await rig.consumer("q", "p") for _ in range(4)]
        taken, ids = await self._cancel_many(rig, consumers, random.Random(seed))
        assert len(set(ids_of(taken))) == len(taken)
        for consumer in consumers:
            await consumer.close()
        assert sorted(await rig.finish(await rig.consumer("q", "p"), len(ids))) == sorted(ids)

    async def _cancel_many(
        self, rig: Rig, consumers: list[Consumer], chance: random.Random
    ) -> tuple[list[Delivery], list[str]]:
        """Fetch and cancel at random points while publishing; return deliveries and all ids."""
        ids = [f"{n}" for n in range(200)]
        taken: list[Delivery] = []

        async def publish() -> None:
            for one in ids:
                await rig.publish(one, queue=chance.choice("qp"))

        async def fetch(consumer: Consumer) -> None:
            for _ in range(60):
                task = asyncio.create_task(consumer.fetch(3, 2 * MOMENT))
                for _ in range(chance.randrange(20)):
                    await asyncio.sleep(0)
                await asyncio.sleep(chance.choice([0, 0, 0.0005, 0.002, 0.005]))
                task.cancel()
                try:
                    taken.extend(await task)
                except asyncio.CancelledError:
                    continue

        await asyncio.gather(publish(), *map(fetch, consumers))
        return taken, ids
