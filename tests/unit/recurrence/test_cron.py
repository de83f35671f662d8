"""Crontabs: their fields, days, and clock changes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import Crontab, Timing, When, crontab
from tests.unit.recurrence.runs import ODD, runs, unix


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("30 2 * * *", ["02:30:00+0200"]),
        ("15 30 2 * * *", ["02:30:15+0200"]),
        ("0,30 2,3 * * *", ["02:00:00+0200", "02:30:00+0200", "03:00:00+0100", "03:30:00+0100"]),
        (
            "*/30 2 * * *",
            ["02:00:00+0200", "02:30:00+0200", "02:00:00+0100", "02:30:00+0100"],
        ),
        (
            "5 30 */2 * * *",
            ["00:30:05+0200", "02:30:05+0200", "02:30:05+0100", "04:30:05+0100"],
        ),
    ],
)
def test_in_the_doubled_hour_of_paris_fixed_times_run_once_and_others_twice(
    expression: str, expected: list[str]
) -> None:
    found = runs(crontab(expression), "2026-10-24T22:00", "2026-10-25T05:00", "Europe/Paris")
    assert found == [f"10-25 {time}" for time in expected]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("30 2 * * *", ["03:00:00+0200"]),
        ("0-59/10 2 * * *", ["03:00:00+0200"]),
        ("30 2,3 * * *", ["03:00:00+0200", "03:30:00+0200"]),
        ("0 2,3 * * *", ["03:00:00+0200"]),
        ("15 30 2 * * *", ["03:00:00+0200"]),
        ("*/30 2 * * *", []),
        ("15 */30 2 * * *", []),
        ("30 */2 28 3 *", ["00:30:00+0100", "04:30:00+0200", "06:30:00+0200"]),
    ],
)
def test_fixed_times_in_the_skipped_hour_of_paris_run_once_after_it(
    expression: str, expected: list[str]
) -> None:
    found = runs(crontab(expression), "2027-03-27T22:00", "2027-03-28T05:00", "Europe/Paris")
    assert found == [f"03-28 {time}" for time in expected]


@pytest.mark.parametrize(
    ("zone", "expression", "begin", "end", "expected"),
    [
        ("America/New_York", "30 1 * * *", "2026-11-01", "2026-11-02", ["11-01 01:30:00-0400"]),
        ("America/New_York", "30 2 * * *", "2026-03-08", "2026-03-09", ["03-08 03:00:00-0400"]),
        (
            "America/New_York",
            "30 * * * *",
            "2026-11-01T05:00",
            "2026-11-01T08:00",
            ["11-01 01:30:00-0400", "11-01 01:30:00-0500", "11-01 02:30:00-0500"],
        ),
        # A change by half an hour, at 2:00
        (
            "Australia/Lord_Howe",
            "45 1 * * *",
            "2026-04-04",
            "2026-04-05",
            ["04-05 01:45:00+1100"],
        ),
        (
            "Australia/Lord_Howe",
            "*/15 1 * * *",
            "2026-04-04T14:00",
            "2026-04-04T16:00",
            [
                "04-05 01:15:00+1100",
                "04-05 01:30:00+1100",
                "04-05 01:45:00+1100",
                "04-05 01:30:00+1030",
                "04-05 01:45:00+1030",
            ],
        ),
        (
            "Australia/Lord_Howe",
            "15,45 2 * * *",
            "2026-10-03",
            "2026-10-04",
            ["10-04 02:30:00+1100", "10-04 02:45:00+1100"],
        ),
        (
            "Australia/Lord_Howe",
            "0,30 * * * *",
            "2026-10-03T15:00",
            "2026-10-03T16:40",
            ["10-04 02:30:00+1100", "10-04 03:00:00+1100", "10-04 03:30:00+1100"],
        ),
        # A change at midnight
        ("America/Havana", "0 0 * * *", "2026-03-08", "2026-03-09", ["03-08 01:00:00-0400"]),
        ("America/Havana", "30 0 * * *", "2026-11-01", "2026-11-02", ["11-01 00:30:00-0400"]),
        ("Asia/Beirut", "@daily", "2026-03-28", "2026-03-29", ["03-29 01:00:00+0300"]),
        # A day that was skipped
        (
            "Pacific/Apia",
            "0 9 * * *",
            "2011-12-29T10:00",
            "2011-12-31",
            ["12-29 09:00:00-1000", "12-31 00:00:00+1400", "12-31 09:00:00+1400"],
        ),
        ("Pacific/Apia", "0 */12 30 12 *", "2011-12-01", "2012-01-31", []),
        ("Pacific/Apia", "0 0 30 12 *", "2011-12-01", "2012-01-31", ["12-31 00:00:00+1400"]),
        # A change of the offset without summer time
        ("Asia/Pyongyang", "45 23 * * *", "2018-05-04", "2018-05-05", ["05-05 00:00:00+0900"]),
        ("Asia/Pyongyang", "45 23 * * *", "2015-08-14", "2015-08-15", ["08-14 23:45:00+0900"]),
    ],
)
def test_every_change_of_a_clock_follows_the_same_rule(
    zone: str, expression: str, begin: str, end: str, expected: list[str]
) -> None:
    assert runs(crontab(expression), begin, end, zone) == expected


def test_runs_before_a_moment_in_the_doubled_hour_do_not_come_again() -> None:
    fixed = Timing(when=crontab("30 2 * * *"), timezone="Europe/Paris")
    assert fixed.after(unix("2026-10-25T02:15+01:00")) == unix("2026-10-26T02:30+01:00")
    moving = Timing(when=crontab("*/30 2 * * *"), timezone="Europe/Paris")
    assert moving.after(unix("2026-10-25T02:45+02:00")) == unix("2026-10-25T02:00+01:00")
    assert moving.after(unix("2026-10-25T02:00+01:00")) == unix("2026-10-25T02:30+01:00")


@pytest.mark.parametrize(
    ("when", "expression"),
    [
        (crontab(), "* * * * *"),
        (crontab(30), "30 * * * *"),
        (crontab("*/5", "2-10/3"), "*/5 2-10/3 * * *"),
        (crontab(0, 9, "mon-fri", "1-7", "1,7"), "0 9 1-7 1,7 mon-fri"),
        (crontab(minute={45, 0, 15, 30}), "0,15,30,45 * * * *"),
        (crontab(minute=range(3)), "0,1,2 * * * *"),
        (crontab(0, 0, ["mon", 5, "sunday"]), "0 0 * * 5,mon,sun"),
        (crontab(0, 0, "Sunday, Thursday"), "0 0 * * Sun,Thu"),
        (crontab("5, 10"), "5,10 * * * *"),
        (crontab(0, 0, "fri-mon"), "0 0 * * 5,6,0,1"),
        (crontab(0, "22-3/2"), "0 22,0,2 * * *"),
        (crontab(0, 0, 1, month_of_year="november-february"), "0 0 * 11,12,1,2 1"),
        (crontab(second="*/10"), "*/10 * * * * *"),
        (crontab(second=0), "0 * * * * *"),
        (crontab("  */5 *  * * * "), "*/5 * * * *"),
        (crontab("@hourly"), "0 * * * *"),
        (crontab("@daily"), "0 0 * * *"),
        (crontab("@midnight"), "0 0 * * *"),
        (crontab("@weekly"), "0 0 * * 0"),
        (crontab("@monthly"), "0 0 1 * *"),
        (crontab("@yearly"), "0 0 1 1 *"),
        (crontab("@annually"), "0 0 1 1 *"),
    ],
)
def test_celerys_forms_and_whole_expressions_become_one_text(
    when: Crontab, expression: str
) -> None:
    assert when.expression == expression


@pytest.mark.parametrize(
    ("day_of_week", "days"),
    [
        (0, [1, 8]),
        (7, [1, 8]),
        ("0", [1, 8]),
        ("sunday", [1, 8]),
        ("mon-fri", [2, 3, 4, 5, 6, 9, 10]),
        ("sat-mon", [1, 2, 7, 8, 9]),
        ("sat,sun", [1, 7, 8]),
        ({6, 3}, [4, 7]),
        ("5-7", [1, 6, 7, 8]),
        ("*/3", [1, 4, 7, 8]),
        ("mon-mon/2", [2, 9]),
        ("5#2", []),
        ("2#2", [10]),
        ("1,sun-tue", [1, 2, 3, 8, 9, 10]),
    ],
)
def test_days_of_the_week_are_the_right_ones(day_of_week: Any, days: list[int]) -> None:
    # 1 November 2026 was a Sunday
    found = runs(crontab(0, 12, day_of_week), "2026-11-01", "2026-11-11")
    assert [int(time[3:5]) for time in found] == days


def test_both_day_fields_have_to_match_as_in_celery_or_one_as_in_cron() -> None:
    celery = crontab(0, 12, "fri", 13)
    assert runs(celery, "2026-01-01", "2026-12-31") == [
        "02-13 12:00:00+0000",
        "03-13 12:00:00+0000",
        "11-13 12:00:00+0000",
    ]
    cron = crontab("0 12 13 * fri")
    assert len(runs(cron, "2026-11-01", "2026-12-01")) == 4
    assert len(runs(cron, "2026-10-01", "2026-11-01")) == 6
    starred = crontab("0 12 */2 * fri")  # a star in either field: both have to match in cron too
    assert runs(starred, "2026-11-01", "2026-12-01") == [
        "11-13 12:00:00+0000",
        "11-27 12:00:00+0000",
    ]


def test_a_field_that_does_not_restrict_makes_no_difference_between_the_forms() -> None:
    assert crontab(0, 12, "fri") == crontab("0 12 * * fri")
    assert crontab(0, 12, day_of_month="*/2", day_of_week=5) == crontab("0 12 */2 * 5")
    assert crontab(0, 12, "fri", 13) != crontab("0 12 13 * fri")


def test_the_29th_of_february_comes_in_leap_years_only() -> None:
    timing = Timing(when=crontab("0 0 29 2 *"))
    found = timing.between(unix("2026-01-01"), unix("2110-01-01"))
    years = [datetime.fromtimestamp(due, UTC).year for due in found]
    assert years == [*range(2028, 2100, 4), 2104, 2108]


def test_the_last_day_and_the_last_friday_come_where_they_are() -> None:
    last = runs(crontab(0, 0, day_of_month="L"), "2028-01-31", "2028-04-29")
    assert [time[:5] for time in last] == ["02-29", "03-31"]
    friday = runs(crontab("0 0 * * 5L"), "2026-11-01", "2026-12-31")
    assert [time[:5] for time in friday] == ["11-27", "12-25"]


def test_a_range_of_one_number_with_a_step_is_that_number() -> None:
    assert runs(crontab("0 9-9/2 * * *"), "2026-11-01", "2026-11-02") == ["11-01 09:00:00+0000"]
    assert runs(crontab("0 09-9/2 * * *"), "2026-11-01", "2026-11-02") == ["11-01 09:00:00+0000"]
    assert len(runs(crontab("0 9/2 * * *"), "2026-11-01", "2026-11-02")) == 8


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"minute": 60}, ["minute is '60'", "0 to 59"]),
        ({"minute": -1}, ["minute is '-1'", "0 to 59"]),
        ({"minute": "a"}, ["minute is 'a'"]),
        ({"minute": ""}, ["minute is ''"]),
        ({"minute": "5,,10"}, ["minute is '5,,10'"]),
        ({"minute": "*/0"}, ["minute is '*/0'"]),
        ({"minute": "1" * 5000}, ["minute is '111"]),
        ({"minute": []}, ["minute is []"]),
        ({"minute": [5, True]}, ["minute is [5, True]"]),
        ({"minute": [[5]]}, ["minute is [[5]]"]),
        ({"minute": 5.0}, ["minute is 5.0"]),
        ({"minute": True}, ["minute is True"]),
        ({"minute": None}, ["minute is None"]),
        ({"minute": b"5"}, ["minute is b'5'"]),
        ({"second": 60}, ["second is '60'", "0 to 59"]),
        ({"hour": 24}, ["hour is '24'", "0 to 23"]),
        ({"hour": "3 4"}, ["hour is '3 4'"]),
        ({"hour": "70-2"}, ["hour is '70-2'"]),
        ({"hour": "22-2/0"}, ["hour is '22-2/0'"]),
        ({"day_of_month": 0}, ["day_of_month is '0'", "1 to 31, L"]),
        ({"month_of_year": 13}, ["month_of_year is '13'", "1 to 12 or jan to dec"]),
        ({"month_of_year": "mon"}, ["month_of_year is 'mon'"]),
        ({"day_of_week": 8}, ["day_of_week is '8'", "0 and 7 are Sunday"]),
        ({"day_of_week": "funday"}, ["day_of_week is 'funday'", "sun to sat"]),
        ({"minute": "61 * * * *"}, ["minute is '61'"]),
        ({"minute": "22-2 * * * *"}, ["minute is '22-2'"]),
        ({"minute": "60 * * * * *"}, ["second is '60'"]),
        ({"minute": "* * * *"}, ["has 4 fields", "five", "six", "@hourly"]),
        ({"minute": "* * * * * * *"}, ["has 7 fields"]),
        ({"minute": "@reboot"}, ["'@reboot' is no crontab", "@hourly, @daily"]),
        ({"minute": "0 9 * * *", "hour": 5}, ["'0 9 * * *' is a complete crontab", "leave out"]),
        ({"minute": "@daily", "second": 5}, ["is a complete crontab"]),
        ({"minute": "0 0 31 2 *"}, ["'0 0 31 2 *' never runs", "change day_of_month"]),
        ({"day_of_month": 30, "month_of_year": "feb"}, ["never runs"]),
        (
            {"day_of_month": 31, "month_of_year": "4,6", "day_of_week": "mon"},
            ["never runs", "matches both day fields"],
        ),
        ({"nowfun": datetime.now}, ["nowfun", "leave them out"]),
        ({"app": ODD}, ["no app", "leave them out"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_crontab_is_refused_with_the_field_and_what_it_may_be(
    fields: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        crontab(**fields)
    for part in parts:
        assert part in str(refused.value)


def test_a_31st_that_either_day_field_may_bring_does_come() -> None:
    assert runs(crontab("0 0 31 2 mon"), "2027-02-01", "2027-03-01")[0] == "02-08 00:00:00+0000"


def test_the_last_doubled_hour_of_the_calendar_is_not_cut_off() -> None:
    yearly = crontab("*/30 1 7 11 *")
    assert runs(yearly, "9999-11-07T05:15", "9999-12-28", "America/New_York") == [
        "11-07 01:30:00-0400",
        "11-07 01:00:00-0500",
        "11-07 01:30:00-0500",
    ]


def test_nothing_comes_after_the_last_leap_day_of_the_calendar() -> None:
    assert Timing(when=crontab("0 0 29 2 *")).after(unix("9996-03-01")) is None


def test_a_stored_crontab_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="hour is '25'"):
        msgspec.json.decode(b'{"type":"crontab","expression":"0 25 * * *"}', type=When)
