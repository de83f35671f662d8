"""Conformance tests of counting and purging messages: `Broker.depth` and `Broker.purge`."""

from __future__ import annotations

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.testing.conformance.rig import (
    BrokerSuite,
    Rig,
    envelope,
    ids_of,
)


class QueueTests(BrokerSuite):
    """`Broker.depth` and `Broker.purge`."""

    async def test_depth_counts_every_state_of_every_queue(self, rig: Rig, broker: Broker) -> None:
        now = await rig.harness.now()
        await rig.publish(*(f"p{n}" for n in range(5)), queue="p")
        holder = await rig.consumer("p")
        [first, second, third] = await rig.receive(holder, 3, limit=3)
        await holder.settle([Dead(first, "bad"), Done(second)])
        await rig.publish("p5", "p6", queue="p", not_before=now + 3600.0)
        await rig.publish("q0", queue="q")
        assert await broker.depth() == {
            "p": rig.countable(Depth(ready=2, delayed=2, held=1, dead=1)),
            "q": Depth(ready=1),
        }
        await holder.settle([Again(third, envelope("p2", queue="p", not_before=now + 3600.0))])
        assert await rig.depth("p") == rig.countable(Depth(ready=2, delayed=3, held=0, dead=1))

    async def test_a_queue_without_messages_is_not_counted(self, rig: Rig, broker: Broker) -> None:
        assert await broker.depth() == {}
        consumer, [got] = await rig.hold("a")
        await consumer.settle([Done(got)])
        assert await broker.depth() == {}

    @pytest.mark.usefixtures("needs_delayed_counts")
    async def test_purge_drops_waiting_messages_and_keeps_held_and_dead_ones(
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
        assert ids_of(await broker.dead("q")) == ["bad"]

    async def test_every_field_of_an_envelope_is_kept(self, rig: Rig, broker: Broker) -> None:
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
