"""Intervals, single runs, and the timing of every kind of schedule."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta, timezone
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest

from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import At, Crontab, Every, Timing, When, as_when, at, cron, crontab, every
from aiotaskq.recurrence import timing as timing_module
from tests.unit.recurrence.runs import ODD, unix


@pytest.mark.parametrize("module", [cron, timing_module])
def test_the_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    result = doctest.testmod(module, extraglobs={"crontab": crontab})
    assert result.attempted
    assert not result.failed


def test_the_crontab_library_is_imported_only_for_crontabs() -> None:
    program = (
        "import sys; from aiotaskq.recurrence import Timing, every\n"
        "assert Timing(when=every(5)).after(0) == 5.0\n"
        "assert 'cronsim' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- every --------------------------------------------------------------------------------------


def test_the_grid_lies_at_the_epoch_or_where_the_schedule_starts() -> None:
    assert Timing(when=every(90)).after(1_000_000_000) == 1_000_000_080
    assert Timing(when=every(90), start=7.0).after(100) == 187
    assert Timing(when=every(90), start=7.0).after(97) == 187
    assert Timing(when=every(90), start=7.0).after(-1e9) == 7
    assert Timing(when=every(timedelta(days=1))).after(-1) == 0


def test_a_tenth_of_a_second_does_not_drift_in_sixty_years() -> None:
    timing = Timing(when=every(0.1))
    begin = unix("2086-01-01")
    found = list(timing.between(begin, begin + 100))
    assert found == [(round(begin) * 10 + index) / 10 for index in range(1, 1001)]
    assert all(timing.after(math.nextafter(due, 0)) == due for due in found)
    later = [timing.after(due) for due in found[:-1]]
    assert later == found[1:]


@pytest.mark.parametrize(
    "interval", [0, -5, 0.09, math.nan, math.inf, 1e11, True, "30", None, timedelta(0)], ids=repr
)
def test_an_interval_that_is_none_is_refused(interval: Any) -> None:
    with pytest.raises(ConfigError, match=r"^every .*must be a number of seconds.*0\.1 s or more"):
        every(interval)


# --- at -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "zone", "expected"),
    [
        (datetime(2026, 11, 21, 10), "UTC", "2026-11-21T10:00"),
        (datetime(2026, 11, 21, 10), "Europe/Paris", "2026-11-21T10:00+01:00"),
        (datetime(2026, 11, 21, 10, tzinfo=UTC), "Europe/Paris", "2026-11-21T10:00"),
        (datetime(2027, 3, 28, 2, 30), "Europe/Paris", "2027-03-28T03:30+02:00"),
        (datetime(2026, 10, 25, 2, 30), "Europe/Paris", "2026-10-25T02:30+02:00"),
        (datetime(2026, 10, 25, 2, 30, fold=1), "Europe/Paris", "2026-10-25T02:30+02:00"),
        (datetime(2011, 12, 30, 5), "Pacific/Apia", "2011-12-31T05:00+14:00"),
        (
            datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Paris")),
            "UTC",
            "2026-10-25T02:30+01:00",
        ),
    ],
)
def test_a_single_run_comes_once_at_its_time(moment: datetime, zone: str, expected: str) -> None:
    timing = Timing(when=at(moment), timezone=zone)
    due = unix(expected)
    assert timing.after(due - 1) == due
    assert timing.after(-math.inf) == due
    assert timing.after(due) is None


def test_the_same_moment_in_two_zones_is_the_same_schedule() -> None:
    east = timezone(timedelta(hours=5))
    assert at(datetime(2026, 1, 1, 17, tzinfo=east)) == at(datetime(2026, 1, 1, 12, tzinfo=UTC))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tomorrow", "at 'tomorrow': it must be a time such as 2026"),
        ("9999-12-31", "years 2 to 9998"),
        ("0001-01-01", "years 2 to 9998"),
    ],
)
def test_a_text_that_is_no_usable_time_is_refused(wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        At(wrong)


@pytest.mark.parametrize("wrong", [None, 5, "2026-11-21", date(2026, 11, 21)], ids=repr)
def test_only_a_datetime_is_a_single_time(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="must be a datetime"):
        at(wrong)


# --- values that users give ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "when"),
    [
        (crontab(5), crontab(5)),
        (every(5), every(5)),
        (At("2026-11-21"), At("2026-11-21T00:00:00")),
        (30, Every(30.0)),
        (0.5, Every(0.5)),
        (timedelta(minutes=5), Every(300.0)),
        ("*/5 * * * *", Crontab("*/5 * * * *")),
        ("@hourly", Crontab("0 * * * *")),
        (datetime(2026, 11, 21), At("2026-11-21T00:00:00")),
        (datetime(2026, 11, 21, tzinfo=UTC), At("2026-11-21T00:00:00+00:00")),
    ],
    ids=repr,
)
def test_values_of_users_become_schedules(value: object, when: When) -> None:
    assert as_when(value) == when


@pytest.mark.parametrize(
    "wrong", [None, True, [], b"5", ODD, date(2026, 11, 21), "*/5", "5", ""], ids=repr
)
def test_values_that_are_no_schedule_are_refused_with_the_valid_ones(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"; give "):
        as_when(wrong)


@pytest.mark.parametrize(
    ("name", "bases", "ours"),
    [
        ("crontab", ("BaseSchedule",), "aiotaskq.crontab, which takes the same"),
        ("schedule", ("BaseSchedule",), "aiotaskq.every"),
        ("solar", ("BaseSchedule",), "aiotaskq.crontab or aiotaskq.every"),
    ],
)
def test_celerys_own_objects_are_refused_with_ours(
    name: str, bases: Iterable[str], ours: str
) -> None:
    of_celery = {"__module__": "celery.schedules"}
    kind = type(name, tuple(type(base, (), of_celery) for base in bases), of_celery)
    users = type("Mine", (kind,), {})
    for value in (kind(), users()):
        with pytest.raises(ConfigError, match=f"is Celery's; use {ours}"):
            as_when(value)


# --- timing -------------------------------------------------------------------------------------


def test_start_and_end_belong_to_the_time_in_between() -> None:
    whole = [60.0, 120.0, 180.0]
    for when in (crontab(), every(60)):
        assert list(Timing(when=when, start=60, end=180).between(-1e6, 1e6)) == whole
    hourly = Timing(when=crontab("@hourly"), start=3600.5, end=10_799.5)
    assert list(hourly.between(0, 1e6)) == [7200]
    once = at(datetime.fromtimestamp(60, UTC))
    assert Timing(when=once, start=60, end=60).after(0) == 60
    assert Timing(when=once, start=60.5).after(0) is None
    assert Timing(when=once, end=59.5).after(0) is None


def test_between_leaves_out_its_begin_and_has_its_end() -> None:
    assert list(Timing(when=crontab()).between(60, 180)) == [120, 180]
    assert list(Timing(when=crontab()).between(60.5, 179.5)) == [120]
    assert list(Timing(when=crontab()).between(180, 60)) == []


def test_between_finds_each_when_it_is_asked_for() -> None:
    forever = Timing(when=crontab("* * * * * *")).between(0, math.inf)
    assert [next(forever) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/Adak"])
@pytest.mark.parametrize("when", [crontab("0 0 * * *"), every(86_400)], ids=repr)
def test_the_calendar_ends_and_no_moment_is_beyond_it(when: When, zone: str) -> None:
    timing = Timing(when=when, timezone=zone)
    for moment in (unix("9999-12-31"), 1e18, math.inf):
        assert timing.after(moment) is None
    assert list(timing.between(unix("9999-12-20"), math.inf))
    first = timing.after(-math.inf)
    assert first is not None
    assert first < unix("0001-02-01")
    with pytest.raises(ValueError, match="no number"):
        timing.after(math.nan)


def test_ten_years_of_an_hourly_schedule_are_all_there() -> None:
    timing = Timing(when=crontab("@hourly"), timezone="Europe/Paris")
    begin, end = unix("2026-01-01"), unix("2036-01-01")
    assert list(timing.between(begin, end)) == [begin + 3600 * n for n in range(1, 87_649)]


def test_jitter_spreads_evenly_and_is_told_by_schedule_and_run() -> None:
    timing = Timing(when=every(60), jitter=10)
    delays = [timing.delayed(60.0 * run, "report") - 60 * run for run in range(4000)]
    assert all(0 <= delay <= 10 for delay in delays)
    tenths = [sum(low <= delay < low + 1 for delay in delays) for low in range(10)]
    assert all(320 < count < 480 for count in tenths)
    assert timing.delayed(60, "report") == timing.delayed(60.0, "report")
    assert timing.delayed(60, "report") != timing.delayed(60, "other")
    assert Timing(when=every(60)).delayed(60, "report") == 60


def test_jitter_is_the_same_in_every_version() -> None:
    timing = Timing(when=every(60), jitter=100)
    assert timing.delayed(1_000_000_020.0, "report") == pytest.approx(
        1_000_000_063.8427553, abs=1e-6
    )


@pytest.mark.parametrize(
    ("timing", "text"),
    [
        (Timing(when=crontab("*/5")), "*/5 * * * *"),
        (Timing(when=crontab(0, 9), timezone="Europe/Paris"), "0 9 * * * Europe/Paris"),
        (Timing(when=crontab(0, 9, 5, 13)), "0 9 13 * 5 (both days)"),
        (Timing(when=every(30), timezone="Europe/Paris"), "every 30 s"),
        (Timing(when=every(0.25)), "every 0.25 s"),
        (Timing(when=every(90)), "every 90 s"),
        (Timing(when=every(300)), "every 5 min"),
        (Timing(when=every(7200)), "every 2 h"),
        (Timing(when=every(timedelta(weeks=1))), "every 7 d"),
        (Timing(when=at(datetime(2026, 11, 21, 10))), "at 2026-11-21 10:00"),
        (Timing(when=at(datetime(2026, 11, 21, 10, 0, 5))), "at 2026-11-21 10:00:05"),
        (
            Timing(when=at(datetime(2026, 11, 21, 10, tzinfo=UTC)), timezone="Europe/Paris"),
            "at 2026-11-21 11:00 Europe/Paris",
        ),
    ],
)
def test_a_schedule_is_described_in_a_few_words(timing: Timing, text: str) -> None:
    assert timing.describe() == text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"timezone": "Europe/Pariss"}, "timezone is 'Europe/Pariss'.*did you mean .*Europe/Paris"),
        ({"timezone": "paris"}, "did you mean .*Europe/Paris"),
        ({"timezone": "america/new york"}, "did you mean .*America/New_York"),
        ({"timezone": "qqqqqqq"}, 'such as "Europe/Oslo".*pip install tzdata'),
        ({"timezone": ""}, "timezone is ''"),
        ({"timezone": "../etc/passwd"}, "timezone is"),
        ({"timezone": "Europe"}, "timezone is 'Europe'"),
        ({"timezone": "a\0b"}, "timezone is"),
        ({"timezone": None}, "timezone is None"),
        ({"timezone": 5}, "timezone is 5"),
        ({"jitter": -1}, "jitter is -1; it must be seconds"),
        ({"jitter": math.inf}, "jitter is inf"),
        ({"jitter": math.nan}, "jitter is nan"),
        ({"jitter": "5"}, "jitter is '5'"),
        ({"start": math.nan}, "start is nan; it must be Unix time"),
        ({"end": 1e12}, "end is 1.*; it must be Unix time in seconds"),
        ({"end": datetime(2026, 1, 1)}, "end is datetime"),
        ({"start": True}, "start is True"),
        ({"start": 5, "end": 4}, "end is 4.0, which is before start, 5.0"),
        ({"when": "* * * * *"}, "when is '\\* \\* \\* \\* \\*'; it must be a crontab"),
    ],
    ids=repr,
)
def test_a_wrong_timing_is_refused_where_it_is_written(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Timing(**{"when": every(60), **wrong})


def test_the_form_that_is_stored_stays_readable() -> None:
    timing = Timing(when=crontab(0, 9, 5, 13), timezone="Europe/Paris", end=5.5)
    encoded = msgspec.json.encode(timing)
    assert msgspec.json.decode(encoded) == {
        "when": {"type": "crontab", "expression": "0 9 13 * 5", "both_days": True},
        "timezone": "Europe/Paris",
        "jitter": 0.0,
        "start": None,
        "end": 5.5,
    }
    assert msgspec.json.decode(encoded, type=Timing) == timing
    for when in (every(5), at(datetime(2026, 1, 1))):
        assert msgspec.json.decode(msgspec.json.encode(when), type=When) == when
