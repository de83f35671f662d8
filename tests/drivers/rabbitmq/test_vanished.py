"""Queues that vanish, because an operator deletes them: under a consumer, and from the list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from pamqp.commands import Queue

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.settlement import Again, Done
from aiotaskq.drivers.rabbitmq import RabbitBroker, queue_watch
from aiotaskq.drivers.rabbitmq.channel import AmqpRefused
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.transport import RabbitTransport, connect
from aiotaskq.drivers.rabbitmq.url import parse_url

PATIENCE = 30.0


def envelope(name: str, queue: str = "q") -> Envelope:
    return Envelope(id=name, queue=queue, body=b"x")


@pytest.fixture
async def operator(url: str) -> AsyncIterator[RabbitTransport]:
    transport = await connect(parse_url(url))
    yield transport
    await transport.close()


async def exists(operator: RabbitTransport, queue: str) -> bool:
    channel = await operator.open_channel()
    try:
        await channel.call(Queue.Declare(queue=queue, passive=True))
    except AmqpRefused:
        return False
    await channel.close()
    return True


async def test_all_messages_arrive_after_a_queue_vanished_under_its_consumer(
    broker: RabbitBroker, prefix: str, operator: RabbitTransport
) -> None:
    names = RabbitNames(prefix, "quorum")
    deleting = await operator.open_channel()
    consumer = broker.consumer(["q", "p"], name="w", lease=60.0)
    await consumer.open()
    for turn in range(5):
        await broker.publish([envelope("held", "p"), envelope("done", "p")])
        held, settled = await consumer.fetch(2, PATIENCE)
        waiting = asyncio.create_task(consumer.fetch(10, 1.0))
        while not consumer._loop._waiting:
            await asyncio.sleep(0.01)
        await deleting.call(Queue.Delete(queue=names.ready("q")))
        assert not await waiting
        ids = {f"{turn} {number}" for number in range(100)}
        for one in ids:
            await broker.publish([envelope(one)])
        got: set[str] = set()
        async with asyncio.timeout(PATIENCE):
            while got != ids:
                some = await consumer.fetch(10, 1.0)
                assert not await consumer.settle([Done(one) for one in some])
                got |= {one.id for one in some}
        # They arrived on an earlier channel.
        assert consumer.holds == {"p": 2}
        assert not await consumer.settle([Done(settled), Again(held, envelope("held", "p"))])
        [again] = await consumer.fetch(10, PATIENCE)
        assert not await consumer.settle([Done(again)])
    assert not await consumer.fetch(1, 0.05)
    assert len(consumer._loop._earlier) <= 1  # others were closed
    await consumer.close()
    assert not await broker.depth()


async def test_a_deleted_queue_stays_deleted_until_it_is_used(
    broker: RabbitBroker, prefix: str, operator: RabbitTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_watch, "_MISSING_FOR", 0.0)
    names = RabbitNames(prefix, "quorum")
    await broker.publish([envelope("a", "gone"), envelope("b", "there")])
    channel = await operator.open_channel()
    for name in (names.ready("gone"), names.suspects("gone"), names.dead("gone")):
        await channel.call(Queue.Delete(queue=name))
    assert set(await broker.depth()) == {"there"}
    await broker.maintain()
    assert set(await broker._membership.queues()) == {"there"}
    assert not await broker.purge("gone")
    assert not await broker.dead("gone")
    assert not await exists(operator, names.ready("gone"))
    other = broker.clone()
    await other.open()
    await other.publish([envelope("c", "gone")])
    assert (await broker.depth())["gone"].ready == 1
    await other.close()


async def test_a_queue_that_is_empty_and_unused_for_long_is_forgotten(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.publish([envelope("a", queue) for queue in ("idle", "served", "full")])
    served = broker.consumer(["served"], name="w", lease=60.0)
    await served.open()
    [got] = await served.fetch(1, PATIENCE)
    assert not await served.settle([Done(got)])
    assert await broker.purge("idle") == 1
    await broker.maintain()
    assert set(await broker._membership.queues()) == {"idle", "served", "full"}
    monkeypatch.setattr(queue_watch, "_UNUSED_FOR", 0.0)
    await broker.maintain()
    assert set(await broker._membership.queues()) == {"served", "full"}
    late = broker.clone()
    await late.open()
    assert set(await late._membership.queues()) == {"served", "full"}, "it is so for all"
    await late.publish([envelope("b", "idle")])
    assert set(await broker.depth()) == {"idle", "full"}
    await late.close()
    await served.close()


async def test_a_queue_that_was_forgotten_while_somebody_sent_to_it_is_listed_again(
    broker: RabbitBroker,
) -> None:
    sender = broker.clone()
    await sender.open()
    await sender.publish([envelope("a")])
    assert await broker.purge("q") == 1
    await broker.maintain()
    broker._watch._unused_since["q"] -= queue_watch._UNUSED_FOR
    await broker.maintain()
    assert not await broker._membership.queues()
    await sender.publish([envelope("b")])  # it has seen the mark before
    await broker.maintain()
    assert set(await broker.depth()) == {"q"}
    await sender.close()


async def test_a_look_at_many_queues_costs_as_much_as_at_few(broker: RabbitBroker) -> None:
    for number in range(60):
        await broker._membership.add_queue(f"{number}")
    seen: set[str] = set()
    for _ in range(3):
        watch = broker._watch
        await watch.look()
        seen |= watch._unused_since.keys()
        assert len(seen) % queue_watch._AT_ONCE == 0
    assert len(seen) == 60
