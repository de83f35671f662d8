"""Frames and properties of any content are read, without a server."""

from __future__ import annotations

import datetime
import random
import struct
from typing import Any

import pytest
from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.heartbeat import Heartbeat

from aiotaskq.drivers.rabbitmq.frames import FrameRewriter, raw_properties
from aiotaskq.drivers.rabbitmq.properties import AmqpProperties


def header_frame(properties: bytes, size: int = 0) -> bytes:
    payload = struct.pack(">HxxQ", 60, size) + properties
    return struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"


def shortstr(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def deliver(exchange: bytes, key: bytes) -> bytes:
    payload = struct.pack(">I", commands.Basic.Deliver.index) + shortstr(b"tag")
    payload += struct.pack(">QB", 7, 1) + shortstr(exchange) + shortstr(key)
    return struct.pack(">BHI", 1, 1, len(payload)) + payload + b"\xce"


def read_all(data: bytes) -> list[Any]:
    frames = []
    while data:
        size, _, one = frame.unmarshal(data)
        frames.append(one)
        data = data[size:]
    return frames


STREAM = b"".join(
    (
        frame.marshal(commands.Queue.DeclareOk("q", 1, 2), 1),
        deliver(b"\xff\xfe", b"\xc3"),
        header_frame(b"\x00\x80" + shortstr(b"\xff"), 300_000),
        frame.marshal(ContentBody(b"x" * 131_000), 1),
        frame.marshal(ContentBody(b"\xce" * 169_000), 1),
        frame.marshal(Heartbeat(), 0),
        header_frame(commands.Basic.Properties(message_id="m", delivery_mode=2).marshal()),
    )
)


@pytest.mark.parametrize("most", [1, 7, 8, 64, 4096, 10**9])
def test_frames_are_rewritten_whatever_the_pieces_in_which_they_come(most: int) -> None:
    rewriter, sizes = FrameRewriter(), random.Random(most)
    out: list[bytes] = []
    at = 0
    while at < len(STREAM):
        size = sizes.randint(1, most) if most > 1 else 1
        out.append(rewriter.feed(STREAM[at : at + size]))
        at += size
    declared, delivered, odd, first, second, _, plain = read_all(b"".join(out))
    assert (declared.queue, declared.message_count) == ("q", 1)
    assert (delivered.consumer_tag, delivered.delivery_tag) == ("tag", 7)
    assert delivered.redelivered
    assert odd.body_size == len(first.value) + len(second.value)
    assert AmqpProperties(raw_properties(odd.properties)).message_id == "\\xff"
    assert AmqpProperties(raw_properties(plain.properties)).message_id == "m"


def test_a_text_of_the_server_that_was_cut_in_a_character_is_read() -> None:
    text = "NOT_FOUND - no queue 'ü".encode()[:-1]
    payload = (
        struct.pack(">IH", commands.Channel.Close.index, 404) + shortstr(text) + b"\0\x32\0\x0a"
    )
    data = struct.pack(">BHI", 1, 1, len(payload)) + payload + b"\xce"
    [close] = read_all(FrameRewriter().feed(data))
    assert (close.reply_code, close.reply_text) == (404, "NOT_FOUND - no queue '")
    assert (close.class_id, close.method_id) == (50, 10)


def test_bytes_that_are_no_frames_pass_unchanged() -> None:
    rewriter = FrameRewriter()
    says = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    assert rewriter.feed(says) + rewriter.feed(b"more") == says + b"more"


# --- properties ---------------------------------------------------------------------------------


def table(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack(">I", len(body)) + body


def nested(depth: int, kind: bytes = b"F") -> bytes:
    value = table()
    for _ in range(depth):
        value = table((b"\x01k" if kind == b"F" else b"") + kind + value)
    return value


def with_headers(*entries: bytes, message_id: bytes = b"m") -> AmqpProperties:
    return AmqpProperties(b"\x20\x80" + table(*entries) + shortstr(message_id))


ODD_ENTRIES = {
    "a year that there is not": b"\x01a" + b"T" + struct.pack(">Q", 2**63 + 5),
    "tables 3000 deep": b"\x01a" + b"F" + nested(3000),
    "lists 3000 deep": b"\x01a" + b"A" + nested(3000, b"A"),
    "a number that is none": b"\x01a" + b"d" + struct.pack(">d", float("nan")),
    "a decimal": b"\x01a" + b"D" + b"\xff" + b"\xff" * 4,
    "no value": b"\x01a" + b"V",
    "no text": b"\x01a" + b"S" + struct.pack(">I", 2) + b"\xff\xfe",
    "a name that is no text": b"\x02\xff\xfe" + b"t\x01",
    "no name": b"\x00" + b"t\x01",
}


@pytest.mark.parametrize("odd", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
def test_an_odd_header_hides_no_other(odd: bytes) -> None:
    ours = b"\x05count" + b"I" + struct.pack(">i", 5)
    for entries in ((odd, ours), (ours, odd)):
        read = with_headers(*entries)
        assert (read.headers["count"], read.message_id) == (5, "m")


def test_an_unknown_type_hides_only_the_headers_behind_it() -> None:
    ours = b"\x05count" + b"b\x05"
    read = with_headers(ours, b"\x01a" + b"?", b"\x01b" + b"b\x05")
    assert (read.headers, read.message_id) == ({"count": 5}, "m")


def test_what_the_library_writes_is_read() -> None:
    at = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    headers = {
        "x-death": [{"reason": "expired", "time": at, "routing-keys": ["q"]}],
        "n": -3,
        "big": 2**40,
        "bytes": bytearray(b"\xff"),
        "text": "ü" * 100,
        "yes": True,
    }
    raw = commands.Basic.Properties(
        headers=headers,  # type: ignore[arg-type]  # pamqp's types are too narrow
        content_type="text/plain",
        content_encoding="utf-8",
        delivery_mode=2,
        priority=3,
        correlation_id="c",
        reply_to="r",
        expiration="77",
        message_id="m",
        timestamp=at,
        app_id="a",
    ).marshal()
    read = AmqpProperties(raw)
    assert (read.correlation_id, read.reply_to, read.expiration) == ("c", "r", "77")
    assert read.message_id == "m"
    death = {"reason": "expired", "time": int(at.timestamp()), "routing-keys": ["q"]}
    assert read.headers == {**headers, "bytes": b"\xff", "x-death": [death]}


def test_no_bytes_make_reading_raise() -> None:
    values = random.Random(12)
    whole = commands.Basic.Properties(
        headers={"a": [1, {"b": "c"}], "d": 1.5}, correlation_id="c", message_id="m"
    ).marshal()
    for _ in range(20_000):
        raw = bytearray(whole[: values.randint(0, len(whole))])
        for _ in range(values.randint(0, 3)):
            if raw:
                raw[values.randrange(len(raw))] = values.randrange(256)
        AmqpProperties(bytes(raw))
        AmqpProperties(values.randbytes(values.randint(0, 30)))
