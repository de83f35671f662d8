"""Comparison of a value that was sent with the one that arrives."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, time
from decimal import Decimal
from enum import IntEnum
from typing import Any

from aiotaskq.encoding.reduction import (
    BASES,
    base_value,
    fields_of,
    is_model,
    reduce,
    scalar_of_a_library,
)

_ORDERED = (list, tuple, deque)
_IDENTITY: Any = object.__eq__
_EXACT = (str, int, bool, type(None))  # equal ones are the same


class Match(IntEnum):
    """The likeness of an arrived value to the one sent. Of several parts, the highest counts."""

    SAME = 0  # the same value of the same type, or the base value of a subclass of a builtin type
    CONVERTED = 1  # it became one of another type, or in another zone, as an annotation may ask for
    LOST = 2  # something is missing or different


class Comparison:
    """The comparison of one value.

    Attributes:
        match: The likeness.
        loss: The first part that is not as it was, and what it became; None: nothing is lost.
        place: The place of that part, such as ``.user[0]``; empty: it is the value itself.
    """

    def __init__(self, sent: Any, got: Any) -> None:
        self.loss: tuple[Any, Any] | None = None
        self.place = ""
        self._path: list[str] = []
        try:
            self.match = self._compare(sent, got)
        except Exception:  # methods of the value may raise anything
            self.match = Match.LOST
            self._note(sent, got)

    def _compare(self, sent: Any, got: Any) -> Match:
        match = self._by_type(sent, got)
        if match is Match.LOST:
            self._note(sent, got)
        return match

    def _note(self, sent: Any, got: Any) -> None:
        if self.loss is None:
            self.loss = sent, got
            self.place = "".join(self._path)

    def _compare_at(self, place: str, sent: Any, got: Any) -> Match:
        self._path.append(place)
        match = self._compare(sent, got)
        self._path.pop()
        return match

    def _by_type(self, sent: Any, got: Any) -> Match:
        kind, other = type(sent), type(got)
        if kind is other:
            return self._same_type(sent, got)
        if isinstance(sent, other) and kind is not bool:
            if other not in BASES:
                return Match.LOST  # an object became one of a base class
            return self._same_type(base_value(sent), got)
        if isinstance(sent, int | float) and isinstance(got, int | float):
            return Match.CONVERTED if sent == got else Match.LOST
        if isinstance(sent, _ORDERED) and isinstance(got, _ORDERED):
            return max(Match.CONVERTED, self._pairwise(sent, got))
        return self._other_type(sent, got)

    def _other_type(self, sent: Any, got: Any) -> Match:
        if isinstance(sent, enum.Enum) or fields_of(sent) is not None:
            return Match.LOST
        if isinstance(sent, Mapping) and (inside := fields_of(got)) is not None:
            return max(Match.CONVERTED, self._common(sent, inside))
        if type(sent) in BASES or isinstance(sent, bool) or sent is None:
            return Match.CONVERTED
        base = scalar_of_a_library(sent)
        if base is not None:
            return self._compare(base, got)
        return max(Match.CONVERTED, self._compare(reduce(sent, lambda _: None), got))

    def _same_type(self, sent: Any, got: Any) -> Match:
        if isinstance(sent, float | complex | Decimal):
            return _same(repr(sent) == repr(got))  # NaN, the sign of zero, the places of a Decimal
        if isinstance(sent, datetime | time):
            return _times(sent, got)
        if isinstance(sent, _ORDERED):
            return self._pairwise(sent, got)
        if isinstance(sent, dict):
            return self._mapping(sent, got)
        if isinstance(sent, set | frozenset):
            return _sets(sent, got)
        if isinstance(sent, enum.Enum):
            return _same(sent is got or sent == got)
        fields = fields_of(sent)
        if fields is None:
            return _same(sent == got)
        after = fields_of(got) or {}
        if fields.keys() != after.keys():
            return Match.LOST
        match = _worst(
            self._compare_at(f".{name}", one, after[name]) for name, one in fields.items()
        )
        return max(match, self._private(sent, got)) if is_model(type(sent)) else match

    def _pairwise(self, sent: Any, got: Any) -> Match:
        if len(sent) != len(got):
            return Match.LOST
        pairs = enumerate(zip(sent, got, strict=True))
        return _worst(self._compare_at(f"[{index}]", *pair) for index, pair in pairs)

    def _mapping(self, sent: Mapping[Any, Any], got: Mapping[Any, Any]) -> Match:
        if len(sent) != len(got):
            return Match.LOST
        keys = {key: key for key in got}
        if any(key not in keys or not isinstance(key, type(keys[key])) for key in sent):
            # Other keys are wrong; the same keys as other types may be what was asked for.
            return self._keys(sent, got)
        # Equal keys may still differ in their time zones.
        match = _worst(self._compare(key, keys[key]) for key in sent if type(key) not in _EXACT)
        inside = (self._compare_at(f"[{key!r}]", one, got[key]) for key, one in sent.items())
        return max(match, _worst(inside))

    def _keys(self, sent: Mapping[Any, Any], got: Mapping[Any, Any]) -> Match:
        keys = self._pairwise([*sent], [*got])
        return max(keys, self._pairwise([*sent.values()], [*got.values()]))

    def _common(self, sent: Mapping[Any, Any], got: Mapping[Any, Any]) -> Match:
        return _worst(
            self._compare_at(f".{key}", one, got[key]) for key, one in sent.items() if key in got
        )

    def _private(self, sent: Any, got: Any) -> Match:
        """Compare the private attributes of two models."""
        before = sent.__pydantic_private__ or {}
        after = got.__pydantic_private__ or {}
        if before.keys() != after.keys():
            return Match.LOST
        # A lock or a connection is equal to itself alone; a new one stands in its place.
        return _worst(
            Match.SAME
            if type(one) is type(after[name]) and type(one).__eq__ is _IDENTITY
            else self._compare_at(f".{name}", one, after[name])
            for name, one in before.items()
        )


def _times(sent: Any, got: Any) -> Match:
    """Compare two datetimes, or two times of a day."""
    if sent.utcoffset() == got.utcoffset():
        return _same(sent.replace(tzinfo=None) == got.replace(tzinfo=None))
    if sent == got:
        return Match.CONVERTED
    # In the hours in which a clock is set, Python calls equal moments of two zones different.
    return Match.CONVERTED if _instant(sent) == _instant(got) else Match.LOST


def _instant(value: Any) -> Any:
    is_aware = isinstance(value, datetime) and value.utcoffset() is not None
    return value.astimezone(UTC) if is_aware else value


def _sets(sent: Any, got: Any) -> Match:
    if all(type(one) in _EXACT for one in sent):
        return _same(sent == got)
    with suppress(TypeError):  # an object has fields that are not hashable
        if _key(sent, exact=True) == _key(got, exact=True):
            return Match.SAME
        if _key(sent, exact=False) == _key(got, exact=False):
            return Match.CONVERTED
    return _same(sent == got)


def _key(value: Any, *, exact: bool) -> Any:
    """Return what stands for a member of a set: equal ones for the same, also in other zones.

    Args:
        value: The member.
        exact: Whether the same moment in another zone is another value.
    """
    if isinstance(value, datetime | time) and value.utcoffset() is not None:
        if exact:
            return value.replace(tzinfo=None), value.utcoffset()
        return _instant(value)
    if isinstance(value, tuple):
        return tuple(_key(one, exact=exact) for one in value)
    if isinstance(value, set | frozenset):
        return frozenset(_key(one, exact=exact) for one in value)
    fields = None if isinstance(value, enum.Enum) else fields_of(value)
    if fields is None:
        return value
    return type(value), *(_key(one, exact=exact) for one in fields.values())


def _same(same: bool) -> Match:
    return Match.SAME if same else Match.LOST


def _worst(matches: Iterable[Match]) -> Match:
    return max(matches, default=Match.SAME)
