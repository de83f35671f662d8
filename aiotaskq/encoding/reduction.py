"""Reduction of values to simpler ones that JSON and MessagePack have a form for.

A subclass of a builtin type (a text that a web framework marks as safe, a scalar of numpy) is
reduced to its base value, an object to its fields. No library is imported here: a value of one of
its classes cannot exist before it is.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec


def _datetime(value: datetime) -> datetime:
    if getattr(value, "nanosecond", 0):  # pandas has them
        raise TypeError(f"{value!r} has nanoseconds, which a datetime has not")
    return datetime.combine(value.date(), value.timetz())


# An instance of a subclass becomes one of the base. The methods of the base are called, because
# those of the subclass may return anything.
BASES: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda value: bytes(memoryview(value)),
    bytearray: lambda value: bytearray(memoryview(value)),
    dict: lambda value: dict(dict.items(value)),
    list: lambda value: [*list.__iter__(value)],
    tuple: lambda value: (*tuple.__iter__(value),),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    deque: lambda value: deque(deque.__iter__(value)),
    datetime: _datetime,  # before `date`, which is its base
    date: lambda value: date(value.year, value.month, value.day),
    time: lambda value: time(
        value.hour, value.minute, value.second, value.microsecond, value.tzinfo, fold=value.fold
    ),
    timedelta: lambda value: timedelta(value.days, value.seconds, value.microseconds),
    Decimal: lambda value: Decimal(value),
    UUID: lambda value: UUID(int=value.int),
}

TEXTS: tuple[type, ...] = (
    PurePath,
    Fraction,
    complex,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
    ZoneInfo,
)
"""Types whose values are made again from their text by calling the type."""


def base_value(value: Any) -> Any:
    """Return the value of a builtin type that an instance of a subclass of it is.

    Raises:
        TypeError: It is none.
    """
    for base, convert in BASES.items():
        if isinstance(value, base):
            if type(value) is base:
                break
            return convert(value)
    raise TypeError(f"a {type(value).__qualname__} is no value of a builtin type")


def reduce(value: Any, fields: Callable[[Any], Mapping[str, Any] | None]) -> Any:
    """Return a simpler value in place of one of a type that has no form.

    Args:
        value: The value.
        fields: Returns the fields of an object by the names under which they are written; None:
            it is no object with fields.

    Raises:
        TypeError: There is none.
    """
    kind = type(value)
    if kind is deque:
        return list(value)
    if kind not in BASES and kind is not bool:
        for base, convert in BASES.items():
            if isinstance(value, base):
                return convert(value)
        if isinstance(value, TEXTS):
            return str(value)
        if isinstance(value, re.Pattern) and value == re.compile(value.pattern):  # without flags
            return value.pattern
        for simpler in (scalar_of_a_library, fields, _of_pydantic):
            found = simpler(value)
            if found is not None:
                return found
    raise TypeError(f"{kind.__qualname__} cannot be encoded as JSON or MessagePack")


def scalar_of_a_library(value: Any) -> Any:
    """Return the builtin value that a scalar of another type stands for; None: it is no scalar."""
    if isinstance(value, memoryview):
        return bytes(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        item = value.item()
        # Not a time, whose item may be a number of some unit; nor a number wider than Python's.
        return item if type(item) in _NUMBERS and value.dtype.kind in "biufc" else None
    lazy = sys.modules.get("django.utils.functional")
    if lazy is not None and isinstance(value, lazy.Promise):  # a text that is translated when used
        return str(value)
    return None


_NUMBERS = (bool, int, float, complex)


def _of_pydantic(value: Any) -> Any:
    if not type(value).__module__.startswith(("pydantic.", "pydantic_core")):
        return None
    if hasattr(value, "get_secret_value"):
        return value.get_secret_value()
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)  # such as a URL


def is_model(kind: type) -> bool:
    """Return whether a class is a pydantic model, without importing pydantic."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(kind, pydantic.BaseModel)


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """Return the fields of an object by the names under which they are written.

    None: it is no dataclass, struct, attrs class or pydantic model. A model with a root is its root
    under the empty name.
    """
    kind = type(value)
    if is_model(kind):
        held = value.__dict__
        if getattr(kind, "__pydantic_root_model__", False):
            return {"": held["root"]}
        fields = {name: held[name] for name in kind.model_fields if name in held}
        return {**fields, **(value.__pydantic_extra__ or {})}
    if isinstance(value, msgspec.Struct):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
    elif "__attrs_attrs__" in vars(kind):
        names = [attribute.name for attribute in cast("Any", kind).__attrs_attrs__]
    else:
        return None
    return {name: getattr(value, name) for name in names if hasattr(value, name)}
