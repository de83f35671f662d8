"""Tagged forms: values that JSON and MessagePack do not keep, as maps that name their type.

::

    {"__type__": "datetime", "__value__": "2026-01-02T03:04:05+00:00"}

This is the form in which Celery writes them. A dict with other keys than texts, or with a key
``__type__``, is written as ``{"__type__": "dict", "__value__": [[key, value], ...]}``, so that no
dict of a user is taken for a tagged form.

The names stand for the types listed here and for no others: no class is looked up or imported
because a payload names it.
"""

from __future__ import annotations

import base64
import binascii
import enum
import ipaddress
import math
from collections import deque
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

from aiotaskq.encoding.reduction import fields_of, is_model, reduce

Enums: TypeAlias = Mapping[str, type[enum.Enum]]
"""Enums by the names that stand for them in a tagged form."""

MARK = b"__type__"
"""The bytes that every encoded value with a tagged form contains.

They are looked for with `bytes.find`, which is twice as fast as ``in``.
"""

_TYPE, _VALUE = "__type__", "__value__"
_KEYS = {_TYPE, _VALUE}
_NO_ENUMS: Enums = {}
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1  # the whole numbers of MessagePack
_DIGITS = 4000  # Python refuses to read more of them

# --- writing ------------------------------------------------------------------------------------


def tagged(value: Any, enums: Enums = _NO_ENUMS) -> list[Any]:
    """Return the tagged forms of a value, the more readable first.

    In the first, only that is tagged in it which has a tagged form. If there is nothing of that
    kind in it, another one has a tag around it, with its own type: a reader sees by the tag that
    all of it is meant as it is written. Members of enums are written as their values, and in a last
    form as members.

    Args:
        value: The value.
        enums: The enums that the reader knows by their names.

    Raises:
        TypeError: A value in it has no form.
    """
    form = _Tagger(_NO_ENUMS).tag(value)
    forms = [form]
    if not _has_tag(form):
        forms.append({_TYPE: type(form).__name__, _VALUE: _pairs(form)})
    if enums:
        forms.append(_Tagger(enums).tag(value))
    return forms


def _pairs(form: Any) -> Any:
    return [[key, item] for key, item in form.items()] if type(form) is dict else form


def _has_tag(form: Any) -> bool:
    if type(form) is list:
        return any(map(_has_tag, form))
    return type(form) is dict and (_TYPE in form or any(map(_has_tag, form.values())))


class _Tagger:
    """Makes the tagged form of one value."""

    def __init__(self, enums: Enums) -> None:
        self._enums = enums

    def tag(self, value: Any) -> Any:
        kind = type(value)
        write = _WRITERS.get(kind)
        if write is not None:
            return write(value)
        write_parts = _WRITERS_OF_PARTS.get(kind)
        if write_parts is not None:
            return write_parts(value, self.tag)
        if value is None or kind is bool:
            return value
        if isinstance(value, enum.Enum):
            if self._enums.get(kind.__qualname__) is kind:
                return {_TYPE: "enum", _VALUE: [kind.__qualname__, self.tag(value.value)]}
            return self.tag(value.value)
        for path in (Path, PureWindowsPath, PurePath):
            if isinstance(value, path):
                return {_TYPE: path.__name__.lower(), _VALUE: str(value)}
        return self.tag(reduce(value, _written))


def _written(value: Any) -> Any:
    """Return the fields of an object as the reader of its class expects them."""
    fields = fields_of(value)
    if fields is None:
        return None
    if is_model(type(value)):
        return fields.get("", fields)
    if isinstance(value, msgspec.Struct):
        config, names = value.__struct_config__, value.__struct_encode_fields__
        tag = () if config.tag is None else ((config.tag_field or "type", config.tag),)
        items = (*tag, *zip(names, fields.values(), strict=True))
        return [item for _, item in items] if config.array_like else dict(items)
    return fields


def _int(value: int) -> Any:
    if _SMALLEST <= value <= _LARGEST:
        return value
    few = abs(value) < 10**_DIGITS
    return {_TYPE: "int", _VALUE: str(value) if few else hex(value)}


def _float(value: float) -> Any:
    return value if math.isfinite(value) else {_TYPE: "float", _VALUE: repr(value)}


def _str(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return {_TYPE: "escaped", _VALUE: value.encode("unicode_escape").decode()}
    return value


def _bytes(value: bytes) -> Any:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\0"
    if text.isprintable():
        return {_TYPE: "bytes", _VALUE: text}
    return {_TYPE: "base64", _VALUE: base64.b64encode(value).decode()}


def _dict(value: dict[Any, Any], tag: Callable[[Any], Any]) -> Any:
    if _TYPE not in value and all(type(key) is str and _str(key) is key for key in value):
        return {key: tag(item) for key, item in value.items()}
    return {_TYPE: "dict", _VALUE: [[tag(key), tag(item)] for key, item in value.items()]}


def _text(name: str) -> Callable[[Any], Any]:
    return lambda value: {_TYPE: name, _VALUE: str(value)}


def _items(name: str) -> Callable[[Any, Callable[[Any], Any]], Any]:
    return lambda value, tag: {_TYPE: name, _VALUE: [tag(item) for item in value]}


def _moment(name: str) -> Callable[[Any], Any]:
    def write(value: datetime | time) -> Any:
        text = value.isoformat()
        # The second of two equal times, when a clock is set back; an offset says it by itself.
        return {_TYPE: name, _VALUE: [text, 1] if value.fold and not value.tzinfo else text}

    return write


def _read_moment(kind: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        text, fold = value if isinstance(value, list) else (value, 0)
        moment = kind.fromisoformat(text)
        return moment.replace(fold=fold) if fold else moment

    return read


_ADDRESSES = (
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
)

_WRITERS: Mapping[type, Callable[[Any], Any]] = {
    str: _str,
    int: _int,
    float: _float,
    bytes: _bytes,
    bytearray: lambda value: {_TYPE: "bytearray", _VALUE: base64.b64encode(value).decode()},
    datetime: _moment("datetime"),
    date: lambda value: {_TYPE: "date", _VALUE: value.isoformat()},
    time: _moment("time"),
    timedelta: lambda value: {
        _TYPE: "timedelta",
        _VALUE: [value.days, value.seconds, value.microseconds],
    },
    complex: lambda value: {_TYPE: "complex", _VALUE: [_float(value.real), _float(value.imag)]},
    **{kind: _text(kind.__name__.lower()) for kind in (Decimal, UUID, Fraction, *_ADDRESSES)},
    ZoneInfo: _text("zoneinfo"),
}

_WRITERS_OF_PARTS: Mapping[type, Callable[[Any, Callable[[Any], Any]], Any]] = {
    list: lambda value, tag: [tag(item) for item in value],
    dict: _dict,
    **{kind: _items(kind.__name__) for kind in (tuple, set, frozenset, deque)},
}

# --- reading ------------------------------------------------------------------------------------


def resolve(form: Any, enums: Enums = _NO_ENUMS) -> tuple[Any, bool]:
    """Return a decoded value without its tagged forms, and whether it had any.

    Args:
        form: The decoded value.
        enums: The enums whose members it may contain.

    Raises:
        ValueError: A tagged form is not one that is written here.
    """
    resolver = _Resolver(enums)
    try:
        return resolver.resolve(form), resolver.found
    except ValueError:
        raise
    except Exception as error:  # an enum is a class of the user, and ZoneInfo reads any file
        raise ValueError(f"a tagged value that cannot be read: {error}") from error


class _Resolver:
    """Replaces the tagged forms in one value."""

    def __init__(self, enums: Enums) -> None:
        self.found = False
        self._enums = enums

    def resolve(self, form: Any) -> Any:
        if type(form) is list:
            return [self.resolve(item) for item in form]
        if type(form) is not dict:
            return form
        if form.keys() == _KEYS and isinstance(form[_TYPE], str):
            read = self._member if form[_TYPE] == "enum" else _READERS.get(form[_TYPE])
            if read is not None:
                self.found = True
                return read(self.resolve(form[_VALUE]))
        return {key: self.resolve(item) for key, item in form.items()}

    def _member(self, value: Any) -> Any:
        name, inner = value
        return self._enums[name](inner) if name in self._enums else inner


def _checked(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"it must be {kind.__name__}, and is {value!r}")
        return value

    return read


def _read_base64(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{value!r} is not base64") from error


def _read_fraction(value: str) -> Fraction:
    numerator, _, denominator = value.partition("/")
    # Not by its text alone: an exponent in it would fill the memory.
    return Fraction(int(numerator), int(denominator or 1))


def _read_int(value: str | int) -> int:
    return int(value, 16 if "x" in value[:3] else 10) if isinstance(value, str) else int(value)


def _read_uuid(value: str | dict[str, Any]) -> UUID:
    return UUID(value["hex"]) if isinstance(value, dict) else UUID(value)  # a dict: Celery's


def _read_date(value: str) -> date:
    return datetime.fromisoformat(value).date()


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "str": _checked(str),
    "bool": _checked(bool),
    "NoneType": _checked(type(None)),
    "list": _checked(list),
    "int": _read_int,
    "float": float,
    "escaped": lambda value: value.encode("ascii").decode("unicode_escape"),
    "dict": dict,
    "bytes": lambda value: value.encode(),
    "base64": _read_base64,
    "bytearray": lambda value: bytearray(_read_base64(value)),
    "datetime": _read_moment(datetime),
    "date": _read_date,
    "time": _read_moment(time),
    "timedelta": lambda value: timedelta(*map(int, value)),
    "tuple": lambda value: tuple(_checked(list)(value)),
    "set": lambda value: set(_checked(list)(value)),
    "frozenset": lambda value: frozenset(_checked(list)(value)),
    "deque": lambda value: deque(_checked(list)(value)),
    "complex": lambda value: complex(*map(float, value)),
    "decimal": Decimal,
    "uuid": _read_uuid,
    "fraction": _read_fraction,
    "path": Path,
    "purepath": PurePosixPath,
    "purewindowspath": PureWindowsPath,
    "zoneinfo": ZoneInfo,
    **{kind.__name__.lower(): kind for kind in _ADDRESSES},
}
