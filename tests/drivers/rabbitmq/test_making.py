"""Queues that several processes make at once."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest
from pamqp.commands import Queue

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.rabbitmq import RabbitBroker, topology
from aiotaskq.drivers.rabbitmq.channel import RabbitChannel
from aiotaskq.drivers.rabbitmq.lock import server_lock
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.errors import BrokerUnavailable

PATIENCE = 120.0
ROUNDS = 6
PRIORITIES = (0, 5, 9)


def envelope(number: int, queue: str, priority: int) -> Envelope:
    name = f"{queue}-{number}-{priority}"
    return Envelope(id=name, queue=queue, body=b"x", priority=priority)


async def receive(url: str, prefix: str, queue: str, wanted: set[str]) -> None:
    """Take and settle messages until all those that are wanted were seen, by any consumer."""
    broker = RabbitBroker(url, prefix=prefix)
    await broker.open()
    consumer = broker.consumer((queue,), name="w", lease=60.0)
    await consumer.open()
    while wanted:
        got = await consumer.fetch(10, 0.2)
        assert not await consumer.settle([Done(one) for one in got])
        wanted.difference_update(one.id for one in got)
    await consumer.close()
    await broker.close()


async def send(url: str, prefix: str, queue: str, number: int) -> None:
    broker = RabbitBroker(url, prefix=prefix)
    await broker.open()
    for priority in PRIORITIES:
        await broker.publish([envelope(number, queue, priority)])
    await broker.close()


async def publish(broker: RabbitBroker, one: Envelope) -> None:
    """Send a message as a client does: once more if its queue is gone."""
    try:
        await broker.publish([one])
    except BrokerUnavailable:
        await broker.publish([one])


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_programs_that_make_a_queue_at_once_keep_their_connections(
    url: str, prefix: str, queue_type: str
) -> None:
    url = f"{url}?queue_type={queue_type}"
    for turn in range(ROUNDS):
        queue = f"q{turn}"
        wanted = {envelope(one, queue, level).id for one in range(3) for level in PRIORITIES}
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(
                *(receive(url, prefix, queue, wanted) for _ in range(3)),
                *(send(url, prefix, queue, one) for one in range(3)),
            )


async def test_all_messages_arrive_though_senders_make_a_deleted_queue_again_at_once(
    url: str, broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    ready = RabbitNames(prefix, "quorum").ready("q")
    consumer = broker.consumer(("q", "p"), name="w", lease=60.0)
    await consumer.open()
    for turn in range(ROUNDS):
        waiting = asyncio.create_task(consumer.fetch(1, PATIENCE))
        loop = consumer._loop
        while loop._earlier or len(loop._waiting) < len(loop._counted):
            await asyncio.sleep(0.01)
        await consumer.news()  # the server answers after it has begun to consume
        await channel.call(Queue.Delete(queue=ready))
        # One that has sent to it before, and two that begin: each finds out by itself.
        await asyncio.gather(
            publish(broker, envelope(turn, "q", 0)), *(send(url, prefix, "q", turn) for _ in "ab")
        )
        got = [*await waiting]
        async with asyncio.timeout(PATIENCE):
            while len(got) < 1 + 2 * len(PRIORITIES):
                got += await consumer.fetch(10, 0.2)
        assert not await consumer.settle([Done(one) for one in got])
    await consumer.close()


async def test_a_process_that_hangs_while_it_makes_a_queue_delays_others_but_does_not_stop_them(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.publish([envelope(0, "old", 0)])
    lock = RabbitNames(prefix, "quorum").making_lock
    await channel.call(Queue.Declare(queue=lock, exclusive=True))
    monkeypatch.setattr(topology, "_MAKING", PATIENCE)
    waiting = asyncio.create_task(broker.publish([envelope(1, "q", 5)]))
    broker._topology._forget()  # as after half an hour
    await broker.publish([envelope(1, "old", 0)])
    assert not waiting.done()
    waiting.cancel()
    # It waits once, however many queues are new.
    monkeypatch.setattr(topology, "_MAKING", 0.3)
    lock_once = Mock(side_effect=server_lock)
    monkeypatch.setattr(topology, "server_lock", lock_once)
    await broker.publish([envelope(1, f"q{one}", 5) for one in range(5)])
    assert lock_once.call_count == 1
    assert {one: count.ready for one, count in (await broker.depth()).items()} == {
        "old": 2,
        **{f"q{one}": 1 for one in range(5)},
    }


async def test_the_lock_does_not_outlive_a_call_that_is_cancelled(
    broker: RabbitBroker, prefix: str
) -> None:
    lock = RabbitNames(prefix, "quorum").making_lock
    other = broker.clone()
    await other.open()
    for pause in (0.0, 0.001, 0.002, 0.004, 0.008):
        call = asyncio.create_task(broker.publish([envelope(1, f"q{pause}", 5)]))
        await asyncio.sleep(pause)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        async with asyncio.timeout(PATIENCE), server_lock(other._connection.get(), lock):
            pass
    await other.close()
