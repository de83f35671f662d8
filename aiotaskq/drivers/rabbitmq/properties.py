"""Properties of messages that arrive: reading takes any bytes, and never raises.

Anybody who may write to a queue of the server chooses them. A value that cannot be read is absent,
and the others are there. Tables and lists in the headers are read a few levels deep, which the
server's own (`x-death`) need; deeper ones are skipped as a whole, by their length. Dates are whole
seconds since 1970, as they are sent.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from typing import Any

_DEEPEST = 4  # levels of tables and lists
_SHORT_TEXTS = {  # properties that are short strings, and those of them that are used
    15: "",  # content type
    14: "",  # content encoding
    10: "correlation_id",
    9: "reply_to",
    8: "expiration",
    7: "message_id",
}
_HEADERS, _ONE_BYTE = 13, (12, 11)  # delivery mode, priority
_NUMBERS = {
    b"t": struct.Struct(">?"),
    b"b": struct.Struct(">b"),
    b"B": struct.Struct(">B"),
    b"s": struct.Struct(">h"),
    b"u": struct.Struct(">H"),
    b"I": struct.Struct(">i"),
    b"i": struct.Struct(">I"),
    b"l": struct.Struct(">q"),
    b"L": struct.Struct(">q"),
    b"T": struct.Struct(">Q"),
    b"f": struct.Struct(">f"),
    b"d": struct.Struct(">d"),
}
_DECIMAL_SIZE = 5  # bytes
_LENGTH = struct.Struct(">I")
_PLAIN = b"\x10\x80\x02"  # flags and delivery mode of a message that has only an id beside


class AmqpProperties:
    """The properties of a message that are used here; one that is absent is empty.

    Attributes:
        headers: The headers by name. Values of types that are not used are absent.
        correlation_id: Chosen by an asker, returned with the answer.
        reply_to: The queue for an answer.
        expiration: Milliseconds, as decimal digits.
        message_id: The id; bytes of it that are no text are written in hexadecimal.
    """

    __slots__ = ("correlation_id", "expiration", "headers", "message_id", "reply_to")

    def __init__(self, raw: bytes) -> None:
        """Read properties.

        Args:
            raw: Their bytes, flags included.
        """
        self.headers: Mapping[str, Any] = {}
        self.correlation_id = self.reply_to = self.expiration = self.message_id = ""
        if raw.startswith(_PLAIN) and len(raw) > len(_PLAIN):  # as nearly all messages are
            self.message_id = raw[4 : 4 + raw[3]].decode(errors="backslashreplace")
            return
        # Where they end too early, what would come later is absent.
        with contextlib.suppress(struct.error, IndexError):
            self._read(raw)

    def _read(self, raw: bytes) -> None:
        flags = more = int.from_bytes(raw[:2])
        at = 2
        while more & 1:  # further flags follow, for properties that there are not
            more = int.from_bytes(raw[at : at + 2])
            at += 2
        for bit in range(15, 6, -1):
            if not flags >> bit & 1:
                continue
            if bit == _HEADERS:
                [size] = _LENGTH.unpack_from(raw, at)
                at += 4
                self.headers = _table(raw, at, min(at + size, len(raw)), 1)
                at += size
            elif bit in _ONE_BYTE:
                at += 1
            else:
                end = at + 1 + raw[at]
                if name := _SHORT_TEXTS[bit]:
                    setattr(self, name, raw[at + 1 : end].decode(errors="backslashreplace"))
                at = end


def _table(raw: bytes, at: int, end: int, depth: int) -> dict[str, Any]:
    """Return the entries of a table; those behind one that cannot be read are absent."""
    found: dict[str, Any] = {}
    while at < end:
        try:
            key_end = at + 1 + raw[at]
            key = raw[at + 1 : key_end]
            at, value = _value(raw, key_end, end, depth)
        except (struct.error, IndexError):
            break
        if value is not None:
            found[key.decode(errors="backslashreplace")] = value
    return found


def _list(raw: bytes, at: int, end: int, depth: int) -> list[Any]:
    found: list[Any] = []
    while at < end:
        try:
            at, value = _value(raw, at, end, depth)
        except (struct.error, IndexError):
            break
        found.append(value)
    return found


def _value(raw: bytes, at: int, end: int, depth: int) -> tuple[int, Any]:
    """Return the place behind a value, and the value; None for one that is not read.

    Raises:
        IndexError: Its type is unknown, or it is not whole.
    """
    kind = raw[at : at + 1]
    at += 1
    number = _NUMBERS.get(kind)
    if number is not None:
        return at + number.size, number.unpack_from(raw, at)[0]
    if kind in (b"V", b"\0"):
        return at, None
    if kind == b"D":
        return at + _DECIMAL_SIZE, None
    if kind not in (b"S", b"x", b"A", b"F"):
        raise IndexError(kind)
    [size] = _LENGTH.unpack_from(raw, at)
    at += 4
    if at + size > end:
        raise IndexError(size)
    if kind in (b"S", b"x"):
        value: Any = raw[at : at + size]
        if kind == b"S":
            try:
                value = value.decode()
            except UnicodeDecodeError:
                value = None
    elif depth == _DEEPEST:
        value = None
    else:
        value = (_table if kind == b"F" else _list)(raw, at, at + size, depth + 1)
    return at + size, value
