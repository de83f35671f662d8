"""Conformance tests of time: delays, due times and expiry, by the clock of the store."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Done, Release
from aiotaskq.testing.conformance.rig import (
    MOMENT,
    PATIENCE,
    TRIES,
    BrokerSuite,
    Rig,
    envelope,
    expect_nothing,
    ids_of,
    maintaining,
)


class ClockTests(BrokerSuite):
    """Delays and expiry go by the store's clock, which the tests move away from the local one."""

    async def test_a_waiting_fetch_is_woken_when_a_delayed_message_falls_due(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(MOMENT)
        await rig.publish("a", not_before=await rig.harness.now() + 1.0)
        await asyncio.sleep(MOMENT)
        assert not waiting.done()
        async with maintaining(broker), asyncio.timeout(PATIENCE):
            assert ids_of(await waiting) == ["a"]

    async def test_a_message_that_is_due_earlier_does_not_wait_for_one_stored_before_it(
        self, rig: Rig, broker: Broker
    ) -> None:
        """A waiting call is woken and waits for a shorter time, without any call of `maintain`."""
        consumer = await rig.consumer("q", "p")
        began = await rig.harness.now()
        await broker.publish([envelope("later", not_before=began + 2 * PATIENCE)])
        waiting = asyncio.create_task(consumer.fetch(5, 4 * PATIENCE))
        await asyncio.sleep(MOMENT)
        await broker.publish([envelope("earlier", queue="p", delay=2 * MOMENT)])
        async with asyncio.timeout(PATIENCE):
            assert ids_of(await waiting) == ["earlier"]
        assert await rig.harness.now() >= began + 2 * MOMENT

    async def test_a_waiting_fetch_returns_at_the_due_time(self, rig: Rig, broker: Broker) -> None:
        """One of several tries is punctual: a busy machine is late at some, hardly at all of them.

        A server that looks for finished waits ten times a second would be late each time.
        """
        consumer = await rig.consumer()
        late: list[float] = []
        while min(late[1:], default=1.0) >= 0.04:
            assert len(late) < TRIES, late
            due = await rig.harness.now() + 0.11
            await broker.publish([envelope(f"{len(late)}", not_before=due)])
            async with asyncio.timeout(PATIENCE):
                assert ids_of(await consumer.fetch(1, 2 * PATIENCE)) == [f"{len(late)}"]
            late.append(await rig.harness.now() - due)
        assert min(late) >= 0

    @pytest.mark.usefixtures("needs_clock")
    async def test_waiting_consumers_share_messages_that_fall_due_at_once(
        self, rig: Rig, broker: Broker
    ) -> None:
        """No call waits until it would have looked by itself, in one of several tries, as above."""
        consumers = [await rig.consumer() for _ in range(3)]
        ids = [f"{number}" for number in range(300)]
        late: list[float] = []
        while min(late, default=1.0) >= 3 * MOMENT:
            assert len(late) < TRIES, late
            waiting = [asyncio.create_task(one.fetch(100, 2 * PATIENCE)) for one in consumers]
            await asyncio.sleep(MOMENT)
            due = await rig.harness.now() + 2 * MOMENT
            await broker.publish([envelope(one, not_before=due) for one in ids])
            async with asyncio.timeout(PATIENCE):
                got = await asyncio.gather(*waiting)
            late.append(await rig.harness.now() - due)
            assert sorted(ids_of(one for batch in got for one in batch)) == sorted(ids)

    async def test_messages_due_at_once_are_delivered_by_priority_then_in_order(
        self, rig: Rig, broker: Broker
    ) -> None:
        due = await rig.harness.now() + self.delay
        levels = [0, 5, 9, 5, 0] if broker.traits.priorities else [0] * 5
        await broker.publish(
            [envelope(f"{n}", not_before=due, priority=level) for n, level in enumerate(levels)]
        )
        await rig.harness.pass_time(self.delay)
        got = await rig.receive(await rig.consumer(), 5)
        expected = sorted(range(5), key=lambda number: -levels[number])
        assert ids_of(got) == list(map(str, expected))

    @pytest.mark.usefixtures("needs_clock")
    async def test_thousands_of_messages_due_at_once_are_delivered_in_order(
        self, rig: Rig, broker: Broker
    ) -> None:
        due = await rig.harness.now() + self.delay
        await broker.publish([envelope(f"{n}", not_before=due) for n in range(2500)])
        await rig.harness.pass_time(self.delay)
        consumer = await rig.consumer()
        got = [*await consumer.fetch(10, 0), *await rig.receive(consumer, 2490)]
        assert ids_of(got) == [f"{n}" for n in range(2500)]
        assert not await consumer.settle([Done(one) for one in got])

    async def test_a_delayed_message_is_delivered_when_it_is_due(
        self, rig: Rig, broker: Broker
    ) -> None:
        now = await rig.harness.now()
        late, soon = now + self.delay + 3600.0, now + self.delay
        await broker.publish([envelope("late", not_before=late), envelope("now")])
        await broker.publish([envelope("soon", not_before=soon)])
        await broker.publish([envelope("past", not_before=now - 60.0)])
        consumer = await rig.consumer()
        await broker.maintain()
        assert await rig.finish(consumer, 2) == ["now", "past"]
        assert await rig.depth() == rig.countable(Depth(delayed=2))
        await rig.harness.pass_time(self.delay)
        assert await rig.finish(consumer, 1) == ["soon"]
        assert await rig.depth() == rig.countable(Depth(delayed=1))

    async def test_an_expired_message_is_delivered_with_a_mark(
        self, rig: Rig, broker: Broker
    ) -> None:
        """The mark goes by the store's clock: the worker reports the end of the message."""
        now = await rig.harness.now()
        soon = now + self.delay
        await broker.publish([envelope("over", expires_at=now - 1.0)])
        await broker.publish([envelope("soon", expires_at=soon)])
        await broker.publish([envelope("good", expires_at=now + 3600.0)])
        await broker.publish([envelope("plain")])
        await broker.publish([envelope("both", not_before=soon, expires_at=soon, priority=0)])
        await rig.harness.pass_time(self.delay + 0.1)
        await broker.maintain()
        consumer = await rig.consumer()
        got = await rig.receive(consumer, 5)
        assert {one.id for one in got if one.expired} == {"over", "soon", "both"}
        assert {one.id for one in got if not one.expired} == {"good", "plain"}

    async def test_a_message_that_expires_while_it_is_held_can_be_settled(self, rig: Rig) -> None:
        now = await rig.harness.now()
        consumer, [got] = await rig.hold("a", expires_at=now + self.delay)
        await rig.harness.pass_time(self.delay + 0.1)
        assert not await consumer.settle([Done(got)])
        assert await rig.depth() == Depth()

    async def test_relative_times_count_from_the_moment_of_storing_by_the_stores_clock(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.harness.pass_time(self.delay)  # now the local clock is behind that of the store
        before = await rig.harness.now()
        await broker.publish(
            [
                envelope("now", delay=0.0, expires_in=3600.0),
                envelope("soon", delay=self.delay),
                envelope("late", delay=self.delay + 3600.0),
                envelope("over", delay=self.delay / 2, expires_in=self.delay / 2),
                envelope("good", delay=self.delay, expires_in=self.delay + 3600.0),
            ]
        )
        assert await rig.depth() == rig.countable(Depth(ready=1, delayed=4))
        consumer = await rig.consumer()
        [got] = await rig.receive(consumer, 1)
        assert (got.id, got.expired) == ("now", False)
        assert got.expires_at is not None
        assert abs(got.expires_at - before - 3600.0) < PATIENCE
        await expect_nothing(consumer)
        await rig.harness.pass_time(self.delay)
        rest = {one.id: one for one in await rig.receive(consumer, 3)}
        assert {one.id: one.expired for one in rest.values()} == {
            "soon": False,
            "over": True,
            "good": False,
        }
        assert rest["soon"].expires_at is None
        assert await rig.depth() == rig.countable(Depth(delayed=1, held=4))
        assert not await consumer.settle([Done(got), *[Done(one) for one in rest.values()]])

    async def test_a_retry_may_carry_the_expiry_over(self, rig: Rig) -> None:
        due = await rig.harness.now() + self.delay * 3
        consumer, [a] = await rig.hold("a", expires_at=due)
        assert a.expires_at is not None
        assert abs(a.expires_at - due) < 0.001
        retry = envelope("a", delay=self.delay, expires_at=a.expires_at)
        assert not await consumer.settle([Again(a, retry)])
        assert await rig.depth() == rig.countable(Depth(delayed=1))
        await expect_nothing(consumer)
        await rig.harness.pass_time(self.delay)
        [a] = await rig.receive(consumer, 1)
        assert a.expires_at is not None
        assert abs(a.expires_at - due) < 0.001
        # Where time really passes, it may have expired on a busy machine.
        assert not a.expired or await rig.harness.now() >= due
        assert not await consumer.settle([Release(a)])
        await rig.harness.pass_time(self.delay * 2 + MOMENT)
        [a] = await rig.receive(consumer, 1)
        assert a.expired
        fresh = envelope("a", delay=self.delay, expires_in=self.delay + 3600.0)
        assert not await consumer.settle([Again(a, fresh)])
        await rig.harness.pass_time(self.delay)
        [a] = await rig.receive(consumer, 1)
        assert not a.expired
        assert not await consumer.settle([Done(a)])
