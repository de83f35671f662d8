"""Messages and dead letters as they rest in RabbitMQ: the body unchanged, the rest in properties.

Facts that a broker acts on are headers. A message whose only fact is its id needs none. Anybody
with access to the server can write to a queue, so a header of an odd type or value is read as if it
were absent, and what is longer than anything of ours is cut or dropped: so each message that came
can also be sent back, or become a dead letter. Nothing here raises on a message that arrived.

Lineage. A message that goes back to its queue uncounted is a copy, and one that is tried again is a
new message under the same id. The lineage distinguishes them: copies share it, so that losses which
were no crashes (`membership/`) stay known for them; a new message gets another one.
"""

from __future__ import annotations

import re
import struct
import time
import uuid
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
from pamqp.commands import Basic

from aiotaskq.contract.message import SUSPECT, Delivery, Envelope
from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers.rabbitmq.channel import AmqpMessage, AmqpPublication
from aiotaskq.drivers.rabbitmq.delays import DIGIT_HEADER, LONGEST_DELAY, Hop, delay_of, hops
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.properties import AmqpProperties
from aiotaskq.errors import ConfigError

# Times are whole microseconds: pamqp has no AMQP number of 64 bits with a fraction.
_ID, _LOSSES, _EXPIRES, _LINEAGE = "aq-id", "aq-crashes", "aq-expires", "aq-life"
_PRIORITY = "aq-priority"  # of a suspect: the queue of suspects holds all priorities
_DUE = "aq-due"  # of a message whose delay is longer than one way through the queues of delays
_KEY, _REASON, _DETAILS = "aq-key", "aq-reason", "aq-details"
_PAYLOAD = "aq-payload"  # bytes of the payload; reason and details follow it in the body
_DELIVERY_COUNT = "x-delivery-count"  # of a quorum queue: deliveries that were not acknowledged
_ACQUIRED_COUNT = "x-acquired-count"  # from RabbitMQ 4.3 on the same under another name
_CRASH_NOTE = "the connection of its worker to RabbitMQ was lost, as it is when a worker dies"

_PERSISTENT = 2
_LONGEST_SHORT = 255  # bytes of AMQP's short string
# All headers go in one frame, and the server closes the connection of a client with a longer one.
# The smallest frame_max of a server is 4096: room for these three, and for our other headers.
_LONGEST_ID = 1000  # bytes
_LONGEST_HEADERS = 2000  # bytes of reason and details
_LONGEST_LINEAGE = 100  # bytes of its mark, as far as it is read
_LONGEST_REASON = 100_000  # characters
_LONGEST_DETAILS = 4 * 2**20  # bytes; with the payload they count for the server's max_message_size
_PLAIN = struct.pack(">HB", 0x1000 | 0x0080, _PERSISTENT)  # delivery mode and message id
_LATEST = 2**53  # microseconds: the year 2255, up to which a float holds them exactly
_LAST = 2**62  # microseconds: longer than all that AMQP's numbers hold
_LAST_SECOND = 2**33  # of a date; a larger number is one of milliseconds
_HIGHEST = 9  # priority
_MOST_LOSSES = 2**31 - 1  # more than any message has; copies continue the count
_LAST_NANOSECOND = 10**20 - 1  # of a key
_OUR_KEY = re.compile(r"[0-9]{20}")  # given by `_new_key`
_ANY_KEY = re.compile(r"[0-9]{20}(\..*)?", re.DOTALL)

PLAIN_PROPERTIES = struct.pack(">HB", 0x1000, _PERSISTENT)
"""The properties of a message that has no more than a body."""

Lineage: TypeAlias = tuple[str, str]
"""The id of a message, and a mark of this message and its copies among all under that id."""


def publication_of(
    envelope: Envelope, names: RabbitNames, path: list[Hop], now: float, *, anew: bool = False
) -> AmqpPublication:
    """Return an envelope as it is published.

    Args:
        envelope: The envelope.
        names: The names of queues.
        path: The queues in which it waits before it is due.
        now: The current Unix time.
        anew: Whether a message of this id may have been lost before. Losses of that one must
            not be subtracted from those of this one, so it gets a lineage of its own.

    Raises:
        ConfigError: Its id or the name of its queue is longer than RabbitMQ takes.
    """
    expires = envelope.expires_at
    if envelope.expires_in is not None:
        expires = now + envelope.expires_in
    key = names.ready(envelope.queue, envelope.priority)
    encoded = encode_id(envelope.id)
    if expires is None and not path and not anew and len(encoded) <= _LONGEST_SHORT:
        return AmqpPublication("", key, b"%b%c%b" % (_PLAIN, len(encoded), encoded), envelope.body)
    headers: dict[str, Any] = {}
    if anew:
        headers[_LINEAGE] = uuid.uuid4().hex
    if expires is not None:
        headers[_EXPIRES] = _microseconds(expires)
    if (delay := delay_of(envelope, now)) > LONGEST_DELAY:
        headers[_DUE] = _microseconds(now + delay)
    exchange = _lead(headers, names, path)
    return AmqpPublication(exchange, key, _properties(envelope.id, headers), envelope.body)


def encode_id(message_id: str) -> bytes:
    """Return an id as bytes.

    Raises:
        ConfigError: It is longer than the driver takes, or no text.
    """
    try:
        encoded = message_id.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the id {message_id[:30]!r} has characters that are no text") from None
    if len(encoded) > _LONGEST_ID:
        raise ConfigError(
            f"an id has {len(encoded):,} bytes ({message_id[:30]!r}...); with RabbitMQ it may have"
            f" {_LONGEST_ID:,}"
        )
    return encoded


def _microseconds(seconds: float) -> int:
    return round(max(-_LAST, min(seconds * 1e6, _LAST)))


def _lead(headers: dict[str, Any], names: RabbitNames, path: list[Hop]) -> str:
    """Add the headers that lead along a path; return the exchange where it begins."""
    if not path:
        return ""
    headers |= {f"{DIGIT_HEADER}{position}": 0 for position in range(path[0].position)}
    headers |= {f"{DIGIT_HEADER}{hop.position}": hop.digit for hop in path}
    return names.delay_exchange(path[0].position)


def _properties(message_id: str, headers: dict[str, Any]) -> bytes:
    properties = Basic.Properties(
        headers=headers or None, delivery_mode=_PERSISTENT, message_id=message_id
    )
    if len(message_id.encode()) > _LONGEST_SHORT:
        properties.headers, properties.message_id = {**headers, _ID: message_id}, None
    return properties.marshal()


class RabbitMessage:
    """A message that was delivered to a consumer.

    Attributes:
        tag: The delivery tag on the consumer's channel.
        id: The envelope's id.
        queue: The envelope's queue.
        priority: The envelope's priority.
        lineage: Shared with its copies.
        losses: Deliveries that ended with the connection of their consumer.
        harmless_losses: Those of them that were no crashes, as far as is known by now.
        redelivered: Whether it was delivered before, and `losses` may not count that.
        from_suspects: Whether it comes from the queue of suspects.
        path: The queues in which it has to wait once more; empty if it is due.
    """

    __slots__ = (
        "_due",
        "body",
        "expires",
        "from_suspects",
        "harmless_losses",
        "id",
        "lineage",
        "losses",
        "path",
        "priority",
        "queue",
        "redelivered",
        "tag",
    )

    def __init__(self, message: AmqpMessage, queue: str, priority: int | None = 0) -> None:
        """Read a message.

        Args:
            message: The message as it arrived.
            queue: The task queue that it belongs to.
            priority: The priority of the queue that it comes from; None: it is that of suspects.
        """
        properties = message.properties
        headers = properties.headers
        self.tag: int = message.method.delivery_tag
        self.queue = queue
        self.from_suspects = priority is None
        self.priority = _priority(headers.get(_PRIORITY)) if priority is None else priority
        self.body = message.body
        self.id = _id(properties)
        mark = _text(headers.get(_LINEAGE))
        self.lineage: Lineage = self.id, mark if len(mark) <= _LONGEST_LINEAGE else ""
        expires = headers.get(_EXPIRES)
        self.expires: float | None = None
        if isinstance(expires, int) and abs(expires) < _LATEST:
            self.expires = expires / 1e6
        counted = headers.get(_ACQUIRED_COUNT, headers.get(_DELIVERY_COUNT))
        self.losses: int = _count(headers.get(_LOSSES)) + _count(counted)
        self.harmless_losses = 0
        due = headers.get(_DUE)
        self._due = min(due, _LAST) if isinstance(due, int) else 0
        self.path = hops(self._due / 1e6 - time.time()) if self._due else []
        self.redelivered: bool = message.method.redelivered and counted is None

    @property
    def crashes(self) -> int:
        """The number of consumers that died while they held it."""
        return max(self.losses - self.harmless_losses, 0)

    def copy(self, names: RabbitNames, *, more: int = 0) -> AmqpPublication:
        """Return the publication of a copy, with `more` losses than this one has."""
        suspect = self.crashes + more >= SUSPECT and not self.path
        headers = self._headers(self.losses + more)
        if suspect:
            key = names.suspects(self.queue)
            if self.priority:
                headers[_PRIORITY] = self.priority
        else:
            key = names.ready(self.queue, self.priority)
        if self.path:
            headers[_DUE] = self._due
        exchange = _lead(headers, names, self.path)
        return AmqpPublication(exchange, key, _properties(self.id, headers), self.body)

    def dead_letter(self, names: RabbitNames, reason: str, details: bytes) -> AmqpPublication:
        """Return the publication that stores it as a dead letter."""
        headers = self._headers(self.crashes)
        headers[_KEY] = _new_key()
        body = self.body
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}... and {len(reason) - _LONGEST_REASON} more"
        if len(details) > _LONGEST_DETAILS:
            details = b""  # a part of them cannot be read, and the payload is worth more
        reason = reason.encode(errors="backslashreplace").decode()
        if len(reason.encode()) + len(details) <= _LONGEST_HEADERS:
            # bytearray: pamqp writes bytes as text, and these need not be text.
            headers |= {_REASON: reason, _DETAILS: bytearray(details)}
        else:
            headers[_PAYLOAD] = len(body)
            body += _encode_appendix((reason, details))
        return AmqpPublication(
            names.dead_exchange, names.dead(self.queue), _properties(self.id, headers), body
        )

    def delivery(self, receipt: Any) -> Delivery:
        """Return its delivery with a receipt."""
        expires = self.expires
        return Delivery(
            self.id,
            self.queue,
            self.body,
            receipt,
            crashes=self.crashes,
            priority=self.priority,
            expired=expires is not None and expires <= time.time(),
            expires_at=expires,
            crash_note=_CRASH_NOTE if self.losses else "",
        )

    def _headers(self, losses: int) -> dict[str, Any]:
        headers: dict[str, Any] = {}
        if losses:
            headers[_LOSSES] = losses
        if self.lineage[1]:
            headers[_LINEAGE] = self.lineage[1]
        if self.expires is not None:
            headers[_EXPIRES] = _microseconds(self.expires)
        return headers


# --- dead letters -------------------------------------------------------------------------------

_last_key = 0


def _new_key() -> str:
    """Return a key that sorts behind every key that this process gave before."""
    global _last_key
    _last_key = max(_last_key + 1, time.time_ns())
    return f"{_last_key:020d}"


def is_key(text: str) -> bool:
    """Return whether a text has the form of the keys that dead letters have here.

    They are 20 digits, or 20 digits, a dot and the id of a message that the server itself took out
    of its queue.
    """
    return _ANY_KEY.fullmatch(text) is not None


def read_dead_letter(message: AmqpMessage, queue: str) -> DeadLetter:
    """Read a dead letter from a message of a queue of dead letters."""
    headers = message.properties.headers
    message_id = _id(message.properties)
    key, reason = _text(headers.get(_KEY)), _text(headers.get(_REASON))
    if not _OUR_KEY.fullmatch(key):  # not written here: the server took it out of its queue
        nanoseconds, cause = _removal(headers)
        key = f"{min(max(nanoseconds, 0), _LAST_NANOSECOND):020d}.{message_id}"
        reason = reason or f"RabbitMQ took it out of its queue: {cause}"
    body, reason, details = _split_body(message.body, headers, reason)
    return DeadLetter(
        key=key,
        id=message_id,
        queue=queue,
        body=body,
        reason=reason,
        crashes=_count(headers.get(_LOSSES)),
        died_at=int(key.partition(".")[0]) / 1e9,
        details=details,
    )


def _removal(headers: Mapping[str, Any]) -> tuple[int, str]:
    """Return the time and the cause of the server's removal of a message, in nanoseconds."""
    match headers.get("x-death"):
        case [{"time": int() as died, **death}, *_]:
            seconds = died if died < _LAST_SECOND else died // 1000
            return seconds * 10**9, str(death.get("reason", "no reason given"))
    return 0, "no reason given"


_encode_appendix = msgspec.msgpack.Encoder().encode
_decode_appendix = msgspec.msgpack.Decoder(tuple[str, bytes]).decode


def _split_body(body: bytes, headers: Mapping[str, Any], reason: str) -> tuple[bytes, str, bytes]:
    """Return the payload of a dead letter, its reason and its details."""
    size = headers.get(_PAYLOAD)
    if isinstance(size, int) and 0 <= size < len(body):
        try:
            return body[:size], *_decode_appendix(body[size:])
        except (msgspec.MsgspecError, RecursionError):
            pass  # the header is not ours: the whole body is the payload
    details = headers.get(_DETAILS)
    return body, reason, details if isinstance(details, bytes) else b""


# --- odd values ---------------------------------------------------------------------------------


def _id(properties: AmqpProperties) -> str:
    found = _text(properties.headers.get(_ID)) or properties.message_id
    return found if len(found) <= _LONGEST_ID // 4 else _cut(found)


def _cut(message_id: str) -> str:
    """Return as much of an id as goes back to the server."""
    return message_id.encode()[:_LONGEST_ID].decode(errors="ignore")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _priority(value: Any) -> int:
    return min(max(value, 0), _HIGHEST) if isinstance(value, int) else 0


def _count(value: Any) -> int:
    return min(value, _MOST_LOSSES) if isinstance(value, int) and value > 0 else 0
