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

import msgspec

_ROOM = 10_000  # bytes of JSON, for the arguments of one exception, and for its attributes
_ROOM_OF_ALL = 100_000  # the same, for an exception with all the exceptions in it
_WORK_OF_ALL = 3 * _ROOM_OF_ALL  # so much is looked at in all: bytes that may be left out after all
_DEPTH = 10  # lists and dicts in one another


class Budget:
    """The limits that an exception and all the exceptions in it share.

    Attributes:
        room: Bytes of JSON that are left for them.
        work: Bytes that are left to look at. Unlike the room, what does not travel takes from it.
    """

    def __init__(self) -> None:
        self.room = _ROOM_OF_ALL
        self.work = _WORK_OF_ALL


def arguments(error: BaseException, budget: Budget) -> list[Any] | None:
    """Return the arguments of an exception; None if one of them does not travel."""
    copying = _Copying(budget, _ROOM)
    try:
        given = BaseException.args.__get__(error)  # type: ignore[attr-defined]  # a slot
        parts = [copying.copy(one) for one in given]
    except Exception:  # one that does not travel, and whatever a user's type does
        return None
    copying.keep()
    return parts


def attributes(error: BaseException, budget: Budget) -> dict[str, Any]:
    """Return the attributes of an exception that travel, also those in slots, as of `OSError`."""
    found: dict[str, Any] = {}
    room = _ROOM
    try:
        for name, value in chain(vars(error).items(), slots(error)):
            if budget.work <= 0:
                break
            budget.work -= 1
            if _is_reserved(name) or name in found:
                continue
            copying = _Copying(budget, room)
            try:
                pair = copying.copy(name), copying.copy(value)
            except _DoesNotTravel:
                continue
            found[pair[0]] = pair[1]
            room -= copying.keep()
    except Exception:  # whatever a user's type does
        pass
    return found


def members(error: BaseException) -> tuple[BaseException, ...]:
    """Return the exceptions in a group; none if it is no group."""
    if not isinstance(error, BaseExceptionGroup):
        return ()
    # Not the attribute, which a user's type may replace.
    return tuple(BaseExceptionGroup.exceptions.__get__(error))


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


class _DoesNotTravel(Exception):
    """A value that does not travel, or for which there is no room."""


class _Copying:
    """The copying of plain data, with a limit.

    Each part is paid for before the next one is looked at: lists may share parts or contain
    themselves, so that a few of them stand for any number of parts.

    Args:
        budget: The limits of all.
        room: The bytes that this copy may have.
    """

    def __init__(self, budget: Budget, room: int) -> None:
        self._budget = budget
        self._room = min(room, budget.room)
        self._size = 0
        self._path: set[int] = set()

    def keep(self) -> int:
        """Take the room for the copies, and return their size."""
        self._budget.room -= self._size
        return self._size

    def copy(self, value: Any, depth: int = _DEPTH) -> Any:
        """Return a value, with copies of its lists and dicts.

        Raises:
            _DoesNotTravel: It is no plain data, or there is no room for it.
        """
        kind = type(value)
        if value is None or kind is bool:
            self._pay(5)
        elif kind is str:
            self._pay_text(value)
        elif kind is int and -(2**63) <= value < 2**64:
            self._pay(len(str(value)))
        elif kind is float and math.isfinite(value):
            self._pay(len(repr(value)))
        elif depth and kind in (list, dict) and id(value) not in self._path:
            self._path.add(id(value))
            inside = self._dict(value, depth) if kind is dict else self._list(value, depth)
            self._path.discard(id(value))
            return inside
        else:
            raise _DoesNotTravel
        return value

    def _list(self, value: list[Any], depth: int) -> list[Any]:
        self._pay(2)
        self._may_have(2 * len(value))
        return [self.copy(one, depth - 1) for one in value]

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        self._pay(2)
        self._may_have(6 * len(value))
        found = {}
        for key, one in value.items():
            if type(key) is not str:
                raise _DoesNotTravel
            self._pay_text(key)
            found[key] = self.copy(one, depth - 1)
        return found

    def _may_have(self, more: int) -> None:
        if self._size + more > self._room:
            raise _DoesNotTravel

    def _pay_text(self, text: str) -> None:
        self._may_have(len(text))
        self._pay(size_of_text(text))

    def _pay(self, size: int) -> None:
        self._size += size + 1  # and what separates it from the next
        self._budget.work -= size + 1
        if self._size > self._room or self._budget.work < 0:
            raise _DoesNotTravel


def size_of_text(text: str) -> int:
    """Return the number of bytes that a text has as JSON.

    Raises:
        _DoesNotTravel: It has a lone surrogate.
    """
    try:
        return len(msgspec.json.encode(text))
    except UnicodeEncodeError:
        raise _DoesNotTravel from None
