"""What a setting's value may be: one `Kind` for each sort of value.

A kind knows three things: how to say in words what it wants, how to turn what a user wrote into
the one form that the rest of the package reads, and how to read it from the text of an environment
variable. Checking is strict, since a value that is quietly understood in another way than it was
meant is worse than an error: `True` is no number, and ``"json"`` is no list of serializers.
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

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""An empty mapping that stays empty."""

NO_SCHEDULES: Mapping[str, Entry] = MappingProxyType({})
"""The same of schedules."""

Read = TypeVar("Read")
Write = TypeVar("Write")


class Wrong(Exception):
    """A value was refused.

    Attributes:
        reason: A sentence about this very value, or None: then what the kind wants is said.
    """

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason


class Kind(Generic[Read, Write]):
    """One sort of value.

    Attributes:
        wants: What is wanted, in words that go on after "wants".
        check: Returns the value in the form in which it is read, or raises `Wrong`.
        parse: Reads the text of an environment variable, giving something for `check`; raises
            `ValueError` for what cannot be read.
    """

    __slots__ = ("check", "parse", "wants")

    def __init__(
        self, wants: str, check: Callable[[Any], Read], parse: Callable[[str], object] = str
    ) -> None:
        self.wants = wants
        self.check = check
        self.parse = parse


# --- reading text -------------------------------------------------------------------------------

_WORDS = {"true": True, "yes": True, "on": True, "1": True}
_WORDS |= {"false": False, "no": False, "off": False, "0": False}


def parse_flag(text: str) -> bool:
    """Read a yes or no."""
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def parse_json(text: str) -> object:
    """Read a JSON value."""
    import json  # only who has such a variable pays for it

    value: object = json.loads(text)
    return value


def parse_list(text: str) -> object:
    """Read a JSON list, or items with commas between them."""
    if text.lstrip().startswith("["):
        return parse_json(text)
    return [item.strip() for item in text.split(",") if item.strip()]


# --- yes, no, one of, only ----------------------------------------------------------------------


def _check_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise Wrong


def flag() -> Kind[bool, bool]:
    """True or False."""
    return Kind("True or False", _check_flag, parse_flag)


def only_flag(fine: bool, reason: str) -> Kind[bool, bool]:
    """A switch that stands where it stands."""

    def check(value: Any) -> bool:
        if _check_flag(value) is fine:
            return value is True
        raise Wrong(reason)

    return Kind(f"{fine}", check, parse_flag)


def schedules() -> Kind[Mapping[str, Entry], Mapping[str, Any] | None]:
    """Schedules by their ids, as Celery's beat_schedule has them."""

    def check(value: Any) -> Mapping[str, Entry]:
        if value is None:
            return NO_SCHEDULES
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise Wrong
        try:
            return MappingProxyType(read_entries(value))
        except ConfigError as error:
            raise Wrong(str(error)) from None

    return Kind('a mapping of ids to mappings with "task" and "schedule"', check, parse_json)


def optional(kind: Kind[Read, Write]) -> Kind[Read | None, Write | None]:
    """What `kind` takes, or None."""

    def check(value: Any) -> Read | None:
        return None if value is None else kind.check(value)

    def parse(text: str) -> object:
        return None if text.lower() in ("none", "null") else kind.parse(text)

    return Kind(f"{kind.wants}, or None", check, parse)


# --- numbers ------------------------------------------------------------------------------------


def whole(least: int, most: int | None = None, *, of: str = "") -> Kind[int, int]:
    """A whole number from `least` to `most`."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Wrong
        if value < least or (most is not None and value > most):
            raise Wrong
        return value

    reach = f"of at least {least}" if most is None else f"from {least} to {most}"
    return Kind(f"a whole number {of} {reach}".replace("  ", " "), check, int)


def priority() -> Kind[int, int | None]:
    """0 to 9, 9 first; None is 0."""
    number = whole(0, 9)

    def check(value: Any) -> int:
        return 0 if value is None else number.check(value)

    return Kind("a whole number from 0 to 9, 9 first", check, optional(number).parse)


def _as_seconds(value: Any) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Wrong
    return float(value)


def seconds(*, zero: bool = False) -> Kind[float, float | timedelta]:
    """A length of time, above 0, or 0 as well."""

    def check(value: Any) -> float:
        length = _as_seconds(value)
        if length < 0 or (length == 0 and not zero):
            raise Wrong
        return length

    reach = "0 or more" if zero else "more than 0"
    return Kind(f"seconds or a timedelta, {reach}", check, float)


def lifetime() -> Kind[float | None, float | timedelta | None]:
    """A length of time, where 0 and None mean: for ever."""

    def check(value: Any) -> float | None:
        if value is None:
            return None
        length = _as_seconds(value)
        if length < 0:
            raise Wrong
        return length or None

    wants = "seconds or a timedelta; 0 or None for ever"
    return Kind(wants, check, optional(seconds(zero=True)).parse)


def retry() -> Kind[Retry, Retry]:
    """A `Retry`, which can only be written in code."""

    def check(value: Any) -> Retry:
        if isinstance(value, Retry):
            return value
        raise Wrong

    def parse(text: str) -> object:
        raise ValueError(text)

    return Kind("a Retry, set in code", check, parse)


_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?\s*", re.IGNORECASE)
_KIBIBYTES = {"K": 1, "M": 1024, "G": 1024**2, "T": 1024**3}


def memory() -> Kind[int, int | str]:
    """An amount of memory, read in KiB, the unit that Celery's configuration has."""
    number = whole(1)

    def check(value: Any) -> int:
        if not isinstance(value, str):
            return number.check(value)
        match = _MEMORY.fullmatch(value)
        if match is None:
            raise Wrong
        amount, unit = match.groups(default="K")
        return number.check(int(float(amount) * _KIBIBYTES[unit.upper()]))

    return Kind('a number of KiB, or text such as "200MB"', check)


# --- text ---------------------------------------------------------------------------------------


def _check_text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise Wrong


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)


def url(*, disabled: bool = False) -> Kind[str, str]:
    """An address; which schemes there are is for the drivers to say."""

    def check(value: Any) -> str:
        if disabled and value == "disabled":
            return "disabled://"
        text = _check_text(value).strip()
        if _URL.fullmatch(text):
            return text
        raise Wrong

    more = ', or "disabled://"' if disabled else ""
    return Kind(f'a URL such as "redis://localhost:6379/0"{more}', check)


def prefix() -> Kind[str, str]:
    """What the names of all keys, tables, exchanges and queues begin with."""
    allowed = re.compile(r"[A-Za-z0-9_.-]+")

    def check(value: Any) -> str:
        if allowed.fullmatch(_check_text(value)):
            return str(value)
        raise Wrong

    return Kind('letters, digits, "_", "-" and "."', check)


def _check_queue(value: Any) -> str:
    # A comma would make two of it on a command line.
    if "," in _check_text(value):
        raise Wrong
    return str(value)


def queue() -> Kind[str, str]:
    """The name of a queue."""
    return Kind("the name of a queue, without commas", _check_queue)


def time_zone() -> Kind[str, str | None]:
    """The name of a time zone that this machine knows."""

    def check(value: Any) -> str:
        if value is None or value == "UTC":
            return "UTC"  # known without asking for it, on machines without zone files too
        from zoneinfo import ZoneInfo  # only who needs one pays for it

        try:
            return ZoneInfo(_check_text(value)).key
        except (KeyError, ValueError, OSError):
            raise Wrong(
                "no time zone of that name is known here; wanted is a name such as "
                '"Europe/Oslo" (on a system without zone files: pip install tzdata)'
            ) from None

    return Kind('the name of a time zone, such as "Europe/Oslo"', check)


def log_format() -> Kind[str, str]:
    """A format for log lines in the % style."""

    def check(value: Any) -> str:
        from logging import Formatter  # only who sets one pays for it

        try:
            Formatter(_check_text(value))
        except ValueError as error:
            raise Wrong(f"no format for a log line: {error}") from None
        return str(value)

    return Kind('a format for log lines, such as "%(asctime)s %(message)s"', check)


# --- several ------------------------------------------------------------------------------------


def serializer() -> Kind[Serializer, Serializer]:
    """The name of one serializer."""
    names: tuple[Serializer, ...] = get_args(Serializer)

    def check(value: Any) -> Serializer:
        for name in names:
            if value == name:
                return name
        raise Wrong

    return Kind(", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"', check)


_MIME: Mapping[str, Serializer] = {
    "application/json": "json",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/x-python-serialize": "pickle",
}


def accepted() -> Kind[tuple[Serializer, ...], list[str] | tuple[str, ...] | set[str]]:
    """The serializers that a worker takes, by their names or MIME names."""
    one = serializer()

    def check(value: Any) -> tuple[Serializer, ...]:
        if not isinstance(value, list | tuple | set | frozenset) or not value:
            raise Wrong
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        # A dict keeps the order, and drops what is said twice. Whatever is no string is left to
        # `one`, since not all of it can be looked up.
        names = (_MIME.get(item, item) if isinstance(item, str) else item for item in items)
        return tuple(dict.fromkeys(one.check(name) for name in names))

    return Kind(f"a list of one or more of {one.wants}", check, parse_list)


def modules() -> Kind[tuple[str, ...], str | list[str] | tuple[str, ...] | None]:
    """The dotted names of modules; one alone needs no list."""

    def check_one(value: Any) -> str:
        if all(part.isidentifier() for part in _check_text(value).split(".")):
            return str(value)
        raise Wrong(f"{value!r} is no dotted name of a module")

    def check(value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if isinstance(value, str):
            return (check_one(value),)
        if not isinstance(value, list | tuple | set | frozenset):
            raise Wrong
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return tuple(dict.fromkeys(check_one(item) for item in items))

    return Kind("a list of dotted module names", check, parse_list)


def routes() -> Kind[Mapping[str, str], Mapping[str, str | Mapping[str, str]] | None]:
    """Which queue the tasks of which name, or glob, go to."""

    def check_target(name: Any, target: Any) -> str:
        if not isinstance(name, str) or not name:
            raise Wrong(f"{name!r} is no name or glob of tasks; it has to be text")
        if isinstance(target, Mapping):
            more = sorted(str(key) for key in target if key != "queue")
            if more:
                raise Wrong(f"a route names a queue and nothing else, not {', '.join(more)}")
            target = target.get("queue")
        try:
            return _check_queue(target)
        except Wrong:
            raise Wrong(f'{name!r} needs {{"queue": "name"}}, or just "name"') from None

    def check(value: Any) -> Mapping[str, str]:
        if value is None:
            return NOTHING
        if not isinstance(value, Mapping):
            raise Wrong
        checked = {name: check_target(name, target) for name, target in value.items()}
        return MappingProxyType(checked)

    return Kind(
        'a mapping such as {"reports.*": {"queue": "slow"}}; functions and lists of routes are '
        "not supported",
        check,
        parse_json,
    )


def options(
    known: frozenset[str], refused: Mapping[str, str]
) -> Kind[Mapping[str, Any], Mapping[str, Any] | None]:
    """Options for a driver: those in `known`, with the reasons for what is in `refused`."""

    def check_name(name: Any) -> str:
        if name in known:
            return str(name)
        if name in refused:
            raise Wrong(f"{name} is not supported: {refused[name]}")
        there = ", ".join(sorted(known)) or "none so far"
        raise Wrong(f"no option of the name {name!r} is known (there are: {there})")

    def check(value: Any) -> Mapping[str, Any]:
        if value is None:
            return NOTHING
        if not isinstance(value, Mapping):
            raise Wrong
        return MappingProxyType({check_name(name): value[name] for name in value})

    return Kind("a mapping of option names to values", check, parse_json)
