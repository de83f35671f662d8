"""Conformance tests of suspects: messages whose consumers crashed several times."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import SUSPECT
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Done, Release
from aiotaskq.testing.conformance.rig import (
    MOMENT,
    PATIENCE,
    BrokerSuite,
    Rig,
    done,
    envelope,
    expect_nothing,
    ids_of,
)


class SuspectTests(BrokerSuite):
    """A message with `SUSPECT` crashes is delivered alone, and before all others."""

    @pytest.mark.usefixtures("needs_order")
    async def test_a_suspect_is_delivered_first_and_alone_and_others_follow(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.publish("first", priority=9 if broker.traits.priorities else 0)
        await rig.crash("s", queue="p", body=b"\x00bang")
        await rig.publish("second", "third")
        assert await rig.depth("p") == Depth(ready=1)
        consumer = await rig.consumer("q", "p")
        [got] = await consumer.fetch(10, 0)
        assert (got.id, got.queue, got.body) == ("s", "p", b"\x00bang")
        assert (got.crashes, got.crash_note) == (SUSPECT, "killed")
        assert await rig.depth("p") == Depth(held=1)
        assert not await consumer.settle([Done(got)])
        assert ids_of(await consumer.fetch(10, 0)) == ["first", "second", "third"]
        assert not (await consumer.news()).suspects

    async def test_a_message_with_fewer_crashes_is_no_suspect(self, rig: Rig) -> None:
        await rig.crash("a", "b", times=SUSPECT - 1)
        assert ids_of(await (await rig.consumer()).fetch(10, 0)) == ["a", "b"]

    async def test_a_busy_consumer_gets_no_suspect_and_hears_of_it_in_the_news(
        self, rig: Rig
    ) -> None:
        busy, [held] = await rig.hold("held")
        assert not (await busy.news()).suspects
        other, [later] = await rig.hold("later")
        await rig.crash("s")
        await rig.publish("a", "b")
        assert ids_of(await busy.fetch(1, 0)) == ["a"]
        assert ids_of(await busy.fetch(10, 0)) == ["b"]
        assert ids_of(await busy.fetch(10, MOMENT)) == []
        assert (await busy.news()).suspects
        assert (await busy.news()).suspects  # for as long as the suspect waits
        idle = await rig.consumer()
        [got] = await idle.fetch(10, 0)
        assert got.id == "s"
        assert not (await busy.news()).suspects
        assert not await other.settle([Done(later)])
        assert not await busy.settle([Done(held)])
        assert not await idle.settle([Done(got)])

    async def test_a_consumer_that_has_settled_everything_gets_the_suspect(self, rig: Rig) -> None:
        busy, [one, two] = await rig.hold("one", "two")
        await rig.crash("s")
        assert not await busy.settle([Done(one)])
        await expect_nothing(busy)
        assert not await busy.settle([Done(two)])
        assert ids_of(await busy.fetch(10, 0)) == ["s"]

    async def test_a_suspect_does_not_end_the_waiting_fetch_of_a_busy_consumer(
        self, rig: Rig
    ) -> None:
        busy, _ = await rig.hold("held")
        await rig.crash("s")
        waiting = asyncio.create_task(busy.fetch(10, 2 * PATIENCE))
        await asyncio.sleep(MOMENT)
        assert not waiting.done()
        await rig.publish("a")
        async with asyncio.timeout(PATIENCE):
            assert ids_of(await waiting) == ["a"]

    async def test_the_waiting_fetch_of_an_idle_consumer_is_woken_for_a_suspect(
        self, rig: Rig
    ) -> None:
        await rig.crash("s", times=SUSPECT - 1)
        last = await rig.consumer()
        [got] = await rig.receive(last, 1)
        busy, _ = await rig.hold("held")
        passed_over = asyncio.create_task(busy.fetch(1, 4 * MOMENT))
        idle = await rig.consumer()
        waiting = asyncio.create_task(idle.fetch(10, 2 * PATIENCE))
        await asyncio.sleep(MOMENT)
        assert await rig.end(last) == 1
        async with asyncio.timeout(PATIENCE):
            [got] = await waiting
            assert ids_of(await passed_over) == []
        assert (got.id, got.crashes) == ("s", SUSPECT)

    @pytest.mark.usefixtures("needs_order")
    async def test_several_suspects_are_delivered_one_by_one(self, rig: Rig) -> None:
        await rig.crash(*"abc")
        await rig.publish("plain")
        first, second = await rig.consumer(), await rig.consumer()
        [a] = await first.fetch(10, 0)
        [b] = await second.fetch(10, 0)
        assert {a.id, b.id} < set("abc")
        assert (await second.news()).suspects
        assert not await first.settle([Done(a)])
        [c] = await first.fetch(10, 0)
        assert {a.id, b.id, c.id} == set("abc")
        assert not (await second.news()).suspects
        assert not await first.settle([Done(c)])
        assert await rig.finish(first, 1) == ["plain"]
        assert not await second.settle([Done(b)])
        assert await rig.depth() == Depth()

    async def test_suspects_of_other_queues_are_not_in_the_news(self, rig: Rig) -> None:
        await rig.crash("s", queue="p")
        busy, [held] = await rig.hold("held")
        assert not (await busy.news()).suspects
        assert not await busy.settle([Done(held)])
        await expect_nothing(busy)
        assert ids_of(await (await rig.consumer("q", "p")).fetch(10, 0)) == ["s"]

    async def test_a_message_stays_a_suspect_until_it_is_replaced(self, rig: Rig) -> None:
        await rig.crash("s", times=SUSPECT + 1)
        await rig.publish("a")
        consumer = await rig.consumer()
        [got] = await consumer.fetch(10, 0)
        assert (got.id, got.crashes) == ("s", SUSPECT + 1)
        assert not await consumer.settle([Release(got)])
        assert await rig.depth() == Depth(ready=2)
        [got] = await consumer.fetch(10, 0)
        assert (got.id, got.crashes) == ("s", SUSPECT + 1)
        await consumer.close()
        consumer = await rig.consumer()
        [got] = await consumer.fetch(10, 0)
        assert (got.id, got.crashes) == ("s", SUSPECT + 1)
        assert not await consumer.settle([Again(got, envelope("s"))])
        both = await consumer.fetch(10, 0)
        assert [(one.id, one.crashes) for one in both] == [("a", 0), ("s", 0)]
        assert not await consumer.settle([done(one) for one in both])

    async def test_suspects_are_counted_cancelled_purged_and_expired_like_others(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.crash("cancelled", "purged", "also purged")
        assert await rig.depth() == Depth(ready=3)
        busy, [held] = await rig.hold("held")
        await broker.cancel(["cancelled"])
        assert await broker.purge("q") in (2, 3)  # a broker may count the cancelled message
        assert not await busy.settle([Done(held)])
        await expect_nothing(busy)
        assert not (await busy.news()).suspects
        assert await rig.depth() == Depth()
        await rig.crash("late", expires_in=self.delay)
        await rig.harness.pass_time(self.delay + 0.1)
        consumer = await rig.consumer()
        if broker.traits.order:
            [got] = await consumer.fetch(10, 0)
        else:  # another waiting consumer may have held it for a moment
            [got] = await rig.receive(consumer, 1)
        assert (got.id, got.expired) == ("late", True)
