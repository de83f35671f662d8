r"""Items: messages as they are stored in the keys of a queue, a readable head before the body.

This module is the only description of an item; the scripts read and write the same form, and touch
the head only::

    <crashes> <priority> <expires at, or -> <id>\n<body>

Behind the number of crashes, if there were any, follow a colon and how the last consumer died,
quoted as in a URL: ``2:its%20process%20died``. An item that is an argument of a script may have
``+<seconds>`` as its time of expiry: relative to the server's clock, which only the script knows.
A member of ``delayed`` is a serial number, a space and an item.
"""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import unquote

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.errors import EncodeError

_PLAIN = {b"0 %d - " % priority: priority for priority in range(10)}
"""The heads of most items, up to the id: no crashes, and no expiry."""


def is_text(name: str) -> bool:
    """Return whether a name can be sent at all: text with lone surrogates is no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def unstorable(error: Exception) -> EncodeError:
    """Return the error for callers, given why an envelope could not be sent."""
    return error if isinstance(error, EncodeError) else EncodeError(f"Redis: {error}")


def pack_id(name: str) -> bytes:
    """Return an id as it stands in a head: on one line."""
    if "\n" in name or "%" in name:
        name = name.replace("%", "%25").replace("\n", "%0A")
    return name.encode()


def unpack_id(text: bytes) -> str:
    """Return the id that `pack_id` was given."""
    name = text.decode(errors="replace")
    return unquote(name) if "%" in name else name


def pack_revision(revision: str) -> bytes:
    """Return the revision of a schedule as it is stored: on one line."""
    return revision.replace("%", "%25").replace("\n", "%0A").encode(errors="surrogateescape")


def unpack_revision(text: bytes) -> str:
    """Return the revision that `pack_revision` was given; any bytes make one that it gives back."""
    revision = text.decode(errors="surrogateescape")
    return revision.replace("%0A", "\n").replace("%25", "%")


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


def pack_with_due(envelope: Envelope, serials: SerialNumbers) -> tuple[bytes, bytes]:
    """Return the due time of an envelope, as scripts take it, and the item to store until then.

    An envelope that is not delayed has ``b""`` as its due time, and no serial number.
    """
    if envelope.delay is not None:
        due = b"+%.6f" % max(envelope.delay, 0.0)
    elif envelope.not_before is not None:
        due = b"%.6f" % envelope.not_before
    else:
        return b"", pack(envelope)
    return due, serials.next() + pack(envelope)


def unpack(item: bytes, queue: str, receipt: Any, now: float = 0.0) -> Delivery:
    """Return an item as a delivery, given the server's time.

    An item that `pack` did not make becomes a delivery with all its bytes as the body. The worker
    buries it, because it cannot read that.
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


class SerialNumbers:
    """Serial numbers of delayed items: they make them distinct, and keep them in order.

    Redis sorts members of equal score by their bytes, and a set has no member twice.
    """

    def __init__(self) -> None:
        self._last = 0
        self._ending = os.urandom(4).hex()  # of this client alone

    def next(self) -> bytes:
        """Return a number, greater than those before, and a space."""
        self._last = max(self._last + 1, time.time_ns())
        return f"{self._last:016x}{self._ending} ".encode()
