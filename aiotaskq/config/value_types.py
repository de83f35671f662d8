"""Types of the values of settings: one `ValueType` for each.

A value type has three parts: a description of the values in words, a check that converts a user's
value into the one form that the rest of the package reads, and a parser for the text of an
environment variable. The check is strict: a value that is silently misunderstood is worse than an
error. So `True` is not a number, and ``"json"`` is not a list of serializers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args

from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import Entry
from aiotaskq.recurrence.definition import read_entries
from aiotaskq.retry import Retry

Serializer: TypeAlias = Literal["json", "msgpack", "pickle"]

EMPTY: Mapping[str, Any] = MappingProxyType({})
"""An empty mapping that cannot be changed."""

NO_SCHEDULES: Mapping[str, Entry] = MappingProxyType({})
"""The same, for schedules."""

ReadT = TypeVar("ReadT")
WriteT = TypeVar("WriteT")


class InvalidValue(Exception):
    """A value that a setting does not take.

    Attributes:
        reason: What is wrong with this value; None: the error describes the wanted values instead.
    """

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason


class ValueType(Generic[ReadT, WriteT]):
    """The type of a setting's value.

    Attributes:
        wants: A description of the values, to follow the word "wants" in an error.
        check: Returns the value in the form in which it is read, or raises `InvalidValue`.
        parse: Converts the text of an environment variable into a value for `check`; raises
            `ValueError` if it cannot.
    """

    __slots__ = ("check", "parse", "wants")

    def __init__(
        self, wants: str, check: Callable[[Any], ReadT], parse: Callable[[str], object] = str
    ) -> None:
        self.wants = wants
        self.check = check
        self.parse = parse


# --- reading text ---------------------------------------------------------------------------------

_WORDS = {"true": True, "yes": True, "on": True, "1": True}
_WORDS |= {"false": False, "no": False, "off": False, "0": False}


def parse_flag(text: str) -> bool:
    """Return the truth value of a text such as ``yes`` or ``0``."""
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def parse_json(text: str) -> object:
    """Return the value of a JSON text."""
    import json  # needed only if such a variable is set

    value: object = json.loads(text)
    return value


def parse_list(text: str) -> object:
    """Return the items of a JSON list, or of a text with commas between the items."""
    if text.lstrip().startswith("["):
        return parse_json(text)
    return [item.strip() for item in text.split(",") if item.strip()]


# --- flags and schedules --------------------------------------------------------------------------


def _check_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidValue


def flag() -> ValueType[bool, bool]:
    """Return the type of a flag: True or False."""
    return ValueType("True or False", _check_flag, parse_flag)


def fixed_flag(accepted: bool, reason: str) -> ValueType[bool, bool]:
    """Return the type of a flag that has only one supported value."""

    def check(value: Any) -> bool:
        if _check_flag(value) is accepted:
            return value is True
        raise InvalidValue(reason)

    return ValueType(f"{accepted}", check, parse_flag)


def schedules() -> ValueType[Mapping[str, Entry], Mapping[str, Any] | None]:
    """Return the type of schedules by their ids, as in Celery's `beat_schedule`."""

    def check(value: Any) -> Mapping[str, Entry]:
        if value is None:
            return NO_SCHEDULES
        if not isinstance(value, Mapping):
            raise InvalidValue
        try:
            return MappingProxyType(read_entries(value))
        except ConfigError as error:
            raise InvalidValue(str(error)) from None

    return ValueType('a mapping of ids to mappings with "task" and "schedule"', check, parse_json)


def optional(value_type: ValueType[ReadT, WriteT]) -> ValueType[ReadT | None, WriteT | None]:
    """Return the type of the values of another type, or None."""

    def check(value: Any) -> ReadT | None:
        return None if value is None else value_type.check(value)

    def parse(text: str) -> object:
        return None if text.lower() in ("none", "null") else value_type.parse(text)

    return ValueType(f"{value_type.wants}, or None", check, parse)


# --- numbers --------------------------------------------------------------------------------------


def whole(least: int, most: int | None = None, *, of: str = "") -> ValueType[int, int]:
    """Return the type of a whole number from `least` to `most`."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidValue
        if value < least or (most is not None and value > most):
            raise InvalidValue
        return value

    reach = f"of at least {least}" if most is None else f"from {least} to {most}"
    return ValueType(f"a whole number {of} {reach}".replace("  ", " "), check, int)


def priority() -> ValueType[int, int | None]:
    """Return the type of a priority: 0 to 9, 9 first; None is 0."""
    number = whole(0, 9)

    def check(value: Any) -> int:
        return 0 if value is None else number.check(value)

    return ValueType("a whole number from 0 to 9, 9 first", check, optional(number).parse)


def _as_seconds(value: Any) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidValue
    return float(value)


def seconds(*, zero: bool = False) -> ValueType[float, float | timedelta]:
    """Return the type of a duration of more than 0 seconds, or with ``zero`` of 0 or more."""

    def check(value: Any) -> float:
        length = _as_seconds(value)
        if length < 0 or (length == 0 and not zero):
            raise InvalidValue
        return length

    reach = "0 or more" if zero else "more than 0"
    return ValueType(f"seconds or a timedelta, {reach}", check, float)


def lifetime() -> ValueType[float | None, float | timedelta | None]:
    """Return the type of a duration for which 0 and None mean: for ever."""

    def check(value: Any) -> float | None:
        if value is None:
            return None
        length = _as_seconds(value)
        if length < 0:
            raise InvalidValue
        return length or None

    wants = "seconds or a timedelta; 0 or None for ever"
    return ValueType(wants, check, optional(seconds(zero=True)).parse)


def retry() -> ValueType[Retry, Retry]:
    """Return the type of a `Retry`, which can be set only in code."""

    def check(value: Any) -> Retry:
        if isinstance(value, Retry):
            return value
        raise InvalidValue

    def parse(text: str) -> object:
        raise ValueError(text)

    return ValueType("a Retry, set in code", check, parse)


_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?\s*", re.IGNORECASE)
_KIBIBYTES = {"K": 1, "M": 1024, "G": 1024**2, "T": 1024**3}


def memory() -> ValueType[int, int | str]:
    """Return the type of an amount of memory, in KiB as in Celery."""
    number = whole(1)

    def check(value: Any) -> int:
        if not isinstance(value, str):
            return number.check(value)
        match = _MEMORY.fullmatch(value)
        if match is None:
            raise InvalidValue
        amount, unit = match.groups(default="K")
        return number.check(int(float(amount) * _KIBIBYTES[unit.upper()]))

    return ValueType('a number of KiB, or text such as "200MB"', check)


# --- text -----------------------------------------------------------------------------------------


def _check_text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise InvalidValue


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)


def url(*, disabled: bool = False) -> ValueType[str, str]:
    """Return the type of a URL; the drivers check its scheme later."""

    def check(value: Any) -> str:
        if disabled and value == "disabled":
            return "disabled://"
        text = _check_text(value).strip()
        if _URL.fullmatch(text):
            return text
        raise InvalidValue

    more = ', or "disabled://"' if disabled else ""
    return ValueType(f'a URL such as "redis://localhost:6379/0"{more}', check)


def prefix() -> ValueType[str, str]:
    """Return the type of the prefix of all keys, tables, exchanges and queues."""
    allowed = re.compile(r"[A-Za-z0-9_.-]+")

    def check(value: Any) -> str:
        if allowed.fullmatch(_check_text(value)):
            return str(value)
        raise InvalidValue

    return ValueType('letters, digits, "_", "-" and "."', check)


def _check_queue(value: Any) -> str:
    # On the command line a comma separates two queues.
    if "," in _check_text(value):
        raise InvalidValue
    return str(value)


def queue() -> ValueType[str, str]:
    """Return the type of a queue's name."""
    return ValueType("the name of a queue, without commas", _check_queue)


def time_zone() -> ValueType[str, str | None]:
    """Return the type of a time zone's name that this machine knows."""

    def check(value: Any) -> str:
        if value is None or value == "UTC":
            return "UTC"  # works on machines without zone files too
        from zoneinfo import ZoneInfo  # needed only for other time zones

        try:
            return ZoneInfo(_check_text(value)).key
        except (KeyError, ValueError, OSError):
            raise InvalidValue(
                "this machine knows no time zone with that name; give a name such as "
                '"Europe/Oslo" (on a system without zone files: pip install tzdata)'
            ) from None

    return ValueType('the name of a time zone, such as "Europe/Oslo"', check)


def log_format() -> ValueType[str, str]:
    """Return the type of a format for log lines, in the % style."""

    def check(value: Any) -> str:
        from logging import Formatter  # needed only if a format is set

        try:
            Formatter(_check_text(value))
        except ValueError as error:
            raise InvalidValue(f"not a format for a log line: {error}") from None
        return str(value)

    return ValueType('a format for log lines, such as "%(asctime)s %(message)s"', check)


# --- lists and mappings ---------------------------------------------------------------------------


def serializer() -> ValueType[Serializer, Serializer]:
    """Return the type of a serializer's name."""
    names: tuple[Serializer, ...] = get_args(Serializer)

    def check(value: Any) -> Serializer:
        for name in names:
            if value == name:
                return name
        raise InvalidValue

    return ValueType(", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"', check)


PlainExecutor: TypeAlias = Literal["thread", "process"]


def plain_executor() -> ValueType[PlainExecutor, PlainExecutor]:
    """Return the type of an executor for plain functions."""

    def check(value: Any) -> PlainExecutor:
        for name in get_args(PlainExecutor):
            if value == name:
                return name  # type: ignore[no-any-return]  # one of them
        raise InvalidValue

    return ValueType('"thread" or "process"', check)


_MIME: Mapping[str, Serializer] = {
    "application/json": "json",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/x-python-serialize": "pickle",
}


def accepted() -> ValueType[tuple[Serializer, ...], list[str] | tuple[str, ...] | set[str]]:
    """Return the type of a list of serializers, given by their names or MIME types."""
    one = serializer()

    def check(value: Any) -> tuple[Serializer, ...]:
        if not isinstance(value, list | tuple | set | frozenset) or not value:
            raise InvalidValue
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        # A dict keeps the order and drops duplicates. Values that are no strings are left to `one`:
        # they may not be hashable.
        names = (_MIME.get(item, item) if isinstance(item, str) else item for item in items)
        return tuple(dict.fromkeys(one.check(name) for name in names))

    return ValueType(f"a list of one or more of {one.wants}", check, parse_list)


def modules() -> ValueType[tuple[str, ...], str | list[str] | tuple[str, ...] | None]:
    """Return the type of a list of dotted module names; a single name needs no list."""

    def check_one(value: Any) -> str:
        if all(part.isidentifier() for part in _check_text(value).split(".")):
            return str(value)
        raise InvalidValue(f"{value!r} is not the dotted name of a module")

    def check(value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if isinstance(value, str):
            return (check_one(value),)
        if not isinstance(value, list | tuple | set | frozenset):
            raise InvalidValue
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return tuple(dict.fromkeys(check_one(item) for item in items))

    return ValueType("a list of dotted module names", check, parse_list)


def routes() -> ValueType[Mapping[str, str], Mapping[str, str | Mapping[str, str]] | None]:
    """Return the type of routes: queues by the name of a task, or by a pattern of names."""

    def check_target(name: Any, target: Any) -> str:
        if not isinstance(name, str) or not name:
            raise InvalidValue(f"{name!r} is not a name or glob of tasks; it has to be a text")
        if isinstance(target, Mapping):
            more = sorted(str(key) for key in target if key != "queue")
            if more:
                raise InvalidValue(f"a route has a queue and nothing else, not {', '.join(more)}")
            target = target.get("queue")
        try:
            return _check_queue(target)
        except InvalidValue:
            raise InvalidValue(f'{name!r} needs {{"queue": "name"}}, or just "name"') from None

    def check(value: Any) -> Mapping[str, str]:
        if value is None:
            return EMPTY
        if not isinstance(value, Mapping):
            raise InvalidValue
        checked = {name: check_target(name, target) for name, target in value.items()}
        return MappingProxyType(checked)

    return ValueType(
        'a mapping such as {"reports.*": {"queue": "slow"}}; functions and lists of routes are '
        "not supported",
        check,
        parse_json,
    )


def options(
    known: frozenset[str], refused: Mapping[str, str]
) -> ValueType[Mapping[str, Any], Mapping[str, Any] | None]:
    """Return the type of a driver's options.

    Args:
        known: The names of the options.
        refused: Celery's options that are not supported, each with the reason.
    """

    def check_name(name: Any) -> str:
        if name in known:
            return str(name)
        if name in refused:
            raise InvalidValue(f"{name} is not supported: {refused[name]}")
        names = ", ".join(sorted(known)) or "none yet"
        raise InvalidValue(f"there is no option {name!r} (options: {names})")

    def check(value: Any) -> Mapping[str, Any]:
        if value is None:
            return EMPTY
        if not isinstance(value, Mapping):
            raise InvalidValue
        return MappingProxyType({check_name(name): value[name] for name in value})

    return ValueType("a mapping of option names to values", check, parse_json)
