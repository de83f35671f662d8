"""The conformance suite of a broker: one test or more for each sentence of `contract.broker`.

A test is skipped only by a trait, and only here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.testing.cancelling import CancelTests
from aiotaskq.testing.clocks import ClockTests
from aiotaskq.testing.deaths import EndTests, RosterTests
from aiotaskq.testing.leases import LeaseTests, SettlementTests
from aiotaskq.testing.letters import LetterTests
from aiotaskq.testing.outages import OutageTests
from aiotaskq.testing.publishing import PublishTests, UniqueTests
from aiotaskq.testing.rig import (
    MOMENT,
    PATIENCE,
    BrokerHarness,
    BrokerSuite,
    Rig,
    done,
    envelope,
    names,
    needs,
    nothing,
)
from aiotaskq.testing.schedules import ScheduleTests
from aiotaskq.testing.suspects import SuspectTests

__all__ = ["BrokerConformance", "BrokerHarness"]


class FetchTests(BrokerSuite):
    """What is handed out, in what order, and when."""

    async def test_a_limit_far_above_what_is_there_takes_what_is_there(self, rig: Rig) -> None:
        consumer = await rig.consumer()
        for count in (2500, 1000, 1):
            await rig.publish(*map(str, range(count)))
            got = list(await consumer.fetch(10_000, 0))
            assert sorted(one.id for one in got) == sorted(map(str, range(count)))
            assert not await consumer.settle([done(one) for one in got])
        assert not await consumer.fetch(10_000, 0)

    async def test_no_more_than_the_limit_is_taken(self, rig: Rig) -> None:
        await rig.publish(*"abcde")
        consumer = await rig.consumer()
        assert names(await rig.receive(consumer, 3, limit=3)) == ["a", "b", "c"]
        assert len(await consumer.fetch(1, 1.0)) == 1
        assert await rig.depth() == Depth(ready=1, held=4)

    async def test_one_call_takes_all_that_is_due_up_to_the_limit(self, rig: Rig) -> None:
        await rig.publish(*"abcde")
        consumer = await rig.consumer()
        assert names(await consumer.fetch(4, PATIENCE)) == ["a", "b", "c", "d"]
        assert names(await consumer.fetch(4, PATIENCE)) == ["e"]

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
        await nothing(await rig.consumer("ours"))
        assert await rig.depth("theirs") == Depth(ready=1)

    async def test_higher_priorities_come_first_then_older_ones(
        self, rig: Rig, broker: Broker
    ) -> None:
        needs(broker, "priorities")
        levels = [0, 9, 5, 0, 9, 1, 5, 8]
        await broker.publish([envelope(f"{n}", priority=p) for n, p in enumerate(levels)])
        got = await rig.receive(await rig.consumer(), len(levels))
        assert names(got) == ["1", "4", "7", "2", "6", "5", "0", "3"]
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
        assert names(got) == expected
        assert [one.queue for one in got] == [one[0] for one in expected]
        assert not await consumer.settle([done(one) for one in got])
        assert await rig.finish(consumer, 1) == [f"{third}2"]

    async def test_an_order_holds_for_one_call_only(self, rig: Rig) -> None:
        for queue in "ab":
            await rig.publish(*(f"{queue}{number}" for number in range(5)), queue=queue)
        consumer = await rig.consumer("a", "b")
        got: list[str] = []
        for order in (("b", "a"), None, ["a", "b"], None, ("b", "a")):
            got += names(await consumer.fetch(1, PATIENCE, order=order))
        assert got == ["b0", "a0", "a1", "a2", "b1"]

    @pytest.mark.usefixtures("ordered")
    async def test_in_another_order_suspects_come_before_all_others_as_well(self, rig: Rig) -> None:
        await rig.crash("bad a", queue="a")
        await rig.crash("bad b", queue="b")
        await rig.publish("good a", queue="a")
        await rig.publish("good b", queue="b")
        consumer = await rig.consumer("a", "b")
        got: list[str] = []
        for _ in range(3):
            taken = await consumer.fetch(5, PATIENCE, order=("b", "a"))
            got += names(taken)
            assert not await consumer.settle([done(one) for one in taken])
        assert got == ["bad b", "bad a", "good b", "good a"]

    async def test_a_waiting_fetch_in_another_order_hears_of_every_queue(self, rig: Rig) -> None:
        consumer = await rig.consumer("a", "b")
        for queue in "abba":
            waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE, order=("b", "a")))
            await asyncio.sleep(MOMENT)
            await rig.publish(f"to {queue}", queue=queue)
            async with asyncio.timeout(PATIENCE):
                assert names(await waiting) == [f"to {queue}"]

    async def test_a_call_that_was_cancelled_in_one_order_loses_nothing_to_another(
        self, rig: Rig
    ) -> None:
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
                got += names(await task)
        got += names(await rig.receive(consumer, len(ids) - len(got)))
        assert sorted(got) == sorted(ids)

    async def test_without_a_wait_it_never_blocks(self, rig: Rig) -> None:
        consumer = await rig.consumer("q", "p")
        async with asyncio.timeout(PATIENCE):
            for _ in range(20):
                assert not await consumer.fetch(10, 0)

    async def test_an_empty_answer_comes_when_the_wait_is_over(self, rig: Rig) -> None:
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
                assert names(await waiting) == [f"to {queue}"]

    async def test_every_waiting_fetch_is_woken_when_there_is_enough_for_all(
        self, rig: Rig
    ) -> None:
        consumers = [await rig.consumer() for _ in range(5)]
        waiting = [asyncio.create_task(one.fetch(1, 2 * PATIENCE)) for one in consumers]
        await asyncio.sleep(MOMENT)
        await rig.publish(*"abcde")
        async with asyncio.timeout(PATIENCE):
            got = await asyncio.gather(*waiting)
        assert sorted(names(one for batch in got for one in batch)) == list("abcde")

    async def test_a_waiting_fetch_is_woken_by_what_others_give_back(self, rig: Rig) -> None:
        holder, [got] = await rig.hold("a")
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(MOMENT)
        await holder.settle([Release(got)])
        async with asyncio.timeout(PATIENCE):
            assert names(await waiting) == ["a"]

    async def test_what_is_held_is_not_handed_out_again(self, rig: Rig, broker: Broker) -> None:
        await rig.hold("a", "b")
        await broker.maintain()
        await nothing(await rig.consumer())
        assert await rig.depth() == Depth(held=2)

    async def test_clients_that_fetch_at_once_never_share_a_delivery(self, rig: Rig) -> None:
        ids = [f"{n}" for n in range(300)]
        consumers = [await rig.consumer() for _ in range(4)]
        await rig.publish(*ids)
        taken: list[str] = []

        async def drain(consumer: Consumer) -> None:
            while got := await consumer.fetch(7, MOMENT):
                taken.extend(names(got))

        await asyncio.gather(*map(drain, consumers))
        assert sorted(taken) == sorted(ids)

    @pytest.mark.parametrize("seed", range(3))
    async def test_cancelled_fetches_lose_nothing_of_their_own(self, rig: Rig, seed: int) -> None:
        consumer = await rig.consumer("q", "p")
        taken, ids = await self._cancel_many(rig, [consumer], random.Random(seed))
        rest = await rig.receive(consumer, len(ids) - len(taken))
        assert sorted(names(taken + rest)) == sorted(ids)
        assert not await consumer.settle([done(one) for one in taken + rest])
        await nothing(consumer)

    @pytest.mark.parametrize("seed", range(3))
    async def test_cancelled_fetches_lose_nothing_when_they_close(
        self, rig: Rig, seed: int
    ) -> None:
        consumers = [await rig.consumer("q", "p") for _ in range(4)]
        taken, ids = await self._cancel_many(rig, consumers, random.Random(seed))
        assert len(set(names(taken))) == len(taken)
        for consumer in consumers:
            await consumer.close()
        assert sorted(await rig.finish(await rig.consumer("q", "p"), len(ids))) == sorted(ids)

    async def _cancel_many(
        self, rig: Rig, consumers: list[Consumer], chance: random.Random
    ) -> tuple[list[Delivery], list[str]]:
        """Fetch and cancel at random points while publishing; return what was received."""
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


class QueueTests(BrokerSuite):
    """Counting and purging."""

    async def test_depth_counts_every_state_of_every_queue(self, rig: Rig, broker: Broker) -> None:
        now = await rig.harness.now()
        await rig.publish(*(f"p{n}" for n in range(5)), queue="p")
        holder = await rig.consumer("p")
        [first, second, third] = await rig.receive(holder, 3, limit=3)
        await holder.settle([Dead(first, "bad"), Done(second)])
        await rig.publish("p5", "p6", queue="p", not_before=now + 3600.0)
        await rig.publish("q0", queue="q")
        assert await broker.depth() == {
            "p": rig.told(Depth(ready=2, delayed=2, held=1, dead=1)),
            "q": Depth(ready=1),
        }
        await holder.settle([Again(third, envelope("p2", queue="p", not_before=now + 3600.0))])
        assert await rig.depth("p") == rig.told(Depth(ready=2, delayed=3, held=0, dead=1))

    async def test_a_queue_without_messages_is_not_counted(self, rig: Rig, broker: Broker) -> None:
        assert await broker.depth() == {}
        consumer, [got] = await rig.hold("a")
        await consumer.settle([Done(got)])
        assert await broker.depth() == {}

    @pytest.mark.usefixtures("counting")
    async def test_purge_drops_what_waits_and_spares_the_held_and_the_dead(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, [held, bad] = await rig.hold("held", "bad")
        await consumer.settle([Dead(bad, "bad")])
        await rig.publish("a", "b", "c")
        await rig.publish("d", not_before=await rig.harness.now() + self.delay)
        await rig.publish("other", queue="p")
        assert await broker.purge("q") == 4
        assert await broker.purge("q") == 0
        assert await broker.purge("no such queue") == 0
        assert await broker.depth() == {"q": Depth(held=1, dead=1), "p": Depth(ready=1)}
        await rig.harness.pass_time(self.delay)
        await broker.maintain()
        assert not await consumer.settle([Release(held)])
        assert await rig.finish(consumer, 1) == ["held"]
        assert names(await broker.dead("q")) == ["bad"]

    async def test_an_envelope_of_many_fields_is_kept_whole(self, rig: Rig, broker: Broker) -> None:
        now = await rig.harness.now()
        whole = Envelope(
            id="a",
            queue="q",
            body=b"x",
            not_before=now - 1.0,
            expires_at=now + 3600.0,
            unique=broker.traits.unique,
            priority=7 if broker.traits.priorities else 0,
        )
        await broker.publish([whole])
        [got] = await rig.receive(await rig.consumer(), 1)
        assert (got.id, got.queue, got.body) == ("a", "q", b"x")
        assert got.priority == whole.priority


class BrokerConformance(
    PublishTests,
    UniqueTests,
    ClockTests,
    FetchTests,
    SuspectTests,
    SettlementTests,
    CancelTests,
    LetterTests,
    QueueTests,
    LeaseTests,
    EndTests,
    RosterTests,
    ScheduleTests,
    OutageTests,
):
    """Everything that a broker must do. Derive from it and give the fixture `harness`.

    The class attributes `lease` and `delay` are seconds; lower them where the harness's
    `pass_time` really sleeps.
    """
