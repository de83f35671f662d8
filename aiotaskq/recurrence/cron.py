"""Crontabs: runs at local times of a time zone.

When local time is changed, for daylight saving time or for another reason, runs follow the rule of
Debian's cron, with five fields and with six:

* If neither the minute field nor the hour field begins with ``*``, the times are fixed. If local
  time skips the time of a run, it runs at the first moment after the gap; several such runs become
  one. If the time occurs twice, it runs only the first time.
* If one of them begins with ``*``, runs follow elapsed time: in an hour that occurs twice they
  run both times, and in an hour that is skipped they do not run.

A gap is the time that local time skips; it may be half an hour or a whole day.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, TypeAlias

import msgspec

from aiotaskq.errors import ConfigError

CrontabField: TypeAlias = int | str | Iterable[int | str]

_FIELDS = {
    "second": (range(60), "0 to 59"),
    "minute": (range(60), "0 to 59"),
    "hour": (range(24), "0 to 23"),
    "day_of_month": (range(1, 32), "1 to 31, L for the last day or LW for the last working day"),
    "month_of_year": (range(1, 13), "1 to 12 or jan to dec"),
    "day_of_week": (range(7), "0 to 7 (0 and 7 are Sunday), sun to sat, 5#2 for the second Friday"),
}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_NAMES = {"month_of_year": _MONTHS, "day_of_week": _WEEKDAYS}
_RANGE = re.compile(r"([a-zA-Z]{3}|\d\d?)-([a-zA-Z]{3}|\d\d?)(?:/(\d{1,9}))?", re.ASCII)
# "5-5/2": cronsim reads it as "5/2", which means from 5 on.
_LONE_RANGE = re.compile(r"(?<![^,\s])0*(\w+)-0*\1/0*[1-9]\d*(?![^,\s])", re.ASCII | re.IGNORECASE)
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

_SECOND = timedelta(seconds=1)
_EPOCH = datetime(1970, 1, 1)
_NO_OFFSET = timedelta()


class Crontab(msgspec.Struct, frozen=True, tag="crontab"):
    """A schedule that runs at all local times that match. Made by `crontab`.

    Args:
        expression: Five fields as in crontab(5), or six with the seconds first.
        both_days: Whether a day has to match both day fields, as in Celery. If not, it has to match
            one of them where neither begins with ``*``, as in cron.

    Raises:
        ConfigError: The expression is not a crontab, or no day ever matches it.
    """

    expression: str
    both_days: bool = False

    def __post_init__(self) -> None:
        from cronsim import CronSimError  # needed only for crontabs

        fields = self.expression.split()
        if len(fields) not in (5, 6):
            raise ConfigError(
                f"the crontab {self.expression!r} has {len(fields)} fields; give five (minute hour"
                " day-of-month month day-of-week), six with the seconds first, or one of"
                f" {', '.join(_MACROS)}"
            )
        try:
            first = next(_walls(self, datetime(2000, 1, 1)), None)
        # Python raises ValueError for a number with thousands of digits.
        except (CronSimError, ValueError):
            _check_fields(fields)
            first = None  # each field is valid alone, but no month has such a day
        if first is None:
            raise ConfigError(
                f"the crontab {self.expression!r} never runs: no date has such a day"
                f"{' that matches both day fields' if self.both_days else ''}; change"
                " day_of_month, month_of_year or day_of_week"
            )


def crontab(
    minute: CrontabField = "*",
    hour: CrontabField = "*",
    day_of_week: CrontabField = "*",
    day_of_month: CrontabField = "*",
    month_of_year: CrontabField = "*",
    *,
    second: CrontabField | None = None,
    nowfun: None = None,
    app: None = None,
) -> Crontab:
    """Return the schedule that runs when all fields match, as in Celery, or a crontab expression.

    A field is a number, a text such as ``"*/5"``, ``"2-10/3"`` or ``"mon,fri"``, or a list of
    these. Unlike in Celery, 7 is Sunday too.

    >>> crontab(0, 9, "mon-fri").expression
    '0 9 * * mon-fri'
    >>> crontab("*/5 * * * *") == crontab("*/5")
    True
    >>> crontab("@daily").expression
    '0 0 * * *'

    Args:
        minute: 0 to 59; or a complete expression: five fields as in crontab(5), six with the
            seconds first, or ``@hourly``, ``@daily``, ``@midnight``, ``@weekly``, ``@monthly``,
            ``@yearly``, ``@annually``. In an expression, a day has to match only one of the two
            day fields if both are restricted.
        hour: 0 to 23.
        day_of_week: 0 to 6, beginning with Sunday, or names. A day has to match `day_of_week`,
            `day_of_month` and `month_of_year`.
        day_of_month: 1 to 31.
        month_of_year: 1 to 12, or names.
        second: 0 to 59. None: at the full minute.
        nowfun: Refused: a schedule has no clock in aiotaskq.
        app: Refused: a schedule has no application in aiotaskq.

    Raises:
        ConfigError: A field is wrong, or no day ever matches.
    """
    foreign: tuple[Any, ...] = (nowfun, app)  # of any type, whatever the annotations say
    if foreign != (None, None):
        raise ConfigError(
            "crontab takes no nowfun and no app: a schedule needs neither a clock nor an"
            " application; leave them out"
        )
    values = [minute, hour, day_of_month, month_of_year, day_of_week]
    if isinstance(minute, str) and _is_expression(minute):
        if second is not None or any(other != "*" for other in values[1:]):
            raise ConfigError(f"{minute!r} is a complete crontab; leave out the other fields")
        return from_expression(minute)
    if second is not None:
        values.insert(0, second)
    fields = list(map(_field, list(_FIELDS)[-len(values) :], values))
    # If one of them begins with a star, both have to match in cron too.
    both_days = not (fields[-3].startswith("*") or fields[-1].startswith("*"))
    return Crontab(" ".join(fields), both_days)


def _is_expression(text: str) -> bool:
    return text.startswith("@") or len(re.sub(r"\s*,\s*", ",", text).split()) > 1


def from_expression(text: str) -> Crontab:
    """Return the crontab of a complete expression, or raise a `ConfigError`."""
    if not text.startswith("@"):
        return Crontab(" ".join(text.split()))
    if text not in _MACROS:
        raise ConfigError(f"{text!r} is no crontab; there are {', '.join(_MACROS)}")
    return Crontab(_MACROS[text])


def _field(name: str, value: Any) -> str:
    """Return one field, given as for Celery, in the form that cron reads."""
    if isinstance(value, str):
        return ",".join(_term(name, term.strip(), value) for term in value.split(","))
    if type(value) is int:
        return str(value)
    if not isinstance(value, Iterable) or isinstance(value, bytes | bytearray):
        raise _wrong_field(name, value)
    items = list(value)
    if not items or not all(type(item) is int or isinstance(item, str) for item in items):
        raise _wrong_field(name, value)
    terms = {term for item in items for term in _field(name, item).split(",")}
    # Sorted: the order of a set of texts differs between processes.
    return ",".join(sorted(terms, key=lambda term: (len(term), term)))


def _term(name: str, term: str, value: object) -> str:
    if len(term.split()) != 1:
        raise _wrong_field(name, value)
    names, numbers = _NAMES.get(name, ()), _FIELDS[name][0]
    term = re.sub(
        r"[a-zA-Z]+", lambda word: word[0][:3] if word[0][:3].lower() in names else word[0], term
    )
    found = _RANGE.fullmatch(term)
    if found is None:
        return term
    known = {name: number for number, name in enumerate(names, numbers.start)}
    known.update((str(number), number) for number in numbers)
    first, last = (known.get(end.lower(), -1) for end in found.group(1, 2))
    step = int(found[3] or 1)
    if not (first > last >= 0 and step):
        return term
    # In Celery a range such as "22-2" goes on at the first number, in cron it does not.
    ring = [*range(first, numbers.stop), *range(numbers.start, last + 1)]
    return ",".join(map(str, ring[::step]))


def _check_fields(fields: list[str]) -> None:
    """Raise an error for the first field that is wrong on its own."""
    from cronsim import CronSim, CronSimError  # see above

    names = list(_FIELDS)[-len(fields) :]
    for index, (name, text) in enumerate(zip(names, fields, strict=True)):
        alone = ["*"] * len(fields)
        alone[index] = text
        try:
            CronSim(" ".join(alone), datetime(2000, 1, 1))
        except (CronSimError, ValueError):
            raise _wrong_field(name, text) from None


def _wrong_field(name: str, value: object) -> ConfigError:
    return ConfigError(
        f"{name} is {value!r}; it may be {_FIELDS[name][1]}; * for all; and lists, ranges and steps"
        ' of these: "1,3", "1-5", "*/2", "1-5/2"'
    )


def _walls(when: Crontab, start: datetime) -> Iterator[datetime]:
    """Iterate over the local times that match, from a local time to the end of the calendar."""
    from cronsim import CronSim  # see above

    # With naive times, so that this module decides about changes of local time: cronsim knows the
    # rule of cron only for five fields, and only gaps of whole hours.
    simulation = CronSim(_LONE_RANGE.sub(r"\1", when.expression), start)
    simulation.day_and = simulation.day_and or when.both_days
    try:
        yield from simulation
    except OverflowError:
        return  # after the year 9999


def times(when: Crontab, zone: tzinfo, moment: int) -> Iterator[int]:
    """Iterate over the Unix times of runs after a moment; some are too early or come twice."""
    fields = when.expression.split()
    fixed = not (fields[-5].startswith("*") or fields[-4].startswith("*"))
    # Times in the second pass of an hour that occurs twice; they follow after the first pass.
    repeats: deque[int] = deque()
    for wall in _walls(when, _wall_before(zone, moment)):
        before, after = _offsets(wall, zone)
        first = (wall - _EPOCH - before) // _SECOND
        if before < after:
            if fixed:
                yield _gap_end(wall, zone, range(first - (after - before) // _SECOND, first + 1))
            continue
        while repeats and repeats[0] < first:
            yield repeats.popleft()
        yield first
        if after < before and not fixed:
            repeats.append(first + (before - after) // _SECOND)
    yield from repeats


def _local(zone: tzinfo, moment: int) -> datetime:
    return (_EPOCH.replace(tzinfo=UTC) + timedelta(seconds=moment)).astimezone(zone)


def _wall_before(zone: tzinfo, moment: int) -> datetime:
    """Return a local time that is before the local times of all later moments."""
    local = _local(zone, moment)
    wall = local.replace(tzinfo=None, fold=0)
    before, after = _offsets(wall, zone)
    # In the first pass of an hour that occurs twice, the local times of that hour come once more.
    return wall - (before - after) if after < before and not local.fold else wall


def _offsets(wall: datetime, zone: tzinfo) -> tuple[timedelta, timedelta]:
    """Return the zone's offsets for the first and the second occurrence of a local time.

    They differ only where local time is changed: if it occurs twice the second offset is smaller,
    and if it is skipped the first one is.
    """
    first, second = wall.replace(tzinfo=zone), wall.replace(tzinfo=zone, fold=1)
    return first.utcoffset() or _NO_OFFSET, second.utcoffset() or _NO_OFFSET


def _gap_end(wall: datetime, zone: tzinfo, moments: range) -> int:
    """Return the first of the moments whose local time is later than a skipped one."""
    later = bisect_left(
        moments, True, key=lambda moment: _local(zone, moment).replace(tzinfo=None) > wall
    )
    return moments[later]
