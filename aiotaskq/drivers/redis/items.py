r"""What rests in the lists of a queue: a readable head, then the body as it was given.

``<crashes> <priority> <expires at, or -> <id>\n<body>``. Where there were crashes, a colon and
how the last consumer died follow their number, quoted as in a URL: ``2:its%20process%20died``. An
item on its way to a script may say ``+<seconds>`` for when it expires: the script knows the time.
Scripts know this form, too.
"""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import unquote

import msgspec

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import DeadLetter

_PLAIN = {b"0 %d - " % priority: priority for priority in range(10)}
"""The heads of most, up to the id: no crashes, and never to expire."""


class _Burial(msgspec.Struct):
    died_at: float
    reason: str
    details: int = 0  # bytes between this and the item


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
    if envelope.expires_in is not None:
        expires = b"+%.6f" % max(envelope.expires_in, 0.0)
    elif envelope.expires_at is not None:
        expires = b"%.6f" % max(envelope.expires_at, 0.0)
    else:
        return b"0 %d - %b\n%b" % (envelope.priority, pack_id(envelope.id), envelope.body)
    head = b"0 %d %b %b\n" % (envelope.priority, expires, pack_id(envelope.id))
    return head + envelope.body


def unpack(item: bytes, queue: str, receipt: Any, now: float = 0.0) -> Delivery:
    """Return an item as a delivery, given the server's time.

    One that was never packed becomes a delivery with all its bytes as the body, for the worker
    to bury with the reason that it cannot read them.
    """
    head, _, body = item.partition(b"\n")
    plain = _PLAIN.get(head[:6])
    if plain is not None:
        return Delivery(unpack_id(head[6:]), queue, body, receipt, 0, plain)
    try:
        first, priority, expires, name = head.split(b" ", 3)
        crashes, _, note = first.partition(b":")
        expires_at = None if expires == b"-" else float(expires)
        return Delivery(
            id=unpack_id(name),
            queue=queue,
            body=body,
            receipt=receipt,
            crashes=int(crashes),
            priority=int(priority),
            expired=expires_at is not None and expires_at <= now,
            expires_at=expires_at,
            crash_note=unquote(note.decode(errors="replace")),
        )
    except ValueError:
        return Delivery("", queue, item, receipt)


def unpack_dead(key: bytes, letter: bytes, queue: str) -> DeadLetter:
    """Return what `bury` of the scripts wrote as a dead letter."""
    head, _, rest = letter.partition(b"\n")
    try:
        burial = _decode_burial(head)
    except msgspec.MsgspecError:  # not of our making, so all of it is payload
        burial, rest = _Burial(0.0, "not a dead letter"), letter
    dead = unpack(rest[burial.details :], queue, None)
    return DeadLetter(
        key=key.decode(errors="replace"),
        id=dead.id,
        queue=queue,
        body=dead.body,
        reason=burial.reason,
        crashes=dead.crashes,
        died_at=burial.died_at,
        details=rest[: burial.details],
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
    if envelope.delay is not None:
        due = b"+%.6f" % max(envelope.delay, 0.0)
    elif envelope.not_before is not None:
        due = b"%.6f" % envelope.not_before
    else:
        return b"", pack(envelope)
    return due, serials.next() + pack(envelope)
