"""Messages of a consumer that return to their queues or are settled, when that fails halfway."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import cast

import pytest

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.rabbitmq import RabbitBroker, consumer_loop
from aiotaskq.drivers.rabbitmq.channel import AmqpConfirmation, AmqpPublication, AmqpRefused
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.errors import BrokerFull, BrokerUnavailable
from tests.servers import RabbitServer

PATIENCE = 120.0


def envelope(name: str, delay: float = 0.0, queue: str = "q") -> Envelope:
    return Envelope(id=name, queue=queue, body=b"x", delay=delay)


async def consume(broker: RabbitBroker, *queues: str) -> RabbitConsumer:
    consumer = broker.consumer(queues or ("q",), name="w", lease=60.0)
    await consumer.open()
    return consumer


async def until_it_holds(consumer: RabbitConsumer, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while sum(consumer.holds.values()) != count:
            await asyncio.sleep(0.01)


def connection_of(consumer: RabbitConsumer) -> RabbitConnection:
    return consumer._loop._connection


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RabbitConnection, Exception]]:
    """Connections whose next batch is confirmed, and whose caller gets an error instead."""
    confirmed = RabbitConnection._confirmed
    given: list[tuple[RabbitConnection, Exception]] = []

    async def fail(
        connection: RabbitConnection, confirmation: AmqpConfirmation, *, strict: bool
    ) -> AmqpRefused | None:
        refusal = await confirmed(connection, confirmation, strict=strict)
        if given and given[0][0] is connection:
            raise given.pop(0)[1]
        return refusal

    monkeypatch.setattr(RabbitConnection, "_confirmed", fail)
    return given


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RabbitConnection, Exception]]:
    """Connections that cannot send their next batch."""
    start = RabbitConnection.begin_publish
    given: list[tuple[RabbitConnection, Exception]] = []

    async def fail(
        connection: RabbitConnection, batch: Sequence[AmqpPublication]
    ) -> AmqpConfirmation:
        if given and given[0][0] is connection:
            raise given.pop(0)[1]
        return await start(connection, batch)

    monkeypatch.setattr(RabbitConnection, "begin_publish", fail)
    return given


async def test_an_unclaimed_message_goes_to_others_though_returning_it_failed_at_first(
    broker: RabbitBroker, refusals: list[tuple[RabbitConnection, Exception]]
) -> None:
    idle = await consume(broker)
    assert not await idle.fetch(1, 0.05)  # from here on the queue sends its first message at once
    refusals.append((connection_of(idle), BrokerFull("by a test")))
    await broker.publish([envelope("a")])
    other = await consume(broker)
    [got] = await other.fetch(1, PATIENCE)
    assert (got.id, refusals) == ("a", [])
    await until_it_holds(idle, 0)  # the original goes when its copy is confirmed
    await idle.close()
    await other.close()


async def test_a_suspect_that_could_not_be_returned_is_returned_later(
    broker: RabbitBroker, refusals: list[tuple[RabbitConnection, Exception]]
) -> None:
    await broker.publish([envelope("a")])
    for _ in range(2):
        consumer = await consume(broker)
        assert await consumer.fetch(1, PATIENCE)
        await consumer.abort()
        await consumer.close()
    consumer = await consume(broker)
    refusals.append((connection_of(consumer), BrokerFull("by a test")))
    [got] = await consumer.fetch(1, PATIENCE)
    assert (got.crashes, refusals) == (2, [])
    await consumer.close()


async def test_a_message_that_could_not_be_copied_without_memory_is_stored_once_later(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    idle = await consume(broker)
    assert not await idle.fetch(1, 0.05)
    await broker.publish([envelope("a", delay=1.5)])
    watermark = "vm_memory_monitor:set_vm_memory_high_watermark({})"
    rabbit_server.evaluate(watermark.format("0.00001"))
    try:
        await until_it_holds(idle, 1)
        await asyncio.sleep(0.5)  # it cannot be put back
    finally:
        rabbit_server.evaluate(watermark.format("0.4"))
    await until_it_holds(idle, 0)
    other = await consume(broker)
    assert [one.id for one in await other.fetch(5, PATIENCE)] == ["a"]
    assert not await other.fetch(5, 0.5)
    await idle.close()
    await other.close()


async def test_messages_taken_by_a_cancelled_fetch_go_to_others(broker: RabbitBroker) -> None:
    await broker.publish([envelope(str(number)) for number in range(3)])
    consumer = await consume(broker)
    fetching = asyncio.create_task(consumer.fetch(3, PATIENCE))
    await asyncio.sleep(0)  # it begins
    while sum(consumer.holds.values()) < 3:
        time.sleep(0.01)  # the fetch ends in its thread, and this event loop does not run
    time.sleep(0.1)  # the same
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    other = await consume(broker)
    got: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(got) < 3:
            got += await other.fetch(3, 1.0)
    assert sorted(one.id for one in got) == ["0", "1", "2"]
    await consumer.close()
    await other.close()


async def test_unclaimed_messages_are_cancelled_like_waiting_ones(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_loop, "_UNCLAIMED_WAIT", PATIENCE)
    consumer = await consume(broker)
    assert not await consumer.fetch(1, 0.05)  # from here on one may arrive without a fetch
    await broker.publish([envelope("a")])
    async with asyncio.timeout(PATIENCE):
        while not consumer.holds:
            await asyncio.sleep(0.01)
    assert not await broker.cancel(["a"], running=False)
    await broker.publish([envelope("b")])
    [got] = await consumer.fetch(2, PATIENCE)
    assert got.id == "b"
    assert not await consumer.settle([Done(got)])
    await consumer.close()
    assert not await broker.depth()


async def test_a_fetched_message_stays_with_a_worker_whose_loop_is_blocked(
    broker: RabbitBroker,
) -> None:
    consumer = await consume(broker, "q", "p")
    assert not await consumer.fetch(1, 0.05)
    fetching = asyncio.create_task(consumer.fetch(1, PATIENCE))
    await asyncio.sleep(0.05)  # it waits
    # So that it receives both at once, and one of them without asking for it.
    published = threading.Event()

    def stand_still() -> None:
        while not published.is_set():
            pass

    consumer._running()._loop.call_soon_threadsafe(stand_still)
    await broker.publish([envelope("a"), envelope("b", queue="p")])
    published.set()
    time.sleep(0.5)  # like a task that blocks the loop
    [got] = await fetching
    await until_it_holds(consumer, 1)
    assert not await consumer.settle([Done(got)])
    await consumer.close()


async def test_settling_a_batch_again_stores_nothing_twice(
    broker: RabbitBroker, failures: list[tuple[RabbitConnection, Exception]]
) -> None:
    await broker.publish([envelope(one) for one in "abc"])
    consumer = await consume(broker)
    a, b, c = await consumer.fetch(3, PATIENCE)
    batch: list[Settlement] = [Again(a, envelope("a")), Release(b), Dead(c, "why")]
    failures.append((connection_of(consumer), BrokerUnavailable("by a test")))
    with pytest.raises(BrokerUnavailable, match="by a test"):
        await consumer.settle(batch)
    assert not await consumer.settle(batch)
    depth = (await broker.depth())["q"]
    assert (depth.ready, depth.held, depth.dead) == (2, 0, 1)
    await consumer.close()


async def test_messages_being_settled_during_close_are_not_handed_back_too(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.publish([envelope(one) for one in "ab"])
    consumer = await consume(broker)
    a, b = await consumer.fetch(2, PATIENCE)
    confirmed, connection = RabbitConnection._confirmed, connection_of(consumer)
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    async def linger(
        one: RabbitConnection, confirmation: AmqpConfirmation, *, strict: bool
    ) -> AmqpRefused | None:
        if one is connection and not begun.is_set():
            loop.call_soon_threadsafe(begun.set)
            await asyncio.sleep(0.3)
        return await confirmed(one, confirmation, strict=strict)

    monkeypatch.setattr(RabbitConnection, "_confirmed", linger)
    settling = asyncio.create_task(consumer.settle([Done(a), Again(b, envelope("b"))]))
    await asyncio.wait_for(begun.wait(), PATIENCE)
    settling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await settling
    await consumer.close()
    other = await consume(broker)
    assert [one.id for one in await other.fetch(5, PATIENCE)] == ["b"]
    assert not await other.fetch(5, 0.3)
    await other.close()


async def test_settling_late_over_a_dead_connection_stores_nothing(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    await broker.publish([envelope("a")])
    late = await consume(broker)
    [held] = await late.fetch(1, PATIENCE)
    transport = late._loop._transport
    assert transport is not None  # it is open
    transport.answer_timeout = 1.0
    # As if the network dropped all packets of the connection: its end is not noticed.
    reading = cast("asyncio.Transport", transport._socket)
    late._running()._loop.call_soon_threadsafe(reading.pause_reading)
    await asyncio.sleep(0.1)
    await asyncio.to_thread(rabbit_server.close_connections)
    other = await consume(broker)
    [got] = await other.fetch(1, PATIENCE)
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(BrokerUnavailable):
                assert await late.settle([Dead(held, "late")]) == [held]
                break
    assert (await broker.depth())["q"].dead == 0
    assert not await other.settle([Done(got)])
    await late.close()
    await other.close()


async def test_waking_leaves_no_consumer_tags_behind(broker: RabbitBroker) -> None:
    consumer = await consume(broker)
    for number in range(20):
        fetching = asyncio.create_task(consumer.fetch(1, PATIENCE))
        await asyncio.sleep(0.005)  # it waits
        await broker.publish([envelope(str(number))])
        [got] = await fetching
        assert not await consumer.settle([Done(got)])
    channel = consumer._loop._channel
    assert channel is not None  # it is open
    assert len(channel._consumers) < 10
    await consumer.close()
