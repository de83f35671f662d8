"""Frames from the server, rewritten so that pamqp can read each of them.

pamqp reads a frame in aiormq's reader, and a value in it that is no text, no date, or nested too
deep ends the connection: again each time, since the message is delivered again. Senders choose such
values: the properties of a message, its exchange and its routing key. So these never reach pamqp.
The properties arrive as the bytes that they are, in a header frame that pamqp reads without looking
at them (`raw_properties`); `properties.py` reads them, and takes anything. The exchange and the
routing key of a delivery are dropped, as nothing here uses them. A text of the server itself that
was cut in the middle of a character is mended.

Theory of operation. The bytes of a connection come in pieces of any size. A method or a header is
held back until it is whole. A body passes through in the pieces in which it comes. Bytes that are
no AMQP pass unchanged from there on; aiormq reports them.
"""

from __future__ import annotations

import struct
from typing import Any

from pamqp import commands, constants

_HEAD = struct.Struct(">BHI")  # kind, channel, size
_INDEX = struct.Struct(">I")
_HEAD_SIZE = constants.FRAME_HEADER_SIZE
_TAIL = constants.FRAME_END_CHAR
_FIXED = 12  # bytes of a content header before its properties
_TABLE_ONLY = b"\x20\x00"  # flags: the only property is the table of headers
_RAW = struct.Struct(">IBcI")  # size of the table, length of its key, type of the value, its length
_RAW_OVERHEAD = 6  # bytes of the table beside the value
_DELIVER = commands.Basic.Deliver.index
_GET_OK = commands.Basic.GetOk.index
_TEXT_AT = {  # methods with a text of the server, and the place of its length
    commands.Channel.Close.index: 6,
    commands.Connection.Close.index: 6,
    commands.Connection.Blocked.index: 4,
}
_KINDS = frozenset(
    {
        constants.FRAME_METHOD,
        constants.FRAME_HEADER,
        constants.FRAME_BODY,
        constants.FRAME_HEARTBEAT,
    }
)


def raw_properties(properties: Any) -> bytes:
    """Return the bytes of a message's properties, flags included, from a frame rewritten here."""
    return bytes(properties.headers[""])


class FrameRewriter:
    """Rewrites the bytes of one connection as they arrive."""

    def __init__(self) -> None:
        self._held = b""  # the beginning of a frame
        self._passing = 0  # bytes left of a frame that passes through
        self._foreign = False  # whether it is no AMQP

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to read in place of these; empty if a frame is not whole yet."""
        if self._passing >= len(data) or self._foreign:
            self._passing = max(self._passing - len(data), 0)
            return data
        if self._held:
            data, self._held = self._held + data, b""
        parts: list[bytes] = []
        begin, at, size = 0, self._passing, len(data)
        self._passing = 0
        while size - at >= _HEAD_SIZE:
            kind, channel, length = _HEAD.unpack_from(data, at)
            if kind not in _KINDS:
                self._foreign = True
                return b"".join([*parts, data[begin:]])
            end = at + _HEAD_SIZE + length + 1
            if kind in (constants.FRAME_METHOD, constants.FRAME_HEADER):
                if end > size:
                    break
                rewrite = _header if kind == constants.FRAME_HEADER else _method
                payload = rewrite(data[at + _HEAD_SIZE : end - 1])
                if payload is not None:
                    parts += data[begin:at], _HEAD.pack(kind, channel, len(payload)), payload
                    begin = end - 1  # the last byte of the frame is kept
            elif end > size:
                self._passing, at = end - size, size
                break
            at = end
        parts.append(data[begin:at])
        self._held = data[at:]
        return b"".join(parts)


def _header(payload: bytes) -> bytes | None:
    properties = payload[_FIXED:]
    size = len(properties)
    raw = _RAW.pack(size + _RAW_OVERHEAD, 0, b"x", size)
    return b"".join((payload[:_FIXED], _TABLE_ONLY, raw, properties))


def _method(payload: bytes) -> bytes | None:
    """Return the bytes of a method in place of these; None to leave it as it is."""
    [index] = _INDEX.unpack_from(payload)
    if index == _DELIVER:
        # After its consumer tag, which is ours: delivery tag, redelivered, exchange, routing key.
        return payload[: 14 + payload[4]] + b"\0\0"
    if index == _GET_OK:
        return b"".join((payload[:13], b"\0\0", payload[-4:]))
    at = _TEXT_AT.get(index)
    if at is None:
        return None
    end = at + 1 + payload[at]
    text = payload[at + 1 : end].decode(errors="ignore").encode()
    return b"".join((payload[:at], bytes([len(text)]), text, payload[end:]))
