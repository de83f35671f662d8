"""Runs of schedules, compared with a walk through the calendar moment by moment."""

from __future__ import annotations

import calendar
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import Crontab, Timing, at, crontab, every

HOUR, DAY = 3_600, 86_400

# A zone and a day (UTC) on which its clock is changed; the last zone has no change.
CHANGES = [
    ("Europe/Paris", "2026-10-25"),
    ("Europe/Paris", "2027-03-28"),
    ("America/New_York", "2026-11-01"),
    ("America/New_York", "2026-03-08"),
    ("Australia/Lord_Howe", "2026-04-04"),  # by half an hour
    ("Australia/Lord_Howe", "2026-10-03"),
    ("America/Havana", "2026-03-08"),  # at midnight
    ("America/Havana", "2026-11-01"),
    ("Asia/Beirut", "2026-03-28"),
    ("Asia/Beirut", "2026-10-24"),
    ("Pacific/Apia", "2011-12-30"),  # skips a day
    ("Pacific/Kwajalein", "1993-08-21"),  # the same
    ("Asia/Pyongyang", "2015-08-14"),  # another offset, and no summer time
    ("Asia/Pyongyang", "2018-05-04"),
    ("America/Caracas", "2007-12-09"),
    ("Europe/Moscow", "2014-10-25"),
    ("Europe/Dublin", "2026-10-25"),  # there, winter time is the exception
    ("Africa/Casablanca", "2026-02-15"),
    ("Antarctica/Troll", "2026-03-29"),  # by two hours
    ("Antarctica/Troll", "2026-10-25"),
    ("Asia/Kathmandu", "1985-12-31"),  # by a quarter of an hour
    ("Europe/Paris", "2026-07-01"),
    ("Asia/Kolkata", "2028-02-29"),
    ("America/St_Johns", "2026-12-31"),
    ("UTC", "2026-10-25"),
]


class Field(NamedTuple):
    """The text of one field, and its numbers."""

    text: str
    numbers: frozenset[int]


def fields(least: int, most: int) -> st.SearchStrategy[Field]:
    numbers = range(least, most + 1)
    number = st.integers(least, most)
    ranges = st.tuples(number, number).map(sorted)
    steps = st.integers(1, most)

    def listed(chosen: list[int]) -> Field:
        return Field(",".join(map(str, chosen)), frozenset(chosen))

    def ranged(ends: list[int], step: int) -> Field:
        first, last = ends
        return Field(f"{first}-{last}/{step}", frozenset(range(first, last + 1, step)))

    return st.one_of(
        st.just(Field("*", frozenset(numbers))),
        steps.map(lambda step: Field(f"*/{step}", frozenset(numbers[::step]))),
        st.lists(number, min_size=1, max_size=4, unique=True).map(listed),
        ranges.map(lambda ends: ranged(ends, 1)),
        st.tuples(ranges, steps).map(lambda both: ranged(*both)),
    )


class Plan(NamedTuple):
    """An expression, with the numbers of each of its fields."""

    second: Field
    minute: Field
    hour: Field
    day_of_month: Field
    month: Field
    day_of_week: Field

    @property
    def fixed(self) -> bool:
        return not (self.minute.text[0] == "*" or self.hour.text[0] == "*")

    def text(self, *, seconds: bool) -> str:
        return " ".join(field.text for field in self[0 if seconds else 1 :])

    def matches(self, wall: datetime, *, both: bool) -> bool:
        if wall.second not in self.second.numbers or wall.minute not in self.minute.numbers:
            return False
        if wall.hour not in self.hour.numbers or wall.month not in self.month.numbers:
            return False
        of_month = wall.day in self.day_of_month.numbers
        of_week = wall.isoweekday() % 7 in self.day_of_week.numbers or (
            wall.isoweekday() in self.day_of_week.numbers
        )
        starred = self.day_of_month.text[0] == "*" or self.day_of_week.text[0] == "*"
        return (of_month and of_week) if both or starred else (of_month or of_week)


FULL_MINUTE = st.just(Field("0", frozenset({0})))
ANY = st.just(Field("*", frozenset(range(62))))
# Mostly every day: otherwise there are few runs within the days of the walk.
DAYS_OF_MONTH = ANY | ANY | fields(1, 31)
DAYS_OF_WEEK = ANY | ANY | fields(0, 7)
MONTHS = ANY | ANY | ANY | fields(1, 12)
# Around changes of the clock
EARLY = st.sampled_from([0, 1, 2, 3]).map(lambda hour: Field(str(hour), frozenset({hour})))
HOURS = fields(0, 23) | EARLY
PLANS = st.builds(Plan, FULL_MINUTE, fields(0, 59), HOURS, DAYS_OF_MONTH, MONTHS, DAYS_OF_WEEK)
PLANS_OF_SECONDS = st.builds(Plan, fields(0, 59), fields(0, 59), HOURS, ANY, ANY, ANY)


def midnight(day: str) -> int:
    return calendar.timegm(datetime.fromisoformat(day).timetuple())


def walk(plan: Plan, zone: str, begin: int, end: int, step: int, *, both: bool) -> Iterator[int]:
    """Apply the rule literally to each moment after `begin` up to `end`; return the runs.

    The walk begins more than a day before `begin`, to know the earlier wall times.
    """
    place = ZoneInfo(zone)
    tick = timedelta(seconds=step)
    latest = datetime.min  # of all wall times so far
    for moment in range(begin - (begin % step) - 26 * HOUR, end + 1, step):
        wall = datetime.fromtimestamp(moment, place).replace(tzinfo=None, fold=0)
        due = plan.matches(wall, both=both)
        if plan.fixed:
            due = due and wall > latest
            skipped = latest + tick if latest > datetime.min else wall
            while skipped < wall:
                due = due or plan.matches(skipped, both=both)
                skipped += tick
            latest = max(latest, wall)
        if due and moment > begin:
            yield moment


def timing_of(plan: Plan, zone: str, *, seconds: bool, both: bool) -> Timing:
    try:
        when = Crontab(plan.text(seconds=seconds), both)
    except ConfigError as error:
        assume("never runs" not in str(error))
        raise
    return Timing(when=when, timezone=zone)


@settings(max_examples=60)
@given(st.sampled_from(CHANGES), PLANS, st.booleans(), st.integers(-30 * 60, 30 * 60))
def test_a_crontab_comes_when_a_calendar_walked_by_minutes_says_so(
    change: tuple[str, str], plan: Plan, both: bool, shift: int
) -> None:
    zone, day = change
    begin = midnight(day) - 6 * HOUR + shift * 60
    end = begin + 36 * HOUR
    timing = timing_of(plan, zone, seconds=False, both=both)
    expected = list(walk(plan, zone, begin, end, 60, both=both))
    assert list(timing.between(begin, end)) == expected


@settings(max_examples=5)
@given(
    st.sampled_from([change for change in CHANGES if change[0] not in ("Pacific/Apia",)]),
    PLANS_OF_SECONDS,
    st.integers(0, 20 * HOUR),
)
def test_a_crontab_of_six_fields_comes_when_a_calendar_walked_by_seconds_says_so(
    change: tuple[str, str], plan: Plan, shift: int
) -> None:
    zone, day = change
    begin = midnight(day) + shift
    end = begin + 4 * HOUR
    timing = timing_of(plan, zone, seconds=True, both=False)
    expected = list(walk(plan, zone, begin, end, 1, both=False))
    assert list(timing.between(begin, end)) == expected


@given(
    st.sampled_from(CHANGES),
    PLANS,
    st.booleans(),
    st.integers(-2 * DAY, 2 * DAY),
    st.floats(0, 1, exclude_max=True),
)
def test_between_two_runs_the_later_one_is_next(
    change: tuple[str, str], plan: Plan, both: bool, shift: int, share: float
) -> None:
    zone, day = change
    timing = timing_of(plan, zone, seconds=False, both=both)
    first = timing.after(midnight(day) + shift)
    assert first is not None
    second = timing.after(first)
    assert second is not None
    assert first < second
    moment = first + share * (second - first)
    assume(moment < second)
    assert timing.after(moment) == second


def microseconds(seconds: float) -> int:
    """Return the nearest whole microseconds, exactly: a product of floats would be rounded."""
    return math.floor(Fraction(seconds) * 10**6 + Fraction(1, 2))


@given(st.floats(0.1, 1e7), st.floats(-1e9, 4e9), st.none() | st.floats(0, 4e9))
@example(4398047.3683545, 0.0, None)
def test_the_grid_of_every_is_even_and_has_no_holes(
    seconds: float, moment: float, start: float | None
) -> None:
    timing = Timing(when=every(seconds), start=start)
    first = timing.after(moment)
    assert first is not None
    second = timing.after(first)
    assert second is not None
    assert first > moment
    step = microseconds(seconds)
    assert microseconds(second) - microseconds(first) == step
    assert (microseconds(first) - microseconds(timing.start or 0)) % step == 0
    if timing.start is None or moment >= timing.start:
        assert first - moment <= step / 1e6 + 1e-6
    else:
        assert first == timing.start
    assert timing.after((first + second) / 2) == second


ZONES = st.sampled_from([zone for zone, _ in CHANGES])
WHENS = st.one_of(
    st.sampled_from([crontab(), crontab(0, "*/2", second=5), crontab(0, 0, 1, 13)]),
    st.floats(0.1, 3e9).map(every),
    st.datetimes(datetime(2, 1, 3), datetime(9998, 1, 1)).map(at),
    st.datetimes(datetime(2, 1, 3), datetime(9998, 1, 1)).map(
        lambda moment: at(moment.replace(tzinfo=UTC))
    ),
)


@given(WHENS, ZONES, st.floats(0, 1e6), st.floats(-1e9, 1e9), st.floats(0, 1e10))
def test_a_timing_that_travelled_as_json_is_the_same(
    when: Crontab, zone: str, jitter: float, start: float, length: float
) -> None:
    timing = Timing(when=when, timezone=zone, jitter=jitter, start=start, end=start + length + 1)
    again = msgspec.json.decode(msgspec.json.encode(timing), type=Timing)
    assert again == timing
    assert hash(again) == hash(timing)
    assert again.after(0) == timing.after(0)


@given(st.floats(0, 1e6), st.floats(0, 4e9), st.text(max_size=20))
def test_jitter_stays_in_its_bounds_and_is_the_same_for_all(
    jitter: float, due: float, schedule_id: str
) -> None:
    timing = Timing(when=every(60), jitter=jitter)
    delayed = timing.delayed(due, schedule_id)
    assert due <= delayed <= due + jitter
    again = msgspec.json.decode(msgspec.json.encode(timing), type=Timing)
    assert again.delayed(due, schedule_id) == delayed


@settings(max_examples=150)
@given(st.text("0123456789*/-,#LWlmonfrijan @", max_size=24) | st.text(max_size=12))
def test_any_text_is_a_crontab_or_is_refused(text: str) -> None:
    for make in (
        crontab,
        lambda field: crontab(0, 0, field),
        lambda field: crontab(0, 0, "*", field),
    ):
        try:
            when = make(text)
        except ConfigError:
            continue
        assert Timing(when=when).after(0) is not None
