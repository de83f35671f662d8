"""When a schedule runs. Pure: the times follow from the timing and the moment asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, TypeAlias

import msgspec
from msgspec import structs

from aiotaskq.errors import ConfigError
from aiotaskq.recurrence.cron import Crontab, from_expression
from aiotaskq.recurrence.cron import times as crontab_times

# A time zone must be able to move what lies between without leaving the calendar.
_LEAST = datetime(1, 1, 3, tzinfo=UTC).timestamp()
_MOST = datetime(9999, 12, 29, tzinfo=UTC).timestamp()
_SHORTEST = 0.1  # seconds
_LONGEST = 36_525 * 86_400.0  # seconds; more is a slip, such as microseconds


class Every(msgspec.Struct, frozen=True, tag="every"):
    """Runs on an even grid. Made by `every`.

    The grid begins at the schedule's `start`, or else at the Unix epoch: a restart does not move
    it, and all schedulers agree. It never drifts: it is counted in whole microseconds.

    Args:
        seconds: From one run to the next: 0.1 to a hundred years, rounded to microseconds.

    Raises:
        ConfigError: It is anything else.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not (_is_number(self.seconds) and _SHORTEST <= self.seconds <= _LONGEST):
            raise ConfigError(
                f"every {self.seconds!r}: it must be a number of seconds, or a timedelta, of"
                f" {_SHORTEST} s or more and a hundred years or less"
            )
        structs.force_setattr(self, "seconds", _microseconds(self.seconds) / 10**6)


def every(interval: float | timedelta) -> Every:
    """Return the schedule that runs each time the interval, in seconds, has passed.

    >>> every(30) == every(timedelta(seconds=30))
    True

    Args:
        interval: 0.1 seconds to a hundred years: see `Every`.

    Raises:
        ConfigError: It is anything else.
    """
    return Every(interval.total_seconds() if isinstance(interval, timedelta) else interval)


def _every_times(when: Every, moment: float, start: float | None) -> Iterator[float]:
    step = _microseconds(when.seconds)
    base = _microseconds(start or 0.0)
    # One before, since a moment is a float, and may be rounded to the one after.
    index = (_microseconds(moment) - base) // step - 1
    while True:
        index += 1
        if start is None or index >= 0:
            yield (base + index * step) / 10**6


class At(msgspec.Struct, frozen=True, tag="at"):
    """Runs once. Made by `at`.

    Args:
        moment: A time in ISO 8601: in UTC, or without offset, as the clock of the schedule's time
            zone shows it. Where that clock skips it, it comes as long after the beginning of the
            gap as the clock would have taken; where it occurs twice, it comes the first time.

    Raises:
        ConfigError: It is no time, or lies beyond the years 2 to 9998.
    """

    moment: str

    def __post_init__(self) -> None:
        try:
            moment = datetime.fromisoformat(self.moment)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"at {self.moment!r}: it must be a time such as 2026-11-21T10:00:00"
            ) from error
        if not 2 <= moment.year <= 9998:  # else a time zone may move it out of the calendar
            raise ConfigError(f"at {self.moment}: it must lie in the years 2 to 9998")
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC)
        structs.force_setattr(self, "moment", moment.isoformat())

    def local(self, zone: tzinfo) -> datetime:
        """Return it as an aware time; see the class for where the clock is changed."""
        moment = datetime.fromisoformat(self.moment)
        return moment.replace(tzinfo=zone) if moment.tzinfo is None else moment.astimezone(zone)


def at(moment: datetime) -> At:
    """Return the schedule that runs once.

    Args:
        moment: A naive one is taken in the time zone of the schedule: see `At`.

    Raises:
        ConfigError: It is no datetime, or lies beyond the years 2 to 9998.
    """
    given: Any = moment  # whatever it was given
    if not isinstance(given, datetime):
        raise ConfigError(f"at {given!r}: it must be a datetime")
    return At(moment.isoformat())


When: TypeAlias = Crontab | Every | At
_CELERY = {
    "crontab": "aiotaskq.crontab, which takes the same arguments",
    "schedule": "aiotaskq.every, which takes seconds or a timedelta",
    "BaseSchedule": "aiotaskq.crontab or aiotaskq.every",
}


def as_when(value: object) -> When:
    """Return what a user's value says about when to run.

    Args:
        value: A `crontab`, `every` or `at`; seconds or a timedelta as for `every`; text with a
            whole crontab expression; a datetime as for `at`.

    Raises:
        ConfigError: It is anything else, or wrong.
    """
    if isinstance(value, Crontab | Every | At):
        return value
    if isinstance(value, str):
        return from_expression(value)
    if isinstance(value, datetime):
        return at(value)
    if isinstance(value, timedelta) or _is_number(value):
        return every(value)  # type: ignore[arg-type]  # it was asked
    for base in type(value).__mro__:
        if base.__module__ == "celery.schedules" and base.__name__ in _CELERY:
            raise ConfigError(f"{value!r} is Celery's; use {_CELERY[base.__name__]}")
    raise ConfigError(
        f"{value!r} is no schedule; wanted is aiotaskq.crontab(...), every(...) or at(...), seconds"
        ' or a timedelta, a crontab expression such as "*/5 * * * *", or a datetime'
    )


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """When a schedule runs, and within which bounds. Travels as JSON.

    Args:
        when: The times.
        timezone: By whose clock a crontab runs, and a naive `at`.
        jitter: At most so many seconds does a run come later than it is due: see `delayed`.
        start: The Unix time of the first moment at which a run may be due, rounded to whole
            microseconds; the grid of `every` begins there. None: there was never a first.
        end: The Unix time of the last such moment.

    Raises:
        ConfigError: One of them is wrong; in it, the names most like that of an unknown zone.
    """

    when: When
    timezone: str = "UTC"
    jitter: float = 0.0
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        given: Any = self.when  # whatever it was given
        if not isinstance(given, Crontab | Every | At):
            raise ConfigError(f"when is {given!r}; it must be a crontab, every or at")
        _zone(self.timezone)
        if not (_is_number(self.jitter) and 0 <= self.jitter < math.inf):
            raise ConfigError(f"jitter is {self.jitter!r}; it must be seconds, 0 or more")
        for name in ("start", "end"):
            bound = getattr(self, name)
            if bound is None:
                continue
            if not (_is_number(bound) and _LEAST <= bound <= _MOST):
                raise ConfigError(
                    f"{name} is {bound!r}; it must be Unix time in seconds, before the year 10000"
                )
            structs.force_setattr(self, name, _microseconds(bound) / 10**6)
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ConfigError(f"end is {self.end}, which is before start, {self.start}; swap them")

    def after(self, moment: float) -> float | None:
        """Return the first Unix time strictly after `moment` at which a run is due.

        None: there is none within the bounds, or before the end of the year 9999.

        >>> Timing(when=crontab("0 9 * * *"), timezone="Europe/Paris").after(1767225600)
        1767254400.0
        """
        return next(self._times(moment), None)

    def between(self, begin: float, end: float) -> Iterator[float]:
        """Iterate over the Unix times after `begin` and not after `end` at which runs are due.

        Each is found when it is asked for: ten years of an hourly crontab take about a second,
        and of a daily one a seventh of that.
        """
        for due in self._times(begin):
            if due > end:
                return
            yield due

    def delayed(self, due: float, schedule_id: str) -> float:
        """Return the Unix time at which the run that is due at `due` is to come, with jitter.

        It follows from the arguments, so that all schedulers agree, and spreads evenly over the
        seconds from `due` to `due` + `jitter`, both included.
        """
        from hashlib import blake2b  # only who has jitter pays for it

        text = f"{float(due)!r} {schedule_id}".encode("utf-8", "surrogatepass")
        share = int.from_bytes(blake2b(text, digest_size=8).digest()) / (2**64 - 1)
        return due + self.jitter * share

    def describe(self) -> str:
        """Return a short text for a table.

        >>> Timing(when=every(30)).describe(), Timing(when=crontab("*/5")).describe()
        ('every 30 s', '*/5 * * * *')
        >>> Timing(when=at(datetime(2026, 11, 21, 10)), timezone="Europe/Oslo").describe()
        'at 2026-11-21 10:00 Europe/Oslo'
        """
        zone = "" if self.timezone == "UTC" else f" {self.timezone}"
        match self.when:
            case Every(seconds=seconds):
                return f"every {_duration(seconds)}"
            case At() as once:
                local = once.local(_zone(self.timezone)).replace(tzinfo=None)
                exact = local.second or local.microsecond
                return f"at {local.isoformat(' ', 'auto' if exact else 'minutes')}{zone}"
            case Crontab(expression, both_days):
                return f"{expression}{zone}{' (both days)' if both_days else ''}"

    def _times(self, moment: float) -> Iterator[float]:
        if math.isnan(moment):
            raise ValueError("there is nothing after a moment that is no number")
        last = max(moment, _LEAST)
        if self.start is not None:
            last = max(last, math.nextafter(self.start, -math.inf))
        most = _MOST if self.end is None else self.end
        if last >= most:
            return
        for due in self._candidates(last):
            if due > most:
                return
            if due > last:
                last = float(due)
                yield last

    def _candidates(self, moment: float) -> Iterator[float]:
        """Iterate over all times after a moment, with some that are not after it or come again."""
        match self.when:
            case Every() as steady:
                return _every_times(steady, moment, self.start)
            case At() as once:
                return iter([once.local(_zone(self.timezone)).timestamp()])
            case Crontab() as by_clock:
                return crontab_times(by_clock, _zone(self.timezone), math.floor(moment))


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds % size == 0:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + " s"


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC  # known without asking for it, on machines without zone files too
    from zoneinfo import ZoneInfo  # only who needs one pays for it

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError, AttributeError):  # by what is wrong with it
        raise ConfigError(
            f"timezone is {name!r}, which is no time zone known here{_near_zones(name)} (on a"
            " system without zone files: pip install tzdata)"
        ) from None


def _near_zones(name: object) -> str:
    if not isinstance(name, str):
        return '; wanted is a name such as "Europe/Oslo"'
    from difflib import get_close_matches  # only who misspells pays for it
    from zoneinfo import available_timezones

    zones = {zone.lower(): zone for zone in sorted(available_timezones())}
    wanted = name.lower().replace(" ", "_")
    found = [zone for lower, zone in zones.items() if lower.split("/")[-1] == wanted]
    found += [zones[lower] for lower in get_close_matches(wanted, zones, n=3)]
    if not found:
        return '; wanted is a name such as "Europe/Oslo"'
    return f"; did you mean {' or '.join(dict.fromkeys(found[:3]))}?"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _microseconds(seconds: float) -> int:
    """Return the nearest whole microseconds, exactly: a product of floats is off for late years."""
    above, below = seconds.as_integer_ratio()
    return (2 * above * 10**6 + below) // (2 * below)
