"""Priorities at RabbitMQ: a queue for each that is in use, and consumers that find it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pamqp.commands import Basic, Queue

from aiotaskq import Retry, TaskQueue, current_task
from aiotaskq.contract.message import SUSPECT, Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq.channel import AmqpMessage, AmqpPublication, RabbitChannel
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.drivers.rabbitmq.messages import PLAIN_PROPERTIES, RabbitMessage
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.properties import AmqpProperties
from aiotaskq.errors import BatchRefused, BrokerFull, BrokerUnavailable, ConfigError
from tests.drivers.rabbitmq.test_refusals import full_at
from tests.servers import RabbitServer

PATIENCE = 30.0


def envelope(
    name: str, priority: int = 0, queue: str = "q", *, delay: float | None = None
) -> Envelope:
    return Envelope(id=name, queue=queue, body=b"x", priority=priority, delay=delay)


async def consume(broker: RabbitBroker, *queues: str) -> RabbitConsumer:
    consumer = broker.consumer(queues or ("q",), name="w", lease=60.0)
    await consumer.open()
    return consumer


@pytest.fixture(params=["quorum", "classic"])
async def either(
    request: pytest.FixtureRequest, url: str, prefix: str
) -> AsyncIterator[RabbitBroker]:
    """A broker with queues of either type."""
    broker = RabbitBroker(f"{url}?queue_type={request.param}", prefix=prefix)
    await broker.open()
    yield broker
    await broker.close()


# --- names --------------------------------------------------------------------------------------


def test_names_with_a_priority_are_those_of_no_other_queue_and_never_too_long() -> None:
    names = RabbitNames("p" * 80, "quorum")
    assert names.ready("q", 0) == names.ready("q") == f"{'p' * 80}.queue.q"
    assert names.ready("q", 9) == f"{'p' * 80}.queue.q+p9"
    like = ["q+p9", "q+9", "q%p9", "q\x0f9", "q+"]
    assert names.ready("q", 9) not in {names.ready(one) for one in like}
    assert len({names.mark("q", level) for level in range(10)} | {names.mark("q9")}) == 11
    longest = 255 - len(f"{'p' * 80}.suspects.")
    assert len(names.ready("q" * longest, 9)) == 255
    with pytest.raises(ConfigError, match="too long"):
        names.ready("q" * (longest + 1), 9)


async def test_the_longest_name_has_all_priorities(broker: RabbitBroker) -> None:
    queue = "é" * 39
    levels = range(10)
    await broker.publish([envelope(str(one), one, queue) for one in levels])
    consumer = await consume(broker, queue)
    got = await consumer.fetch(10, PATIENCE)
    assert [one.priority for one in got] == [*reversed(levels)]
    assert not await consumer.settle([Done(one) for one in got])
    await consumer.close()


# --- what an application that has none pays -----------------------------------------------------


async def test_without_priorities_nothing_is_declared_counted_or_awaited_for_them(
    broker: RabbitBroker,
) -> None:
    await broker.publish([envelope("a"), envelope("b", queue="p")])
    consumer = await consume(broker, "q", "p")
    assert len(await consumer.fetch(2, PATIENCE)) == 2
    ours = [("q", None), ("p", None), ("q", 0), ("p", 0)]
    assert consumer._loop._counted == ours
    assert not await consumer.fetch(1, 0.05)
    assert set(consumer._loop._waiting) == {("q", 0), ("p", 0)}
    await consumer.close()


# --- finding the queues of priorities -----------------------------------------------------------


@pytest.mark.parametrize("old", [True, False], ids=["a queue in use", "a new queue"])
async def test_a_waiting_fetch_is_woken_by_the_first_message_of_each_priority(
    either: RabbitBroker, old: bool
) -> None:
    if old:
        await either.publish([envelope("early")])
    consumer = await consume(either, "p", "q")
    if old:
        [got] = await consumer.fetch(1, PATIENCE)
        assert not await consumer.settle([Done(got)])
    sender = either.clone()
    await sender.open()
    for priority in (5, 9, 1, 5, 0):
        waiting = asyncio.create_task(consumer.fetch(10, PATIENCE))
        while not consumer._loop._waiting:
            await asyncio.sleep(0.01)
        begun = time.monotonic()
        await sender.publish([envelope("a", priority)])
        [got] = await waiting
        assert (got.priority, got.queue) == (priority, "q")
        assert time.monotonic() - begun < PATIENCE / 2
        assert not await consumer.settle([Done(got)])
    await sender.close()
    await consumer.close()


async def test_many_of_several_priorities_come_in_their_order(either: RabbitBroker) -> None:
    numbers = range(300)
    batch = [envelope(str(number), (0, 9, 4)[number % 3]) for number in numbers]
    await either.publish([*batch, envelope("p", 9, "p")])
    consumer = await consume(either, "q", "p")
    got = [*await consumer.fetch(120, PATIENCE)]
    while len(got) <= len(numbers):
        got += await consumer.fetch(120, PATIENCE)
    wanted = [str(one) for start in (1, 2, 0) for one in numbers[start::3]]
    assert [one.id for one in got] == [*wanted, "p"]
    assert not await consumer.settle([Done(one) for one in got])
    assert await either.depth() == {}
    await consumer.close()


async def test_a_higher_priority_that_is_sent_between_two_fetches_goes_before_a_long_queue(
    broker: RabbitBroker,
) -> None:
    await broker.publish([*(envelope(str(one)) for one in range(200)), envelope("first", 3)])
    consumer = await consume(broker)
    got = await consumer.fetch(10, PATIENCE)
    assert [one.id for one in got] == ["first", *map(str, range(9))]
    await broker.publish([envelope("next", 3)])
    got = await consumer.fetch(10, PATIENCE)
    assert [one.id for one in got] == ["next", *map(str, range(9, 18))]
    await consumer.close()


async def test_a_priority_is_found_by_consumers_that_lost_the_list_for_a_moment(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    consumer = await consume(broker)
    stream = consumer._loop._membership._queue_list
    ended = asyncio.create_task(asyncio.to_thread(_wait_for_the_end, stream))
    await channel.call(Queue.Delete(queue=RabbitNames(prefix, "quorum").queue_list))
    await ended
    await broker.publish([envelope("a", 5)])
    [got] = await consumer.fetch(1, PATIENCE)
    assert (got.id, got.priority) == ("a", 5)
    await consumer.close()


def _wait_for_the_end(stream: object) -> None:
    until = time.monotonic() + PATIENCE
    channel = stream._channel  # type: ignore[attr-defined]  # that it reads on now
    while stream._channel is channel and time.monotonic() < until:  # type: ignore[attr-defined]
        time.sleep(0.01)


async def test_a_queue_that_was_announced_and_not_declared_does_not_stop_consumers(
    broker: RabbitBroker,
) -> None:
    await broker.publish([envelope("a")])
    await broker._membership.add_queue("q", 7)  # and the sender dies
    consumer = await consume(broker)
    [got] = await consumer.fetch(10, PATIENCE)
    assert await broker.depth() == {"q": Depth(held=1)}
    await broker.publish([envelope("b", 7)])
    [other] = await consumer.fetch(10, PATIENCE)
    assert (other.id, other.priority) == ("b", 7)
    assert not await consumer.settle([Done(got), Done(other)])
    await consumer.close()


# --- what happens to a message ------------------------------------------------------------------


async def test_a_message_keeps_its_priority_on_all_its_ways(either: RabbitBroker) -> None:
    low = envelope("low")
    await either.publish([low, envelope("a", 6)])
    consumer = await consume(either)
    [got] = await consumer.fetch(1, PATIENCE)
    assert (got.id, got.priority) == ("a", 6)
    assert not await consumer.settle([Release(got)])  # given back
    [got] = await consumer.fetch(1, PATIENCE)
    assert (got.id, got.priority) == ("a", 6)
    assert not await consumer.settle([Again(got, envelope("a", 6, delay=0.01))])  # tried again
    async with asyncio.timeout(PATIENCE):
        while (await either.depth())["q"].ready < 2:
            await asyncio.sleep(0.01)
    [got] = await consumer.fetch(1, PATIENCE)
    assert (got.id, got.priority) == ("a", 6)
    await consumer.close()  # handed back at the end
    for crashes in range(SUSPECT + 1):  # lost, until it is a suspect
        consumer = await consume(either)
        [got] = await consumer.fetch(1, PATIENCE)
        assert (got.id, got.priority, got.crashes) == ("a", 6, crashes)
        if crashes < SUSPECT:
            await consumer.abort()
            await consumer.close()
            async with asyncio.timeout(PATIENCE):
                while (await either.depth())["q"].ready < 2:
                    await asyncio.sleep(0.01)
    assert not await consumer.settle([Dead(got, "bad")])
    [letter] = await either.dead("q")
    assert not await either.revive("q", [(letter.key, envelope("a", 6))])
    for wanted in (("a", 6, 0), ("low", 0, 0)):
        [got] = await consumer.fetch(1, PATIENCE)
        assert (got.id, got.priority, got.crashes) == wanted
        assert not await consumer.settle([Done(got)])
    assert await either.depth() == {}
    await consumer.close()


async def test_all_priorities_are_counted_and_purged_by_another_process(
    either: RabbitBroker,
) -> None:
    await either.publish([envelope(str(one), one) for one in range(10)])
    other = either.clone()
    await other.open()
    assert await other.depth() == {"q": Depth(ready=10)}
    consumer = await consume(either)
    got = await consumer.fetch(3, PATIENCE)
    assert await other.depth() == {"q": Depth(ready=7, held=3)}
    assert await other.purge("q") == 7
    assert await other.depth() == {"q": Depth(held=3)}
    await other.maintain()
    assert not await consumer.settle([Done(one) for one in got])
    await consumer.close()
    await other.close()


async def test_a_cancelled_message_is_dropped_from_each_priority(broker: RabbitBroker) -> None:
    await broker.publish([envelope("a", 9), envelope("b", 4), envelope("c", 4)])
    await broker.cancel(["a", "b"])
    consumer = await consume(broker)
    [got] = await consumer.fetch(10, PATIENCE)
    assert (got.id, got.priority) == ("c", 4)
    assert not await consumer.settle([Done(got)])
    assert await broker.depth() == {}
    await consumer.close()


async def test_tasks_run_by_priority_and_keep_it_when_they_are_tried_again(
    url: str, prefix: str
) -> None:
    app = TaskQueue("t", broker=url, prefix=prefix, task_default_priority=2)
    ran: list[tuple[str, int, int]] = []

    @app.task(retry=Retry(max_attempts=2, delay=0.0), priority=5)
    async def note(name: str) -> None:
        run = current_task()
        ran.append((name, run.priority, run.attempt))
        if name == "fails" and run.attempt == 1:
            raise ValueError

    @app.task
    async def plain() -> None:
        ran.append(("plain", current_task().priority, 1))

    async with app:
        calls = [plain.s(), note.with_options(priority=0).s("last"), note.s("fails")]
        await app.kiq_many([*calls, note.with_options(priority=9).s("first")])
        await app.worker(concurrency=1, burst=True).run()
    first, failed, *others = ran
    assert (first, failed) == (("first", 9, 1), ("fails", 5, 1))
    assert ("fails", 5, 2) in others
    others.remove(("fails", 5, 2))  # its copy may arrive a moment later than the next fetch
    assert others == [("plain", 2, 1), ("last", 0, 1)]


# --- what operators do --------------------------------------------------------------------------


async def test_a_full_queue_of_one_priority_refuses_its_own_messages_only(
    rabbit_server: RabbitServer, broker: RabbitBroker, prefix: str
) -> None:
    await broker.publish([envelope("a", 5)])
    with full_at(rabbit_server, prefix, "q[+]p5", 1):
        batch = [envelope("b"), envelope("c", 5), envelope("d", 9)]
        refused: BatchRefused | None = None
        async with asyncio.timeout(PATIENCE):
            while refused is None:  # the policy needs a moment, and the limit may let one more in
                try:
                    await broker.publish(batch)
                except BatchRefused as error:
                    refused = error
    assert set(refused.errors) == {1}
    assert isinstance(refused.errors[1], BrokerFull)


async def test_a_queue_of_a_priority_that_was_deleted_comes_back(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    await broker.publish([envelope("a", 5)])
    consumer = await consume(broker)
    [got] = await consumer.fetch(1, PATIENCE)
    assert not await consumer.settle([Done(got)])
    name = RabbitNames(prefix, "quorum").ready("q", 5)
    await channel.call(Queue.Delete(queue=name))
    await broker.publish([envelope("low")])
    assert (await broker.depth())["q"].ready == 1, "the other priorities are counted"
    [got] = await consumer.fetch(10, PATIENCE)  # which declares it again
    assert not await consumer.settle([Done(got)])
    await channel.call(Queue.Delete(queue=name))
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await broker.publish([envelope("b", 5)])
                break
            except BrokerUnavailable:  # the first call finds that it is gone
                await asyncio.sleep(0.01)
    [got] = await consumer.fetch(10, PATIENCE)
    assert (got.id, got.priority) == ("b", 5)
    await consumer.close()


async def test_a_queue_with_other_arguments_stops_its_priority_only(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.publish([envelope("a")])
    name = RabbitNames(prefix, "quorum").ready("q", 5)
    await channel.call(Queue.Declare(queue=name, durable=True))
    waiting = await consume(broker)
    [got] = await waiting.fetch(1, PATIENCE)
    with pytest.raises(BatchRefused) as refusal:
        await broker.publish([envelope("b", 5), envelope("c"), envelope("d", 4)])
    assert set(refusal.value.errors) == {0}
    assert isinstance(refusal.value.errors[0], ConfigError)
    assert name in str(refusal.value.errors[0])
    late = await consume(broker)
    for consumer in (waiting, late):
        some = await consumer.fetch(10, PATIENCE)
        assert [(one.id, one.priority) for one in some] == [("d", 4), ("c", 0)]
        assert not await consumer.settle([Release(one) for one in reversed(some)])
    assert not await waiting.settle([Done(got)])
    assert sum("cannot be fetched" in one.message for one in caplog.records) == 2
    await late.close()
    await waiting.close()


# --- what others write --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "priority"),
    [(7, 7), (0, 0), (-1, 0), (10, 9), (2**62, 9), ("7", 0), (None, 0), ([7], 0), (True, 1)],
)
def test_the_priority_of_a_suspect_may_be_anything(value: Any, priority: int) -> None:
    properties = Basic.Properties(headers={"aq-priority": value}, message_id="a")
    message = AmqpMessage(
        Basic.Deliver("c", 1, False, "", ""), AmqpProperties(properties.marshal()), b"x"
    )
    assert RabbitMessage(message, "q", None).priority == priority
    assert RabbitMessage(message, "q", 3).priority == 3


async def test_odd_records_of_priorities_change_nothing(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    names = RabbitNames(prefix, "quorum")
    consumer = await consume(broker)
    odd = [b"\0\0", b"\0\0x", b"\0\0" + b"0q", b"\0\0-q", b"\0\0005\xff", b"\0\0005a,b", b"\0\0005"]
    odd.append(b"\0\0005" + ("é" * 99).encode())
    batch = [AmqpPublication("", names.queue_list, PLAIN_PROPERTIES, one) for one in odd]
    await channel.publish([*batch, *batch]).done
    await broker.publish([envelope("a", 2)])
    [got] = await consumer.fetch(10, PATIENCE)
    assert (got.id, got.priority) == ("a", 2)
    assert consumer._loop._membership._levels == {"q": [2]}
    assert set(await broker._membership.queues()) == {"q"}
    assert not await consumer.settle([Done(got)])
    await consumer.close()
