r"""What rests in the lists of a queue: a readable head, then the body as it was given.

``<crashes> <priority> <expires at, or -> <id>\n<body>``. Scripts know this form, too.
"""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import unquote

import msgspec

from aiotaskq.message import DeadLetter, Delivery, Envelope

_PLAIN = b"0 0 - "  # the head of most, up to the id


class _Burial(msgspec.Struct):
    died_at: float
    reason: str


_decode_burial = msgspec.json.Decoder(_Burial).decode


def pack_id(name: str) -> bytes:
    """Return an id as it stands in a head: on one line."""
    if "\n" in name or "%" in name:
        name = name.replace("%", "%25").replace("\n", "%0A")
    return name.encode()


def unpack_id(text: bytes) -> str:
    """Return the id that `pack_id` was given."""
    name = text.decode(errors="replace")
    return unquote(name) if "%" in name else name


def pack(envelope: Envelope) -> bytes:
    """Return an envelope as an item."""
    if envelope.expires_at is None:
        return b"0 %d - %b\n%b" % (envelope.priority, pack_id(envelope.id), envelope.body)
    expires_at = max(envelope.expires_at, 0.0)
    head = b"0 %d %.6f %b\n" % (envelope.priority, expires_at, pack_id(envelope.id))
    return head + envelope.body


def unpack(item: bytes, queue: str, receipt: Any, now: float = 0.0) -> Delivery:
    """Return an item as a delivery, given the server's time.

    One that was never packed becomes a delivery with all its bytes as the body, for the worker
    to bury with the reason that it cannot read them.
    """
    head, _, body = item.partition(b"\n")
    if head.startswith(_PLAIN):
        return Delivery(unpack_id(head[6:]), queue, body, receipt)
    try:
        crashes, priority, expires_at, name = head.split(b" ", 3)
        return Delivery(
            id=unpack_id(name),
            queue=queue,
            body=body,
            receipt=receipt,
            crashes=int(crashes),
            priority=int(priority),
            expired=expires_at != b"-" and float(expires_at) <= now,
        )
    except ValueError:
        return Delivery("", queue, item, receipt)


def unpack_dead(letter: bytes, queue: str) -> DeadLetter:
    """Return what `bury` of the scripts wrote as a dead letter."""
    head, _, item = letter.partition(b"\n")
    try:
        burial = _decode_burial(head)
    except msgspec.MsgspecError:  # not of our making, so all of it is payload
        burial, item = _Burial(0.0, "not a dead letter"), letter
    dead = unpack(item, queue, None)
    return DeadLetter(
        id=dead.id,
        queue=queue,
        body=dead.body,
        reason=burial.reason,
        crashes=dead.crashes,
        died_at=burial.died_at,
    )


class Serials:
    """Numbers that make delayed items distinct, and put those due at once in order."""

    def __init__(self) -> None:
        self._last = 0
        self._ending = os.urandom(4).hex()  # of this client alone

    def next(self) -> bytes:
        """Return a number, greater than those before, and a space."""
        self._last = max(self._last + 1, time.time_ns())
        return f"{self._last:016x}{self._ending} ".encode()


def place(envelope: Envelope, serials: Serials) -> tuple[bytes, bytes]:
    """Return when an envelope falls due, as scripts take it, and what to store until then."""
    if envelope.not_before is None:
        return b"", pack(envelope)
    return b"%.6f" % envelope.not_before, serials.next() + pack(envelope)
