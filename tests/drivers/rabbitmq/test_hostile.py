"""Messages that somebody else wrote: each is set aside or skipped, and nothing else is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Sequence

import msgspec
import pytest
from pamqp.commands import Basic, Exchange, Queue

from aiotaskq import TaskQueue
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.settlement import Again, Dead, Done
from aiotaskq.drivers.rabbitmq import RabbitBackend, RabbitBroker
from aiotaskq.drivers.rabbitmq.channel import AmqpPublication, AmqpRefused, RabbitChannel
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.transport import connect
from aiotaskq.drivers.rabbitmq.url import parse_url

PATIENCE = 30.0


def shortstr(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack(">I", len(body)) + body


def nested(depth: int) -> bytes:
    value = table()
    for _ in range(depth):
        value = table(b"\x01kF" + value)
    return value


# Flags, and the properties that they announce.
PROPERTIES = {
    "id": b"\x00\x80" + shortstr(b"\xff"),
    "year": b"\x00\x40" + struct.pack(">Q", 1_772_000_000_000_000),
    "far year": b"\x00\x40" + struct.pack(">Q", 2**63),
    "deep": b"\x20\x00" + table(b"\x01kF" + nested(3000)),
    "year in a header": b"\x20\x00" + table(b"\x01kT" + struct.pack(">Q", 2**62)),
    "decimal": b"\x20\x00" + table(b"\x01kD\xff\xff\xff\xff\xff", b"\x01vV"),
    "our headers": Basic.Properties(
        headers={
            "aq-id": ["x"],
            "aq-crashes": -1,
            "aq-expires": "soon",
            "aq-due": -(2**62),
            "aq-life": "x" * 100_000,
            "x-death": [1],
            "aq-payload": 2**40,
        }
    ).marshal(),
    "long id": Basic.Properties(headers={"aq-id": "i" * 100_000}).marshal(),
    "all texts": b"\xc6\xe8"
    + shortstr(b"\xff\xfe") * 5
    + struct.pack(">Q", 2**40)
    + shortstr(b"\xff\xfe") * 2,
}


async def write(channel: RabbitChannel, queue: str, body: bytes = b"x") -> None:
    """Write one message with each of the properties to a queue."""
    batch = [AmqpPublication("", queue, one, body) for one in PROPERTIES.values()]
    confirmation = channel.publish(batch)
    await confirmation.done
    assert not confirmation.returned
    assert not confirmation.refused


async def write_what_a_stream_takes(url: str, queue: str, bodies: Sequence[bytes]) -> int:
    """Write messages to a stream; the server ends the connection for some. Return their number."""
    taken = 0
    for properties in PROPERTIES.values():
        transport = await connect(parse_url(url))
        with contextlib.suppress(AmqpRefused):
            channel = await transport.open_channel(confirms=True)
            batch = [AmqpPublication("", queue, properties, body) for body in bodies]
            await channel.publish(batch).done
            taken += 1
        await transport.close()
    return taken


def envelope(name: str, **fields: object) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"x", **fields})  # type: ignore[arg-type]  # any field


async def test_messages_with_any_properties_are_delivered_retried_and_buried(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    await broker.publish([envelope("first")])
    await write(channel, RabbitNames(prefix, "quorum").ready("q"))
    await broker.publish([envelope("last")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    got = list(await consumer.fetch(100, PATIENCE))
    assert len(got) == 2 + len(PROPERTIES)
    assert {"first", "last", "\\xff"} <= {one.id for one in got}
    assert not await consumer.settle(
        [Again(one, Envelope(id=one.id, queue="q", body=one.body)) for one in got]
    )
    again = list(await consumer.fetch(100, PATIENCE))
    assert sorted(one.id for one in again) == sorted(one.id for one in got)
    assert not await consumer.settle([Dead(one, "why") for one in again])
    letters = await broker.dead("q")
    assert sorted(one.id for one in letters) == sorted(one.id for one in got)
    assert await broker.discard("q", [one.key for one in letters]) == len(got)
    await consumer.close()


async def test_dead_letters_with_any_properties_are_listed_and_discarded(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    await broker.publish([envelope("a")])
    await write(channel, RabbitNames(prefix, "quorum").dead("q"))
    letters = await broker.dead("q")
    assert len(letters) == len(PROPERTIES)
    assert (await broker.maintain()).trimmed == 0
    [found, *_] = letters
    assert not await broker.revive("q", [(found.key, envelope("revived"))])
    assert await broker.discard("q", {one.key for one in letters}) >= 1


async def test_streams_with_any_records_are_read(
    broker: RabbitBroker, url: str, prefix: str, channel: RabbitChannel
) -> None:
    names = RabbitNames(prefix, "quorum")
    await broker.publish([envelope("a")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    joined = msgspec.msgpack.encode(
        {"type": "join", "consumer": "x" * 300, "queues": ["q"], "about": b""}
    )
    deep = b"\x91" * 50_000 + b"\xc0"
    too_long = ("é" * 40).encode()
    bodies = [b"\xff\xfe", deep, joined, too_long, b"a,b", b"\0", b"\0nothing"]
    assert await write_what_a_stream_takes(url, names.ledger, bodies) >= 5
    assert await write_what_a_stream_takes(url, names.queue_list, bodies) >= 5
    for body in bodies:  # also to one who answers questions
        await write(channel, names.consumer(consumer.id), body)
    late = broker.consumer(["q"], name="late", lease=60.0)
    await late.open()
    assert {one.id for one in await broker.consumers()} == {consumer.id, late.id}
    assert set(await broker.depth()) == {"q"}
    await broker.cancel(["nothing"])
    await broker.maintain()
    [got] = await late.fetch(1, PATIENCE)
    assert not await late.settle([Done(got)])
    await late.close()
    await consumer.close()


async def test_no_answer_goes_to_a_queue_that_a_question_names(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    names = RabbitNames(prefix, "quorum")
    await broker.publish([envelope("a")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    question = msgspec.msgpack.encode({"after": "", "ids": []})
    properties = Basic.Properties(reply_to=names.ready("q"), correlation_id="c").marshal()
    await channel.publish(
        [AmqpPublication("", names.consumer(consumer.id), properties, question)]
    ).done
    await broker.consumers()  # it has read the question by then
    assert (await broker.depth())["q"].ready == 1
    await consumer.close()


async def test_a_question_with_an_address_that_cannot_be_packed_stops_no_settling(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    await broker.publish([envelope("a"), envelope("b")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    [held] = await consumer.fetch(1, PATIENCE)
    question = msgspec.msgpack.encode({"after": "", "ids": []})
    address = b"amq.rabbitmq.reply-to" + b"\xff" * 200
    properties = struct.pack(">H", 0x0200) + shortstr(address)  # the flag of reply_to
    name = RabbitNames(prefix, "quorum").consumer(consumer.id)
    await channel.publish([AmqpPublication("", name, properties, question)]).done
    await broker.consumers()  # it has read the question by then
    assert not await consumer.settle([Again(held, envelope("a again"))])
    assert (await broker.depth())["q"].ready == 2
    await consumer.close()


async def test_a_message_from_an_exchange_and_with_a_key_that_are_no_text_is_delivered(
    broker: RabbitBroker, prefix: str, channel: RabbitChannel
) -> None:
    ready = RabbitNames(prefix, "quorum").ready("q")
    await broker.publish([envelope("a")])
    exchange = f"{prefix}.fanout"
    await channel.call(
        Exchange.Declare(exchange=exchange, exchange_type="fanout"),
        Queue.Bind(queue=ready, exchange=exchange),
    )
    packed = struct.pack(">IH", Basic.Publish.index, 0) + shortstr(exchange.encode())
    packed += shortstr(b"\xff\xfe") + b"\0"
    head = struct.pack(">HxxQ", 60, 0) + b"\x00\x80" + shortstr(b"b")
    number = channel._number
    for kind, payload in ((1, packed), (2, head)):
        channel.send_unanswered(struct.pack(">BHI", kind, number, len(payload)) + payload + b"\xce")
    await channel.call(Basic.Qos(prefetch_count=1))
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    found: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while len(found) < 2:
            found |= {one.id for one in await consumer.fetch(10, 1.0)}
    assert found == {"a", "b"}
    await consumer.close()


def outcome(name: str, reply_to: str) -> Outcome:
    return Outcome(
        task_id=name,
        status=TaskStatus.SUCCESS,
        result=msgspec.Raw(b"1"),
        reply_to=reply_to,
    )


async def test_a_caller_gets_its_result_from_behind_replies_that_are_none(
    url: str, prefix: str, channel: RabbitChannel
) -> None:
    backend = RabbitBackend(url, prefix=prefix)
    await backend.open()
    address = await backend.reply_address()
    for body in (b"x", b"\xff", b"[" * 100_000, b'{"task_id": "a"}'):
        await write(channel, address, body)
    assert not await backend.store([outcome("a", address)], 60.0)
    async with asyncio.timeout(PATIENCE):
        while "a" not in await backend.load(["a"]):
            await asyncio.sleep(0.01)
    await backend.close()


async def test_a_result_goes_to_queues_of_results_only(
    broker: RabbitBroker, url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.publish([envelope("a")])
    backend = RabbitBackend(url, prefix=prefix)
    await backend.open()
    names = RabbitNames(prefix, "quorum")
    address = await backend.reply_address()
    odd = [
        names.ready("q"),
        names.dead("q"),
        names.ledger,
        names.replies("x"),
        f"{address}x",
        "x" * 1000,
        "amq.rabbitmq.reply-to",
    ]
    batch = [outcome(str(number), one) for number, one in enumerate(odd)]
    assert not await backend.store([*batch, outcome("good", address)], 60.0)
    async with asyncio.timeout(PATIENCE):
        while "good" not in await backend.load(["good"]):
            await asyncio.sleep(0.01)
    depth = (await broker.depth())["q"]
    assert (depth.ready, depth.dead) == (1, 0)
    refused = [one for one in caplog.records if "no queue of results" in one.message]
    assert len(refused) == len(odd)
    await backend.close()


async def test_good_tasks_run_beside_messages_with_any_properties(
    url: str, prefix: str, channel: RabbitChannel
) -> None:
    app = TaskQueue("t", broker=url, prefix=prefix)

    @app.task(queue="q")
    async def add(x: int, y: int) -> int:
        return x + y

    names = RabbitNames(prefix, "quorum")
    async with app:
        handles = [await add.kiq(number, 1) for number in range(5)]
        await write(channel, names.ready("q"), b"\xff not a message")
        handles += [await add.kiq(number, 1) for number in range(5)]
        async with app.worker(queues=["q"]):
            values = [await one.result(timeout=PATIENCE) for one in handles]
            assert values == [*range(1, 6), *range(1, 6)]
            broker = await app.broker()
            async with asyncio.timeout(PATIENCE):
                while (await broker.depth())["q"].dead < len(PROPERTIES):
                    await asyncio.sleep(0.05)
