"""Messages as they rest in RabbitMQ: the body as it was given, the rest in its properties."""

from __future__ import annotations

import math
import re
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

import msgspec
from pamqp.commands import Basic

from aiotaskq.contract.message import SUSPECT, Delivery, Envelope
from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers.rabbitmq.channel import Content, Publication, pack
from aiotaskq.drivers.rabbitmq.names import Names
from aiotaskq.errors import Unsupported

# AMQP has no number of 64 bits with a fraction in pamqp: times are whole microseconds.
ID, LOSSES, EXPIRES, LIFE = "aq-id", "aq-crashes", "aq-expires", "aq-life"
KEY, REASON, DETAILS, DIGIT = "aq-key", "aq-reason", "aq-details", "aq-digit-"
PAYLOAD = "aq-payload"  # bytes of a dead letter's body; what is said of it comes behind them
COUNT = "x-delivery-count"
ACQUIRED = "x-acquired-count"  # from RabbitMQ 4.3 on each hand-out, as `COUNT` has it before
LOST = "the connection of its worker to RabbitMQ was lost, as it is when a worker dies"

_PERSISTENT = 2
_LONGEST_ID = 255  # bytes of AMQP's short string
# All headers go in one frame, and the server closes the connection of whoever sends a longer one.
_LONGEST_HEADERS = 2000  # bytes of reason and details; the least that frames can be set to is 4096
_LONGEST_REASON = 100_000  # characters
_LONGEST_DETAILS = 4 * 2**20  # bytes: with the payload they count for the server's max_message_size
_PLAIN = struct.pack(">HB", 0x1000 | 0x0080, _PERSISTENT)  # delivery mode and message id
_DIGITS = 8  # of 16 each: a queue can hold messages back for 2 ** 32 milliseconds
_LONG = 16**_DIGITS - 1  # milliseconds, for each of the steps beyond
_STEPS = 8
_LATEST = 2**53  # microseconds: the year 2255, up to which they survive as a float
_MOST_LOSSES = 2**31 - 1  # more nobody has counted; copies count on from it
_NUMBER = re.compile("[0-9]{20}")  # a key that `new_key` gave

PLAIN_PROPERTIES = struct.pack(">HB", 0x1000, _PERSISTENT)
"""Of a message that has no more than a body."""

POSITIONS = _DIGITS + _STEPS
"""Of a delay: how many queues a message may have to pass at most."""

LONGEST_DELAY = (_STEPS + 1) * _LONG / 1000
"""Seconds."""


Life: TypeAlias = tuple[str, str]
"""A message and its copies: the id, and what tells it from others that were stored under the id."""


class Hop(NamedTuple):
    """A queue in which a message waits on its way."""

    position: int
    digit: int
    milliseconds: int


def hops(seconds: float) -> list[Hop]:
    """Return where a message that is delayed waits, in this order.

    The time is cut into digits of 16, and each digit is a queue in which all messages wait for the
    same time: so none waits behind one that is due later. One without a delay waits nowhere.

    Raises:
        Unsupported: It is too long.
    """
    if seconds <= 0.0:
        return []
    if seconds > LONGEST_DELAY:
        raise Unsupported(
            f"RabbitMQ cannot delay a task for {seconds / 86_400:.0f} days; the most is"
            f" {LONGEST_DELAY / 86_400:.0f}"
        )
    # The server cuts fractions off: a message may leave each queue so much too early.
    wanted = math.ceil(seconds * 1000)
    wanted += sum(1 for _ in _cut(wanted))
    # The last digit leads to the message's own queue, so it is never 0.
    return list(_cut(wanted if wanted & 15 else wanted + 1))


def _cut(milliseconds: int) -> Iterator[Hop]:
    steps, rest = divmod(milliseconds, _LONG)
    for step in reversed(range(min(steps, _STEPS))):
        yield Hop(_DIGITS + step, 1, _LONG)
    rest += max(0, steps - _STEPS) * _LONG
    for position in reversed(range(_DIGITS)):
        digit = rest >> 4 * position & 15
        if digit:
            yield Hop(position, digit, digit << 4 * position)


def delay_of(envelope: Envelope, now: float) -> float:
    """Return the seconds for which an envelope is to be kept from now on; 0: not at all."""
    if envelope.delay is not None:
        return max(envelope.delay, 0.0)
    return 0.0 if envelope.not_before is None else max(envelope.not_before - now, 0.0)


def write(
    envelope: Envelope, names: Names, path: list[Hop], now: float, *, anew: bool = False
) -> Publication:
    """Return an envelope as it is published.

    Args:
        envelope: What is published.
        names: What queues are called.
        path: Where it waits before.
        now: The time.
        anew: Whether another message of its id was lost before: what is said of the losses of that
            one is not said of this one.
    """
    expires = envelope.expires_at
    if envelope.expires_in is not None:
        expires = now + envelope.expires_in
    key = names.ready(envelope.queue)
    encoded = envelope.id.encode()
    if expires is None and not path and not anew and len(encoded) <= _LONGEST_ID:
        return Publication("", key, b"%b%c%b" % (_PLAIN, len(encoded), encoded), envelope.body)
    headers: dict[str, Any] = {}
    if anew:
        headers[LIFE] = uuid.uuid4().hex
    if expires is not None:
        headers[EXPIRES] = round(expires * 1e6)
    for hop in path:
        headers[f"{DIGIT}{hop.position}"] = hop.digit
    if path:
        for position in range(path[0].position):
            headers.setdefault(f"{DIGIT}{position}", 0)
    exchange = names.level(path[0].position) if path else ""
    return Publication(exchange, key, _properties(envelope.id, headers), envelope.body)


def _properties(name: str, headers: Mapping[str, Any]) -> bytes:
    if len(name.encode()) > _LONGEST_ID:
        return pack(Basic.Properties(headers={**headers, ID: name}, delivery_mode=_PERSISTENT))
    return pack(
        Basic.Properties(headers=dict(headers) or None, delivery_mode=_PERSISTENT, message_id=name)
    )


class Item:
    """A message that was handed out.

    Attributes:
        tag: Of this hand-out, on its channel.
        id: The envelope's id.
        queue: The envelope's queue.
        life: What its copies have in common.
        losses: Hand-outs that ended with the connection of their consumer.
        spared: How many of these were no crashes, as is known by now.
        redelivered: Whether it was handed out before, which may not be counted in `losses`.
        suspects: Whether it comes from where the suspects are.
    """

    __slots__ = (
        "body",
        "expires",
        "id",
        "life",
        "losses",
        "queue",
        "redelivered",
        "spared",
        "suspects",
        "tag",
    )

    def __init__(self, content: Content, queue: str, *, suspects: bool = False) -> None:
        properties = content.properties
        headers: Mapping[str, Any] = properties.headers or {}
        self.tag: int = content.method.delivery_tag
        self.queue = queue
        self.suspects = suspects
        self.body = content.body
        self.id = _name(properties)
        self.life: Life = self.id, _text(headers.get(LIFE))
        expires = headers.get(EXPIRES)
        # Anybody can write to a queue: what is odd is taken as if it were not there.
        self.expires: float | None = None
        if isinstance(expires, int) and abs(expires) < _LATEST:
            self.expires = expires / 1e6
        counted = headers.get(ACQUIRED, headers.get(COUNT))
        self.losses: int = _count(headers.get(LOSSES)) + _count(counted)
        self.spared = 0
        self.redelivered: bool = content.method.redelivered and counted is None

    @property
    def crashes(self) -> int:
        """How many consumers died while they held it."""
        return max(self.losses - self.spared, 0)

    def copy(self, names: Names, *, more: int = 0) -> Publication:
        """Return it as it is published once more, with its losses and so many more."""
        suspect = self.crashes + more >= SUSPECT
        key = names.suspects(self.queue) if suspect else names.ready(self.queue)
        headers = self._headers(self.losses + more)
        return Publication("", key, _properties(self.id, headers), self.body)

    def letter(self, names: Names, reason: str, details: bytes) -> Publication:
        """Return it as a dead letter."""
        headers = self._headers(self.crashes)
        headers[KEY] = new_key()
        body = self.body
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}... and {len(reason) - _LONGEST_REASON} more"
        if len(details) > _LONGEST_DETAILS:
            details = b""  # cut they could not be read; the payload says the most of it
        if len(reason.encode()) + len(details) <= _LONGEST_HEADERS:
            # bytearray: pamqp writes bytes as text, which they need not be.
            headers |= {REASON: reason, DETAILS: bytearray(details)}
        else:
            headers[PAYLOAD] = len(body)
            body += _encode_said((reason, details))
        return Publication(
            names.graves, names.dead(self.queue), _properties(self.id, headers), body
        )

    def delivery(self, receipt: Any) -> Delivery:
        """Return it as it is handed out."""
        expires = self.expires
        return Delivery(
            self.id,
            self.queue,
            self.body,
            receipt,
            crashes=self.crashes,
            expired=expires is not None and expires <= time.time(),
            expires_at=expires,
            crash_note=LOST if self.losses else "",
        )

    def _headers(self, losses: int) -> dict[str, Any]:
        headers: dict[str, Any] = {}
        if losses:
            headers[LOSSES] = losses
        if self.life[1]:
            headers[LIFE] = self.life[1]
        if self.expires is not None:
            headers[EXPIRES] = round(self.expires * 1e6)
        return headers


_last_key = 0


def new_key() -> str:
    """Return a key that sorts behind all that this process gave before."""
    global _last_key
    _last_key = max(_last_key + 1, time.time_ns())
    return f"{_last_key:020d}"


def read_letter(content: Content, queue: str) -> DeadLetter:
    """Return a dead letter as it came from its queue."""
    headers: Mapping[str, Any] = content.properties.headers or {}
    name = _name(content.properties)
    key, reason = _text(headers.get(KEY)), _text(headers.get(REASON))
    if not _NUMBER.fullmatch(key):  # not from here: so the server itself took it out of its queue
        nanoseconds, why = _taken_out(headers)
        key = f"{nanoseconds:020d}.{name}"
        reason = reason or f"RabbitMQ took it out of its queue: {why}"
    body, reason, details = _said(content.body, headers, reason)
    return DeadLetter(
        key=key,
        id=name,
        queue=queue,
        body=body,
        reason=reason,
        crashes=_count(headers.get(LOSSES)),
        died_at=int(key.partition(".")[0]) / 1e9,
        details=details,
    )


def _taken_out(headers: Mapping[str, Any]) -> tuple[int, str]:
    """Return when the server took a message out of its queue, in nanoseconds, and why."""
    match headers.get("x-death"):
        case [{"time": datetime() as died, **death}, *_]:
            return int(died.timestamp()) * 10**9, str(death.get("reason", "no reason given"))
    return 0, "no reason given"


def _name(properties: Any) -> str:
    name = (properties.headers or {}).get(ID) or properties.message_id
    return _text(name)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return min(value, _MOST_LOSSES) if isinstance(value, int) and value > 0 else 0


_encode_said = msgspec.msgpack.Encoder().encode
_decode_said = msgspec.msgpack.Decoder(tuple[str, bytes]).decode


def _said(body: bytes, headers: Mapping[str, Any], reason: str) -> tuple[bytes, str, bytes]:
    """Return a letter's payload, its reason and the details."""
    size = headers.get(PAYLOAD)
    if isinstance(size, int) and 0 <= size < len(body):
        try:
            return body[:size], *_decode_said(body[size:])
        except msgspec.MsgspecError:
            pass  # somebody else's header: then all of it is the payload
    details = headers.get(DETAILS)
    return body, reason, bytes(details) if isinstance(details, bytes | bytearray) else b""
