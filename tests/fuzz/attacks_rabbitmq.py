"""Attacks on a RabbitMQ server: hostile properties and bodies in each queue and stream."""

from __future__ import annotations

import asyncio
import json
import random
import struct

from pamqp.commands import Basic

from aiotaskq.drivers.rabbitmq.channel import AmqpError, AmqpPublication
from aiotaskq.drivers.rabbitmq.transport import connect
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.testing.fuzz import NOTICES, Attack
from tests.drivers.rabbitmq.test_hostile import PROPERTIES
from tests.servers import RabbitServer

_NAMES = "[binary_to_list(element(4, amqqueue:get_name(Q))) || Q <- rabbit_amqqueue:list()]"
_KINDS = ("queue", "suspects", "dead", "ledger", "queues", "consumer", "reply")
_RECORDS = (
    b"\0",
    b"\0default",
    b"\x91" * 3000,
    b"\x84\xa4type\xa4join\xa8consumer\xa1x\xa6queues\x90\xa5about\xc4\x00",
    ("é" * 45).encode(),
)
_PLAIN = Basic.Properties(message_id="odd", delivery_mode=2).marshal()
_RANDOM = 40  # attacks by properties of any bytes


def attacks(server: RabbitServer, seed: int) -> list[Attack]:
    """Return attacks on all queues that there are when each is made."""
    chance = random.Random(seed)
    written = [(one, b"{}") for one in PROPERTIES.values()]
    written += [(_PLAIN, body) for body in (*NOTICES, *_RECORDS)]
    written += [(_any_properties(chance), b"{}") for _ in range(_RANDOM)]
    return [
        _attack(server, kind, properties, body) for kind in _KINDS for properties, body in written
    ]


def _any_properties(chance: random.Random) -> bytes:
    entries = b""
    for _ in range(chance.randint(0, 4)):
        key = chance.choice([b"aq-crashes", b"aq-due", b"aq-id", b"x-death", chance.randbytes(5)])
        kind = chance.choice([b"t", b"b", b"l", b"T", b"S", b"x", b"F", b"A", b"V"])
        size = {b"t": 1, b"b": 1, b"l": 8, b"T": 8, b"V": 0}.get(kind)
        value = chance.randbytes(8 if size is None else size)
        if kind in (b"F", b"A"):
            value = b""
        if size is None:
            value = struct.pack(">I", len(value)) + value
        entries += bytes([len(key)]) + key + kind + value
    name = chance.randbytes(chance.randint(0, 200))
    return b"".join(
        (b"\x20\x80", struct.pack(">I", len(entries)), entries, bytes([len(name)]), name)
    )


def _attack(server: RabbitServer, kind: str, properties: bytes, body: bytes) -> Attack:
    async def make() -> None:
        names = json.loads(await asyncio.to_thread(server.evaluate, _NAMES))
        start = f"aiotaskq.{kind}"
        found = [one for one in names if one == start or one.startswith(f"{start}.")]
        transport = await connect(parse_url(server.url()))
        try:
            channel = await transport.open_channel(confirms=True)
            batch = [AmqpPublication("", one, properties, body) for one in found]
            if batch:
                await channel.publish(batch).done
        except AmqpError:
            pass  # the server itself takes no such properties
        finally:
            await transport.close()

    return Attack(f"{kind}: properties {properties[:60]!r}, body {body[:60]!r}", make)
