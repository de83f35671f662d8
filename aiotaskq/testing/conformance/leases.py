"""Conformance tests of leases that lapse, are renewed or are closed."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import Depth, Maintained
from aiotaskq.contract.settlement import Dead, Done, Release
from aiotaskq.errors import LeaseLost
from aiotaskq.testing.conformance.rig import (
    PATIENCE,
    BrokerSuite,
    Rig,
    done,
    expect_nothing,
    ids_of,
    maintain,
)
from aiotaskq.testing.conformance.settle import every_kind


class LeaseTests(BrokerSuite):
    """Lapsed, renewed and closed leases, and the messages held under them."""

    async def test_messages_of_a_lapsed_consumer_return_to_the_head_of_the_queue(
        self, rig: Rig
    ) -> None:
        await rig.publish(*"abcde")
        await rig.receive(await rig.consumer(), 3, limit=3)
        assert (await rig.lapse()).reclaimed == 3
        assert await rig.depth() == Depth(ready=5)
        got = await rig.receive(await rig.consumer(), 5)
        assert [(one.id, one.crashes) for one in got] == [
            ("a", 1),
            ("b", 1),
            ("c", 1),
            ("d", 0),
            ("e", 0),
        ]

    @pytest.mark.usefixtures("needs_leases")
    async def test_nothing_is_reclaimed_while_the_lease_lasts(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, [got] = await rig.hold("a")
        await rig.harness.pass_time(self.lease / 2)
        assert await maintain(broker) == Maintained()
        await expect_nothing(await rig.consumer())
        assert not await consumer.settle([Done(got)])

    @pytest.mark.usefixtures("needs_leases")
    async def test_a_waiting_fetch_is_woken_by_reclaimed_messages(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.hold("a")
        await rig.harness.pass_time(self.lease + 1.0)
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(0)
        await maintain(broker)
        async with asyncio.timeout(PATIENCE):
            [got] = await waiting
        assert (got.id, got.crashes) == ("a", 1)

    async def test_a_consumer_of_more_queues_gets_the_messages_of_a_lapsed_one(
        self, rig: Rig
    ) -> None:
        # All consumers of the rig have one name, as a restarted worker has that of the old one.
        await rig.hold("a")
        second = await rig.consumer()
        await expect_nothing(second)
        await rig.lapse()
        assert await rig.finish(await rig.consumer("p", "q"), 1) == ["a"]

    async def test_each_death_counts_one_crash_without_limit(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.publish("killer", body=b"\x00bang")
        for crashes in range(12):  # until the count has two digits
            [got] = await rig.receive(await rig.consumer(), 1)
            assert (got.id, got.body, got.crashes) == ("killer", b"\x00bang", crashes)
            assert await rig.lapse() == Maintained(reclaimed=1)
        consumer = await rig.consumer()
        [got] = await rig.receive(consumer, 1)
        assert not await consumer.settle([Dead(got, "it kills")])
        assert await rig.depth() == Depth(dead=1)
        [letter] = await broker.dead("q")
        assert (letter.id, letter.body, letter.crashes) == ("killer", b"\x00bang", 12)
        assert letter.reason == "it kills"

    async def test_maintain_counts_each_reclaimed_message(self, rig: Rig) -> None:
        await rig.hold("a", "b")
        assert await rig.lapse() == Maintained(reclaimed=2)
        assert await rig.depth() == Depth(ready=2)

    async def test_release_keeps_the_count_of_crashes(self, rig: Rig) -> None:
        await rig.hold("a")
        await rig.lapse()
        consumer = await rig.consumer()
        await consumer.settle([Release(one) for one in await rig.receive(consumer, 1)])
        [got] = await rig.receive(consumer, 1)
        assert got.crashes == 1

    @pytest.mark.usefixtures("needs_leases")
    async def test_a_renewed_lease_does_not_lapse(self, rig: Rig, broker: Broker) -> None:
        consumer, [got] = await rig.hold("a")
        for _ in range(3):
            await rig.harness.pass_time(self.lease * 0.7)
            assert await rig.renew(consumer)
            assert (await maintain(broker)).reclaimed == 0
        assert not await consumer.settle([Done(got)])
        assert await rig.depth() == Depth()

    async def test_a_lease_is_renewed_on_the_same_loop_as_well(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, _ = await rig.hold("a")
        lease = broker.lease(consumer.grant)
        assert await lease.renew()
        assert await lease.renew()
        await lease.close()
        await lease.close()
        assert await rig.depth() == Depth(held=1)

    async def test_a_lease_that_does_not_run_is_not_renewed(self, rig: Rig, broker: Broker) -> None:
        unopened = broker.consumer(["q"], name="suite", lease=self.lease)
        closed = await rig.consumer()
        await closed.close()
        for consumer in (unopened, closed):
            assert not await rig.renew(consumer)
        assert not list(await broker.consumers())

    async def test_a_lease_that_was_never_used_can_be_closed(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, [got] = await rig.hold("a")
        lease = broker.lease(consumer.grant)
        await lease.close()
        await lease.close()
        assert not await consumer.settle([Done(got)])

    async def test_an_idle_consumer_loses_its_lease_too(self, rig: Rig) -> None:
        consumer = await rig.consumer()
        await rig.lapse()
        assert not await rig.renew(consumer)
        with pytest.raises(LeaseLost):
            await consumer.fetch(1, 0)

    async def test_a_lost_lease_never_comes_back(self, rig: Rig) -> None:
        dead, held = await rig.hold("a", "b")
        await rig.lapse()
        before = await rig.depth()
        for _ in range(2):
            assert not await rig.renew(dead)
            with pytest.raises(LeaseLost):
                await dead.fetch(1, 0)
            for number in range(4):
                batch = [every_kind(one)[number] for one in held]
                assert ids_of(await dead.settle(batch)) == ["a", "b"]
        assert await rig.depth() == before == Depth(ready=2)
        consumer = await rig.consumer()
        got = await rig.receive(consumer, 2)
        assert ids_of(await dead.settle([Done(one) for one in held])) == ["a", "b"]
        await dead.close()
        await dead.close()
        assert await rig.depth() == Depth(held=2)
        assert not await consumer.settle([Done(one) for one in got])

    async def test_a_lost_lease_ends_a_waiting_fetch(self, rig: Rig) -> None:
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2.0))
        await asyncio.sleep(0)
        await rig.lapse()
        await rig.publish("a")

        async def go_on() -> None:
            assert not await waiting
            await consumer.fetch(1, 0)

        async with asyncio.timeout(PATIENCE):
            with pytest.raises(LeaseLost):
                await go_on()
        assert await rig.depth() == Depth(ready=1)

    @pytest.mark.usefixtures("needs_leases")
    async def test_a_late_renewal_holds_or_is_refused_but_never_both(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer, [got] = await rig.hold("a")
        await rig.harness.pass_time(self.lease + 1.0)
        alive = await rig.renew(consumer)
        await maintain(broker)
        assert bool(await consumer.settle([Done(got)])) is not alive
        assert await rig.depth() == (Depth() if alive else Depth(ready=1))

    @pytest.mark.usefixtures("needs_leases")
    async def test_several_brokers_may_maintain_at_once(self, rig: Rig) -> None:
        ids = [f"{n}" for n in range(100)]
        await rig.hold(*ids)
        await rig.harness.pass_time(self.lease + 1.0)
        brokers = [await rig.harness.broker() for _ in range(4)]
        rounds = await asyncio.gather(*map(maintain, brokers))
        assert sum(one.reclaimed for one in rounds) == 100
        got = await rig.receive(await rig.consumer(), 100)
        assert ids_of(got) == ids
        assert {one.crashes for one in got} == {1}

    async def test_thousands_of_messages_are_reclaimed_in_several_rounds(
        self, rig: Rig, broker: Broker
    ) -> None:
        ids = [f"{n}" for n in range(3000)]
        await rig.hold(*ids)
        assert (await rig.lapse()).reclaimed == 3000
        got = ids_of(await rig.receive(await rig.consumer(), 3000))
        if not broker.traits.order:
            got.sort(key=int)
        assert got == ids

    @pytest.mark.usefixtures("needs_order")
    async def test_closing_releases_held_messages_in_order(self, rig: Rig) -> None:
        await rig.publish(*"abcde")
        consumer = await rig.consumer()
        _, b, _ = await rig.receive(consumer, 3, limit=3)
        assert not await consumer.settle([Done(b)])
        await consumer.close()
        await consumer.close()
        assert await rig.depth() == Depth(ready=4)
        other = await rig.consumer()
        got = await rig.receive(other, 4)
        assert [(one.id, one.crashes) for one in got] == [(one, 0) for one in "acde"]
        assert not await other.settle([done(one) for one in got])

    async def test_closing_a_consumer_leaves_others_of_its_broker_alone(self, rig: Rig) -> None:
        broker = await rig.harness.broker()
        first = await rig.consumer(broker=broker)
        second = await rig.consumer(broker=broker)
        await rig.publish("a", "b")
        await rig.receive(first, 1, limit=1)
        [got] = await rig.receive(second, 1)
        await first.close()
        assert await rig.depth() == Depth(ready=1, held=1)
        assert not await second.settle([Done(got)])
        assert await rig.finish(second, 1) == ["a"]

    async def test_a_closed_consumer_does_not_lapse(self, rig: Rig, broker: Broker) -> None:
        consumer, _ = await rig.hold("a")
        await consumer.close()
        assert (await rig.lapse()).reclaimed == 0
        [got] = await rig.receive(await rig.consumer(), 1)
        assert got.crashes == 0

    async def test_each_consumer_has_an_id_of_its_own(self, rig: Rig) -> None:
        consumers = [await rig.consumer() for _ in range(3)]
        assert len({one.id for one in consumers}) == 3
