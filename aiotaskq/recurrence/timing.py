"""Times of a schedule's runs: intervals, single times, crontabs, and their bounds. Pure."""

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

# Any time zone can shift the times between these two without leaving the calendar.
_LEAST = datetime(1, 1, 3, tzinfo=UTC).timestamp()
_MOST = datetime(9999, 12, 29, tzinfo=UTC).timestamp()
_SHORTEST = 0.1  # seconds
_LONGEST = 36_525 * 86_400.0  # seconds; more is a mistake, such as microseconds


class Every(msgspec.Struct, frozen=True, tag="every"):
    """A schedule that runs at regular intervals, on a fixed grid. Made by `every`.

    The grid begins at the schedule's `start`, or else at the Unix epoch. So a restart does not
    move it, and all schedulers agree. It never drifts, because it is counted in whole microseconds.

    Args:
        seconds: The interval: 0.1 seconds to a hundred years, rounded to microseconds.

    Raises:
        ConfigError: The interval is not such a number.
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
    """Return the schedule that runs at regular intervals.

    >>> every(30) == every(timedelta(seconds=30))
    True

    Args:
        interval: Seconds or a timedelta, from 0.1 seconds to a hundred years: see `Every`.

    Raises:
        ConfigError: The interval is not such a number.
    """
    return Every(interval.total_seconds() if isinstance(interval, timedelta) else interval)


def _every_times(when: Every, moment: float, start: float | None) -> Iterator[float]:
    step = _microseconds(when.seconds)
    base = _microseconds(start or 0.0)
    # One step earlier: a moment is a float and may have been rounded up.
    index = (_microseconds(moment) - base) // step - 1
    while True:
        index += 1
        if start is None or index >= 0:
            yield (base + index * step) / 10**6


class At(msgspec.Struct, frozen=True, tag="at"):
    """A schedule that runs once. Made by `at`.

    Args:
        moment: A time in ISO 8601, in UTC or, without an offset, the local time of the schedule's
            time zone. If local time skips it, the length of the gap is added: 02:30 becomes 03:30.
            If it occurs twice, the first one counts.

    Raises:
        ConfigError: It is not a time, or not in the years 2 to 9998.
    """

    moment: str

    def __post_init__(self) -> None:
        try:
            moment = datetime.fromisoformat(self.moment)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"at {self.moment!r}: it must be a time such as 2026-11-21T10:00:00"
            ) from error
        if not 2 <= moment.year <= 9998:  # a time zone could shift others out of the calendar
            raise ConfigError(f"at {self.moment}: it must be in the years 2 to 9998")
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC)
        structs.force_setattr(self, "moment", moment.isoformat())

    def local(self, zone: tzinfo) -> datetime:
        """Return it as an aware time in a time zone; see the class for skipped and double times."""
        moment = datetime.fromisoformat(self.moment)
        return moment.replace(tzinfo=zone) if moment.tzinfo is None else moment.astimezone(zone)


def at(moment: datetime) -> At:
    """Return the schedule that runs once.

    Args:
        moment: A naive one is a local time of the schedule's time zone: see `At`.

    Raises:
        ConfigError: It is not a datetime, or not in the years 2 to 9998.
    """
    given: Any = moment  # of any type, whatever the annotation says
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
    """Return the times that a user's value stands for.

    Args:
        value: A `crontab`, `every` or `at`; seconds or a timedelta, as for `every`; a text with a
            complete crontab expression; or a datetime, as for `at`.

    Raises:
        ConfigError: It is another type, or its value is wrong.
    """
    if isinstance(value, Crontab | Every | At):
        return value
    if isinstance(value, str):
        return from_expression(value)
    if isinstance(value, datetime):
        return at(value)
    if isinstance(value, timedelta) or _is_number(value):
        return every(value)  # type: ignore[arg-type]  # it is a number or a timedelta
    for base in type(value).__mro__:
        if base.__module__ == "celery.schedules" and base.__name__ in _CELERY:
            raise ConfigError(f"{value!r} is Celery's; use {_CELERY[base.__name__]}")
    raise ConfigError(
        f"{value!r} is not a schedule; give aiotaskq.crontab(...), every(...) or at(...), seconds"
        ' or a timedelta, a crontab expression such as "*/5 * * * *", or a datetime'
    )


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The times of a schedule, with a time zone, jitter and bounds. Stored as JSON.

    Args:
        when: The times.
        timezone: The time zone of a crontab and of a naive `at`.
        jitter: The longest delay of a run after its due time, in seconds: see `delayed`.
        start: The Unix time of the first moment at which a run may be due, rounded to whole
            microseconds. The grid of `every` begins there. None: no bound.
        end: The Unix time of the last moment at which a run may be due. None: no bound.

    Raises:
        ConfigError: One of the arguments is wrong. For an unknown time zone the error suggests
            similar names.
    """

    when: When
    timezone: str = "UTC"
    jitter: float = 0.0
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        given: Any = self.when  # of any type, whatever the annotation says
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
        """Return the first Unix time after `moment` at which a run is due.

        None: there is no such time within the bounds and before the end of the year 9999.

        >>> Timing(when=crontab("0 9 * * *"), timezone="Europe/Paris").after(1767225600)
        1767254400.0
        """
        return next(self._times(moment), None)

    def between(self, begin: float, end: float) -> Iterator[float]:
        """Iterate over the Unix times after `begin` and up to `end` at which runs are due.

        They are computed one by one. Ten years of an hourly crontab take about a second, ten years
        of a daily one a seventh of that.
        """
        for due in self._times(begin):
            if due > end:
                return
            yield due

    def delayed(self, due: float, schedule_id: str) -> float:
        """Return the Unix time at which the run that is due at `due` is sent: with jitter.

        It depends only on the arguments, so all schedulers agree. The times are spread evenly
        from `due` to `due` + `jitter`, both included.
        """
        from hashlib import blake2b  # needed only for jitter

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
            raise ValueError("a moment that is no number has no next run")
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
        """Iterate over all times after a moment; some may be before it, or come twice."""
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
        return UTC  # works on machines without zone files too
    from zoneinfo import ZoneInfo  # needed only for other time zones

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError, AttributeError):  # depends on the name
        raise ConfigError(
            f"timezone is {name!r}, but this machine knows no such time zone{_near_zones(name)} (on"
            " a system without zone files: pip install tzdata)"
        ) from None


def _near_zones(name: object) -> str:
    if not isinstance(name, str):
        return '; give a name such as "Europe/Oslo"'
    from difflib import get_close_matches  # slow to import, and needed only for errors
    from zoneinfo import available_timezones

    zones = {zone.lower(): zone for zone in sorted(available_timezones())}
    wanted = name.lower().replace(" ", "_")
    found = [zone for lower, zone in zones.items() if lower.split("/")[-1] == wanted]
    found += [zones[lower] for lower in get_close_matches(wanted, zones, n=3)]
    if not found:
        return '; give a name such as "Europe/Oslo"'
    return f"; did you mean {' or '.join(dict.fromkeys(found[:3]))}?"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _microseconds(seconds: float) -> int:
    """Return the nearest whole microseconds, exactly: a product of floats is not, in late years."""
    above, below = seconds.as_integer_ratio()
    return (2 * above * 10**6 + below) // (2 * below)
