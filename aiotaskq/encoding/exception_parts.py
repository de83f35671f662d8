"""Parts of an exception that travel as plain data: its arguments, attributes and members.

Only JSON's own types travel, so that nothing has to be imported or called to read them: text,
numbers, booleans, None, and lists and dicts of them. Other values are left out; the message and the
traceback still tell of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

_ROOM = 10_000  # characters, about, for all the parts of one exception
_DEPTH = 10  # lists and dicts in one another
_MOST_MEMBERS = 100  # exceptions of a group
_NEVER = object()  # in place of a value that does not travel


def arguments(error: BaseException) -> list[Any] | None:
    """Return the arguments of an exception; None if one of them does not travel."""
    try:
        given = BaseException.args.__get__(error)  # type: ignore[attr-defined]  # a slot
        parts = [_plain(one) for one in given]
    except Exception:  # whatever a user's type does
        return None
    return None if any(one is _NEVER for one in parts) or _size(parts) > _ROOM else parts


def attributes(error: BaseException) -> dict[str, Any]:
    """Return the attributes of an exception that travel, also those in slots, as of `OSError`."""
    found: dict[str, Any] = {}
    room = _ROOM
    try:
        for name, value in chain(vars(error).items(), slots(error)):
            plain = _NEVER if _is_reserved(name) else _plain(value)
            if plain is _NEVER or name in found:
                continue
            size = len(name) + _size(plain)
            if size <= room:
                room -= size
                found[name] = plain
    except Exception:  # whatever a user's type does
        pass
    return found


def members(error: BaseException) -> tuple[BaseException, ...]:
    """Return the exceptions in a group, of many the first; none if it is no group."""
    if not isinstance(error, BaseExceptionGroup):
        return ()
    # Not the attribute, which a user's type may replace.
    found = BaseExceptionGroup.exceptions.__get__(error)
    return tuple(found[:_MOST_MEMBERS])


def restore(error: BaseException, found: Mapping[str, Any]) -> None:
    """Set attributes that travelled, without calling any code of a user's type."""
    for name, value in found.items():
        if _is_reserved(name):
            continue
        slot = _slot(type(error), name)
        try:
            if slot is None:
                vars(error).setdefault(name, value)
            else:
                slot.__set__(error, value)
        except Exception:  # the slot takes no value of this type: anybody may have written it
            continue


def slots(error: BaseException) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an exception that are in slots, and have a value."""
    for kind in type(error).__mro__:
        if kind is BaseException:
            return
        for name, slot in vars(kind).items():
            if isinstance(slot, GetSetDescriptorType | MemberDescriptorType):
                try:
                    value = slot.__get__(error)
                except AttributeError:  # it has no value
                    continue
                if value is not None:
                    yield name, value


def _slot(kind: type, name: str) -> Any:
    for base in kind.__mro__:
        found = vars(base).get(name)
        if isinstance(found, GetSetDescriptorType | MemberDescriptorType):
            return found
    return None


def _is_reserved(name: Any) -> bool:
    return type(name) is not str or (name.startswith("__") and name.endswith("__"))


def _plain(value: Any, depth: int = _DEPTH) -> Any:
    """Return a value, with copies of its lists and dicts; `_NEVER` if it does not travel."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            return _NEVER
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else _NEVER
    if kind is float:
        return value if math.isfinite(value) else _NEVER
    if not depth or kind not in (list, dict) or len(value) > _ROOM:
        return _NEVER
    if kind is list:
        items = [_plain(one, depth - 1) for one in value]
        return _NEVER if any(one is _NEVER for one in items) else items
    pairs = {key: _plain(one, depth - 1) for key, one in value.items()}
    fits = all(
        type(key) is str and _plain(key) is not _NEVER and one is not _NEVER
        for key, one in pairs.items()
    )
    return pairs if fits else _NEVER


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, list):
        return 2 + sum(map(_size, value))
    if isinstance(value, dict):
        return 2 + sum(len(key) + _size(one) for key, one in value.items())
    return 8
