"""Conformance tests of `Lease.end` and `Broker.consumers`: dead and living consumers."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import Depth, Maintained
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.errors import LeaseLost
from aiotaskq.testing.conformance.rig import (
    MOMENT,
    PATIENCE,
    BrokerSuite,
    Rig,
    envelope,
    ids_of,
    maintain,
)

NOTE = "killed by signal 9 (SIGKILL)\nwith 512 MiB: grüße 'x' {y} %s \\"


class LeaseEndTests(BrokerSuite):
    """`Lease.end`, called by an observer of the death of a consumer's process."""

    @pytest.mark.usefixtures("needs_leases")
    async def test_messages_of_an_ended_consumer_are_back_at_once_with_the_note(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.publish(*"abcde")
        dead = await rig.consumer()
        held = await rig.receive(dead, 3, limit=3)
        assert [one.crash_note for one in held] == [""] * 3
        assert not await dead.settle([Done(held[1])])
        assert await rig.end(dead, NOTE) == 2
        assert await rig.depth() == Depth(ready=4)
        got = await (await rig.consumer()).fetch(10, 0)
        assert [(one.id, one.crashes, one.crash_note) for one in got] == [
            ("a", 1, NOTE),
            ("c", 1, NOTE),
            ("d", 0, ""),
            ("e", 0, ""),
        ]
        assert await maintain(broker) == Maintained()

    @pytest.mark.usefixtures("needs_leases")
    async def test_an_ended_consumer_never_lives_again(self, rig: Rig) -> None:
        dead, [a, b] = await rig.hold("a", "b")
        assert await rig.end(dead) == 2
        for _ in range(2):
            assert not await rig.renew(dead)
            with pytest.raises(LeaseLost):
                await dead.fetch(1, 0)
            late: list[Settlement] = [Release(a), Again(b, envelope("b")), Done(a), Dead(b, "late")]
            assert ids_of(await dead.settle(late)) == ["a", "b", "a", "b"]
        await dead.close()
        assert await rig.depth() == Depth(ready=2)
        got = await (await rig.consumer()).fetch(10, 0)
        assert [(one.id, one.crashes) for one in got] == [("a", 1), ("b", 1)]

    @pytest.mark.usefixtures("needs_leases")
    async def test_ending_a_consumer_that_is_over_changes_nothing(self, rig: Rig) -> None:
        ended, _ = await rig.hold("a")
        assert await rig.end(ended, "first") == 1
        assert await rig.end(ended, "second") == 0
        closed, _ = await rig.hold("b", queue="p")
        await closed.close()
        assert await rig.end(closed) == 0
        lapsed, _ = await rig.hold("c", queue="r")
        await rig.lapse()
        assert await rig.end(lapsed, "late") == 0
        consumer = await rig.consumer("q", "p", "r")
        got = await rig.receive(consumer, 3)
        assert [(one.id, one.crashes) for one in got] == [("a", 1), ("b", 0), ("c", 1)]
        assert [one.crash_note for one in got[:2]] == ["first", ""]
        assert got[2].crash_note not in ("", "late")  # `maintain` wrote a note of its own
        assert await rig.end(ended) == await rig.end(closed) == await rig.end(lapsed) == 0
        assert not await consumer.settle([Done(one) for one in got])

    @pytest.mark.usefixtures("needs_leases")
    async def test_the_last_note_stays_until_the_message_is_replaced(self, rig: Rig) -> None:
        first, _ = await rig.hold("a")
        await rig.end(first, "first")
        second = await rig.consumer()
        [got] = await rig.receive(second, 1)
        assert not await second.settle([Release(got)])
        [got] = await rig.receive(second, 1)
        assert (got.crashes, got.crash_note) == (1, "first")
        await rig.end(second, "second")
        consumer = await rig.consumer()
        [got] = await rig.receive(consumer, 1)
        assert (got.crashes, got.crash_note) == (2, "second")
        assert not await consumer.settle([Again(got, envelope("a"))])
        [got] = await rig.receive(consumer, 1)
        assert (got.crashes, got.crash_note) == (0, "")

    @pytest.mark.usefixtures("needs_leases")
    async def test_ending_wakes_waiting_fetches_and_ends_that_of_the_dead_consumer(
        self, rig: Rig
    ) -> None:
        dead, _ = await rig.hold("a")
        own = asyncio.create_task(dead.fetch(1, 2.0))
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(MOMENT)
        assert await rig.end(dead) == 1
        async with asyncio.timeout(PATIENCE):
            [got] = await waiting  # though nobody calls `maintain`
            [outcome] = await asyncio.gather(own, return_exceptions=True)
        assert (got.id, got.crashes) == ("a", 1)
        assert isinstance(outcome, LeaseLost) or outcome == []

    @pytest.mark.usefixtures("needs_leases")
    async def test_ending_reclaims_from_all_queues_and_leaves_other_consumers_alone(
        self, rig: Rig
    ) -> None:
        client = await rig.harness.broker()
        dead = await rig.consumer("p", "q", broker=client)
        other = await rig.consumer("p", "q", broker=client)
        await rig.publish("p1", "p2", queue="p")
        await rig.publish("q1")
        assert ids_of(await rig.receive(dead, 1)) == ["p1"]
        [kept] = await rig.receive(other, 1)
        assert ids_of(await rig.receive(dead, 1)) == ["q1"]
        assert await rig.end(dead) == 2
        assert ids_of(await rig.receive(await rig.consumer("q", "p"), 2)) == ["q1", "p1"]
        assert await rig.renew(other)
        assert not await other.settle([Done(kept)])

    @pytest.mark.usefixtures("needs_leases")
    async def test_thousands_of_messages_of_an_ended_consumer_return_in_order(
        self, rig: Rig, broker: Broker
    ) -> None:
        ids = [f"{n}" for n in range(3000)]
        dead, _ = await rig.hold(*ids)
        at_once = await rig.end(dead)
        assert 0 < at_once <= 3000
        assert (await rig.depth()).ready >= at_once
        assert at_once + (await maintain(broker)).reclaimed == 3000
        got = await rig.receive(await rig.consumer(), 3000)
        assert ids_of(got) == ids
        assert {(one.crashes, one.crash_note) for one in got} == {(1, "killed")}

    @pytest.mark.usefixtures("needs_leases")
    async def test_a_crash_that_several_clients_notice_is_counted_once(self, rig: Rig) -> None:
        ids = [f"{n}" for n in range(50)]
        dead, _ = await rig.hold(*ids)
        await rig.harness.pass_time(self.lease + 1.0)
        brokers = [await rig.harness.broker() for _ in range(2)]
        ended, rounds = await asyncio.gather(
            asyncio.gather(rig.end(dead), rig.end(dead)), asyncio.gather(*map(maintain, brokers))
        )
        assert sum(ended) + sum(one.reclaimed for one in rounds) == 50
        got = await rig.receive(await rig.consumer(), 50)
        assert ids_of(got) == ids
        assert {one.crashes for one in got} == {1}

    @pytest.mark.usefixtures("needs_leases")
    async def test_a_lapsed_lease_leaves_a_note(self, rig: Rig) -> None:
        await rig.hold("a")
        await rig.lapse()
        [got] = await rig.receive(await rig.consumer(), 1)
        assert got.crashes == 1
        assert got.crash_note

    @pytest.mark.usefixtures("needs_leases")
    @pytest.mark.parametrize("times", [1, 2])
    async def test_no_lease_lapses_because_the_server_stood_still(
        self, rig: Rig, times: int
    ) -> None:
        if not rig.harness.can_stall:
            pytest.skip(f"{type(rig.harness).__name__}.can_stall is False")
        client = await rig.harness.broker()
        consumers = [await rig.consumer(broker=client) for _ in range(3)]
        await rig.publish(*"abc")
        held = [await rig.receive(one, 1, limit=1) for one in consumers]
        for one in consumers:
            assert await rig.renew(one)
        for _ in range(times):  # once more, before any lease is renewed
            await rig.harness.stall(self.lease + 1.0)
            assert (await maintain(client)).reclaimed == 0
        for consumer, [got] in zip(consumers, held, strict=True):
            assert await rig.renew(consumer)
            assert not await consumer.settle([Done(got)])


class ConsumerListTests(BrokerSuite):
    """`Broker.consumers`: the consumers whose leases run."""

    async def test_consumers_with_running_leases_are_listed_with_their_own_data(
        self, rig: Rig, broker: Broker
    ) -> None:
        about = b'{"name": "w"}\n\x00\xff'
        assert not list(await broker.consumers())
        first = await rig.consumer("q", "p", about=about)
        second = await rig.consumer("p")
        unopened = broker.consumer(["q"], name="suite", lease=self.lease, about=b"x")
        told = {one.id: one for one in await broker.consumers()}
        assert told.keys() == {first.id, second.id}
        assert (told[first.id].queues, told[first.id].about) == (("q", "p"), about)
        assert (told[second.id].queues, told[second.id].about) == (("p",), b"")
        await unopened.close()
        await first.close()
        assert ids_of(await broker.consumers()) == [second.id]

    @pytest.mark.usefixtures("needs_leases")
    async def test_dead_consumers_are_not_listed(self, rig: Rig, broker: Broker) -> None:
        ended, _ = await rig.hold("a")
        lapsed = await rig.consumer()
        assert await rig.end(ended) == 1
        assert ids_of(await broker.consumers()) == [lapsed.id]
        await rig.lapse()
        assert not list(await broker.consumers())
        alive = await rig.consumer()
        await rig.harness.pass_time(self.lease * 0.7)
        assert await rig.renew(alive)
        await rig.harness.pass_time(self.lease * 0.7)
        assert ids_of(await broker.consumers()) == [alive.id]

    async def test_a_grant_names_the_consumer(self, rig: Rig) -> None:
        consumer = await rig.consumer("q", "p")
        grant = consumer.grant
        assert (grant.consumer, grant.queues, grant.seconds) == (
            consumer.id,
            ("q", "p"),
            self.lease,
        )
