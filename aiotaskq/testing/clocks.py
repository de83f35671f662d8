"""The part of the broker suite about time: what waits, what expires, and by whose clock."""

from __future__ import annotations

import asyncio

from aiotaskq.message import Again, Depth, Done, Release
from aiotaskq.protocols import Broker
from aiotaskq.testing.rig import (
    MOMENT,
    PATIENCE,
    BrokerSuite,
    Rig,
    envelope,
    names,
    nothing,
    tending,
)


class ClockTests(BrokerSuite):
    """Delays and expiry go by the store's clock, which tests set apart from all others."""

    async def test_a_waiting_fetch_is_woken_by_a_delayed_one_that_falls_due(
        self, rig: Rig, broker: Broker
    ) -> None:
        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(MOMENT)
        await rig.publish("a", not_before=await rig.harness.now() + 1.0)
        await asyncio.sleep(MOMENT)
        assert not waiting.done()
        async with tending(broker), asyncio.timeout(PATIENCE):
            assert names(await waiting) == ["a"]

    async def test_a_delayed_one_waits_until_it_is_due(self, rig: Rig, broker: Broker) -> None:
        now = await rig.harness.now()
        late, soon = now + self.delay + 3600.0, now + self.delay
        await broker.publish([envelope("late", not_before=late), envelope("now")])
        await broker.publish([envelope("soon", not_before=soon)])
        await broker.publish([envelope("past", not_before=now - 60.0)])
        consumer = await rig.consumer()
        await broker.tend()
        assert await rig.finish(consumer, 2) == ["now", "past"]
        assert await rig.depth() == Depth(delayed=2)
        await rig.harness.pass_time(self.delay)
        assert await rig.finish(consumer, 1) == ["soon"]
        assert await rig.depth() == Depth(delayed=1)

    async def test_an_expired_one_is_handed_out_as_such(self, rig: Rig, broker: Broker) -> None:
        """So that its end can be told, by the store's clock and not by the worker's."""
        now = await rig.harness.now()
        soon = now + self.delay
        await broker.publish([envelope("over", expires_at=now - 1.0)])
        await broker.publish([envelope("soon", expires_at=soon)])
        await broker.publish([envelope("good", expires_at=now + 3600.0)])
        await broker.publish([envelope("plain")])
        await broker.publish([envelope("both", not_before=soon, expires_at=soon, priority=0)])
        await rig.harness.pass_time(self.delay + 0.1)
        await broker.tend()
        consumer = await rig.consumer()
        got = await rig.receive(consumer, 5)
        assert {one.id for one in got if one.expired} == {"over", "soon", "both"}
        assert {one.id for one in got if not one.expired} == {"good", "plain"}

    async def test_one_that_expires_while_held_can_still_be_settled(self, rig: Rig) -> None:
        now = await rig.harness.now()
        consumer, [got] = await rig.hold("a", expires_at=now + self.delay)
        await rig.harness.pass_time(self.delay + 0.1)
        assert not await consumer.settle([Done(got)])
        assert await rig.depth() == Depth()

    async def test_seconds_count_from_the_storing_by_the_stores_clock(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.harness.pass_time(self.delay)  # now this process is behind the store
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
        assert await rig.depth() == Depth(ready=1, delayed=4)
        consumer = await rig.consumer()
        [got] = await rig.receive(consumer, 1)
        assert (got.id, got.expired) == ("now", False)
        assert got.expires_at is not None
        assert abs(got.expires_at - before - 3600.0) < PATIENCE
        await nothing(consumer)
        await rig.harness.pass_time(self.delay)
        rest = {one.id: one for one in await rig.receive(consumer, 3)}
        assert {one.id: one.expired for one in rest.values()} == {
            "soon": False,
            "over": True,
            "good": False,
        }
        assert rest["soon"].expires_at is None
        assert await rig.depth() == Depth(delayed=1, held=4)
        assert not await consumer.settle([Done(got), *[Done(one) for one in rest.values()]])

    async def test_a_retry_may_carry_the_expiry_over(self, rig: Rig) -> None:
        due = await rig.harness.now() + self.delay * 2
        consumer, [a] = await rig.hold("a", expires_at=due)
        assert a.expires_at is not None
        assert abs(a.expires_at - due) < 0.001
        retry = envelope("a", delay=self.delay, expires_at=a.expires_at)
        assert not await consumer.settle([Again(a, retry)])
        assert await rig.depth() == Depth(delayed=1)
        await nothing(consumer)
        await rig.harness.pass_time(self.delay)
        [a] = await rig.receive(consumer, 1)
        assert a.expires_at is not None
        assert abs(a.expires_at - due) < 0.001
        assert not a.expired
        assert not await consumer.settle([Release(a)])
        await rig.harness.pass_time(self.delay + MOMENT)
        [a] = await rig.receive(consumer, 1)
        assert a.expired
        fresh = envelope("a", delay=self.delay, expires_in=self.delay + 3600.0)
        assert not await consumer.settle([Again(a, fresh)])
        await rig.harness.pass_time(self.delay)
        [a] = await rig.receive(consumer, 1)
        assert not a.expired
        assert not await consumer.settle([Done(a)])
