"""Dead letters and odd messages, as RabbitMQ keeps them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from pamqp.commands import Basic, Queue

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import DeadLimits
from aiotaskq.contract.settlement import Again, Dead, Settlement
from aiotaskq.drivers.rabbitmq import RabbitBroker, dead_letters
from aiotaskq.drivers.rabbitmq.channel import AmqpMessage, AmqpPublication
from aiotaskq.drivers.rabbitmq.dead_letters import HeldDeadLetter
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.transport import connect
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import BrokerUnavailable, ConfigError

PATIENCE = 120.0


def envelope(name: str) -> Envelope:
    return Envelope(id=name, queue="q", body=f"body of {name}".encode())


async def bury(broker: RabbitBroker, *reasons: str, details: bytes = b"") -> None:
    """Have messages named 0, 1, ... end as dead letters."""
    await broker.publish([envelope(f"{number}") for number in range(len(reasons))])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    left = list(reasons)
    while left:
        batch = [Dead(one, left.pop(0), details) for one in await consumer.fetch(100, PATIENCE)]
        assert not await consumer.settle(batch)
    await consumer.close()


async def test_a_long_reason_and_long_details_are_kept_and_harm_no_others(
    broker: RabbitBroker,
) -> None:
    # Longer than the frame that all headers of a message have to fit in.
    reason, details = "ü" * 90_000, bytes(range(256)) * 1000
    await broker.publish([envelope("a"), envelope("b")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    a, b = await consumer.fetch(2, PATIENCE)
    batch: list[Settlement] = [Again(a, envelope("a")), Dead(b, reason, details)]
    assert not await consumer.settle(batch)
    [letter] = await broker.dead("q")
    assert (letter.id, letter.body) == ("b", b"body of b")
    assert (letter.reason, letter.details) == (reason, details)
    assert (await broker.depth())["q"].ready == 1
    await consumer.close()


async def test_a_reason_too_long_for_any_server_is_cut(broker: RabbitBroker) -> None:
    await bury(broker, "x" * 20_000_000, details=b"{" * 20_000_000)
    [letter] = await broker.dead("q")
    assert letter.body == b"body of 0"
    assert letter.reason.startswith("xxx")
    assert letter.reason.endswith("... and 19900000 more")
    assert letter.details == b""


async def test_a_reader_that_takes_too_long_makes_dead_letters_unavailable_to_others(
    url: str, prefix: str
) -> None:
    broker = RabbitBroker(f"{url}?timeout=0.5", prefix=prefix)
    await broker.open()
    await bury(broker, "why")
    transport = await connect(parse_url(url))
    lock = RabbitNames(prefix, "quorum").lock("q")
    await (await transport.open_channel()).call(Queue.Declare(queue=lock, exclusive=True))
    with pytest.raises(BrokerUnavailable, match="others look"):
        await broker.dead("q")
    with pytest.raises(BrokerUnavailable, match="others look"):
        await broker.maintain()
    await transport.close()
    assert len(await broker.dead("q")) == 1
    await broker.close()


async def test_readers_of_one_process_take_turns(url: str, prefix: str) -> None:
    broker = RabbitBroker(f"{url}?timeout=3", prefix=prefix)
    await broker.open()
    await bury(broker, *["why"] * 5)
    oldest = (await broker.dead("q"))[-1]
    discarding = asyncio.create_task(broker.discard("q", [oldest.key]))
    seen = await asyncio.gather(*(broker.dead("q") for _ in range(4)))
    assert await discarding == 1
    assert [len(one) for one in seen] == [4] * 4
    await broker.close()


ODD: list[dict[str, Any]] = [
    {"aq-expires": "soon"},
    {"aq-expires": 1.5e30},
    {"aq-crashes": "many"},
    {"aq-crashes": 2**63 - 1},
    {"aq-life": 7},
    {"aq-id": {"a": 1}},
    {"aq-key": "first", "aq-reason": 5, "aq-details": 5},
    {"aq-key": "9" * 5000},
    {"aq-payload": 2},
]


async def write_by_hand(url: str, queue: str, *odd: dict[str, Any]) -> None:
    transport = await connect(parse_url(url))
    channel = await transport.open_channel(confirms=True)
    for headers in odd:
        properties = Basic.Properties(headers=headers, message_id="odd").marshal()
        await channel.publish([AmqpPublication("", queue, properties, b"body")]).done
    await transport.close()


async def test_messages_with_odd_headers_are_handed_out_and_buried(
    broker: RabbitBroker, url: str, prefix: str
) -> None:
    await broker.publish([envelope("a")])  # makes the queues
    await write_by_hand(url, RabbitNames(prefix, "quorum").ready("q"), *ODD)
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    got: dict[Any, Delivery] = {}
    while len(got) <= len(ODD):
        some = await consumer.fetch(20, PATIENCE)
        assert some
        got |= {one.receipt: one for one in some}
        assert not await consumer.settle([Dead(one, "why") for one in some])
    assert {one.body for one in got.values()} == {b"body", b"body of a"}
    assert {one.reason for one in await broker.dead("q")} == {"why"}
    await consumer.close()


async def test_dead_letters_with_odd_headers_are_shown(
    broker: RabbitBroker, url: str, prefix: str
) -> None:
    await bury(broker, "why")
    await write_by_hand(url, RabbitNames(prefix, "quorum").dead("q"), *ODD)
    found = await broker.dead("q")
    assert len(found) == len(ODD) + 1
    assert found[0].reason == "why"
    assert {one.body for one in found[1:]} == {b"body"}


@pytest.mark.parametrize(
    "before",
    ["", "first", "1" * 19, "1" * 21, "-" + "1" * 19, "१" * 20, "1" * 20 + "x", "1" * 20 + "\n"],
)
async def test_a_text_that_is_no_key_is_refused_to_list_before_and_absent_to_others(
    broker: RabbitBroker, before: str
) -> None:
    await bury(broker, "why")
    with pytest.raises(ConfigError, match="is not the key of a dead letter"):
        await broker.dead("q", before=before)
    assert list(await broker.revive("q", [(before, envelope("a"))])) == [before]
    assert await broker.discard("q", [before]) == 0
    assert len(await broker.dead("q")) == 1


async def test_letters_are_listed_before_each_key_that_was_given(
    broker: RabbitBroker, url: str, prefix: str
) -> None:
    await bury(broker, "why", "why")
    removals = [datetime(year, 1, 1, tzinfo=UTC) for year in (1999, 2099)]
    odd = [{"x-death": [{"time": one, "reason": "maxlen"}]} for one in removals]
    await write_by_hand(url, RabbitNames(prefix, "quorum").dead("q"), {}, *odd)
    found = await broker.dead("q")
    assert [one.id for one in found] == ["odd", "1", "0", "odd", "odd"]
    assert "maxlen" in found[0].reason
    for number, letter in enumerate(found, start=1):
        assert await broker.dead("q", before=letter.key) == found[number:]
    assert await broker.discard("q", [found[1].key]) == 1
    assert await broker.dead("q", before=found[1].key) == found[2:]


async def test_trimming_by_age_reads_no_further_than_it_has_to(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury(broker, *["why"] * 120)
    read: list[str] = []

    class Counted(HeldDeadLetter):
        def __init__(self, message: AmqpMessage, queue: str) -> None:
            super().__init__(message, queue)
            read.append(self.letter.id)

    monkeypatch.setattr(dead_letters, "HeldDeadLetter", Counted)
    assert (await broker.maintain(DeadLimits(age=3600.0))).trimmed == 0
    assert 0 < len(read) <= 50
    assert (await broker.maintain(DeadLimits(most=110))).trimmed == 10
    kept = await broker.dead("q", 200)
    assert [one.id for one in kept] == [f"{number}" for number in reversed(range(10, 120))]
    assert (await broker.maintain(DeadLimits(most=30))).trimmed == 80
    assert {one.id for one in await broker.dead("q")} == {f"{one}" for one in range(90, 120)}


async def test_all_that_is_too_old_is_trimmed_at_once(broker: RabbitBroker) -> None:
    await bury(broker, *["why"] * 120)
    assert (await broker.maintain(DeadLimits(age=0.0))).trimmed == 120
    assert not await broker.dead("q")
