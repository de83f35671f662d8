"""The plan of a schedule: the runs to send, by how late they are."""

from __future__ import annotations

import random

import pytest

from aiotaskq.recurrence import Misfire, Plan, Schedule, Timing, crontab, every, plan

SECONDLY = Schedule(every(1)).timing("UTC")
DAILY = Schedule(crontab(0, 3)).timing("UTC")
DAY = 86_400.0
THREE = 3 * 3_600.0


def planned(
    timing: Timing,
    due: float,
    now: float,
    misfire: Misfire = "once",
    grace: float = 60.0,
    most: int = 1000,
) -> Plan:
    return plan(timing, "name", due, now, misfire=misfire, grace=grace, most=most)


@pytest.mark.parametrize("misfire", ["skip", "once", "all"])
def test_a_run_whose_time_has_not_come_is_left_as_it_is(misfire: Misfire) -> None:
    assert planned(DAILY, THREE, THREE - 0.001, misfire) == Plan([], THREE, missed=False)


@pytest.mark.parametrize("misfire", ["skip", "once", "all"])
def test_every_run_that_is_late_within_the_grace_is_sent(misfire: Misfire) -> None:
    assert planned(SECONDLY, 100, 103.5, misfire) == Plan([100, 101, 102, 103], 104, missed=False)
    assert planned(SECONDLY, 100, 160, misfire).runs[0] == 100


def test_once_sends_the_latest_alone_when_anything_comes_too_late() -> None:
    assert planned(SECONDLY, 100, 5000.5) == Plan([5000], 5001, missed=True)
    assert planned(DAILY, THREE, 10 * DAY) == Plan([THREE + 9 * DAY], THREE + 10 * DAY, missed=True)


def test_skip_sends_only_runs_that_are_not_too_late() -> None:
    assert planned(SECONDLY, 100, 5000.5, "skip", grace=2) == Plan([4999, 5000], 5001, missed=True)
    assert planned(DAILY, THREE, 10 * DAY, "skip") == Plan([], THREE + 10 * DAY, missed=True)


def test_all_sends_each_some_at_a_time() -> None:
    first = planned(DAILY, THREE, 5 * DAY, "all", most=3)
    assert first == Plan([THREE, THREE + DAY, THREE + 2 * DAY], THREE + 3 * DAY, missed=False)
    rest = planned(DAILY, THREE + 3 * DAY, 5 * DAY, "all", most=3)
    assert rest == Plan([THREE + 3 * DAY, THREE + 4 * DAY], THREE + 5 * DAY, missed=False)


def test_after_the_last_run_there_is_none() -> None:
    ending = Timing(when=every(10), start=100, end=120)
    assert planned(ending, 100, 1000) == Plan([120], None, missed=True)
    assert planned(ending, 120, 121) == Plan([120], None, missed=False)
    assert planned(ending, 100, 1000, "skip") == Plan([], None, missed=True)
    assert planned(ending, 100, 1000, "all") == Plan([100, 110, 120], None, missed=False)


def test_the_latest_is_found_however_long_ago_it_was() -> None:
    yearly = Schedule("0 0 1 1 *").timing("UTC")
    first = yearly.after(0)
    assert first is not None
    late = planned(yearly, first, first + 364 * DAY)
    assert late.runs == [first]
    january = Schedule("* * 1 1 *").timing("UTC")  # each minute of one day of the year
    found = planned(january, first, first + 300 * DAY)
    assert found.runs == [first + DAY - 60]


def test_jitter_counts_from_when_the_run_was_to_come() -> None:
    timing = Timing(when=every(1000), jitter=500.0)
    coming = timing.delayed(1000, "name")
    assert coming > 1000
    assert planned(timing, 1000, coming - 0.001) == Plan([], 1000, missed=False)
    assert planned(timing, 1000, coming, grace=0) == Plan([1000], 2000, missed=False)


@pytest.mark.parametrize("seed", range(30))
def test_each_run_is_decided_once_for_any_times_of_planning(seed: int) -> None:
    chance = random.Random(seed)
    timing = Timing(when=every(chance.choice([1, 7, 60])), jitter=chance.choice([0.0, 5.0]))
    due, now = timing.after(1000.0), 1000.0
    sent: list[float] = []
    while now < 3000:
        now += chance.choice([0.1, 3, 100])
        assert due is not None
        runs, due, _ = planned(timing, due, now, "all", most=5)
        sent += runs
    assert due is not None
    assert sent == list(timing.between(1000.0, due))[: len(sent)]
    assert len(sent) == len(list(timing.between(1000.0, due))) - 1
