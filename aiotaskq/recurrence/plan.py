"""Choice of the runs of a schedule to send now: pure functions of the given times."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Literal, NamedTuple, TypeAlias

from aiotaskq.recurrence.timing import Timing

Overlap: TypeAlias = Literal["allow", "skip"]
Misfire: TypeAlias = Literal["skip", "once", "all"]


class Plan(NamedTuple):
    """The decision about the runs that are due.

    Attributes:
        runs: The due times of the runs to send, in order.
        next_due: The due time of the first run after these; None: there is none. It may have
            passed already, if more than `most` runs were due.
        missed: Whether runs are left out because they are too late.
    """

    runs: list[float]
    next_due: float | None
    missed: bool


def plan(
    timing: Timing,
    schedule_id: str,
    due: float,
    now: float,
    *,
    misfire: Misfire,
    grace: float,
    most: int,
) -> Plan:
    """Decide about all runs from `due` on that are due now.

    A run that is at most `grace` seconds late is on time, and is sent. If the first run is later
    than that, no scheduler has run for a while, and `misfire` decides about all runs that are
    due now: ``"skip"`` sends only those that are on time, ``"once"`` only the latest one, and
    ``"all"`` every one.

    Args:
        timing: The times of the schedule.
        schedule_id: Its id, which its jitter depends on.
        due: The due time of the first run that has not been sent.
        now: The Unix time.
        misfire: The rule for runs that are too late.
        grace: Seconds by which a run may be late and still count as on time.
        most: The largest number of runs to send; the rest is left for the next plan.
    """
    coming = timing.delayed(due, schedule_id)
    if coming > now:
        return Plan([], due, missed=False)
    if misfire == "all" or now - coming <= grace:
        runs, next_due = _due_runs(timing, schedule_id, due, now, most)
        return Plan(runs, next_due, missed=False)
    late = timing.jitter + grace
    if misfire == "skip":
        first = timing.after(max(due, now - late))
        if first is None:
            return Plan([], None, missed=True)
        runs, next_due = _due_runs(timing, schedule_id, first, now, most)
        runs = [run for run in runs if now - timing.delayed(run, schedule_id) <= grace]
        return Plan(runs, next_due, missed=True)
    latest = _latest(timing, schedule_id, due, now, late)
    return Plan([latest], timing.after(latest), missed=True)


def _due_runs(
    timing: Timing, schedule_id: str, due: float, now: float, most: int
) -> tuple[list[float], float | None]:
    """Return up to `most` runs from `due` on that are due now, and the due time of the next one."""
    runs: list[float] = []
    for run in _from(timing, due):
        if len(runs) == most or timing.delayed(run, schedule_id) > now:
            return runs, run
        runs.append(run)
    return runs, None


def _from(timing: Timing, due: float) -> Iterator[float]:
    return chain([due], timing.between(due, float("inf")))


def _latest(timing: Timing, schedule_id: str, due: float, now: float, window: float) -> float:
    """Return the due time of the latest run that is due now.

    The search begins with a short time before now, and the time grows until it has a run: there
    may be any number of runs since `due`.
    """
    while now - window > due:
        latest = None
        for run in timing.between(now - window, now):
            if timing.delayed(run, schedule_id) > now:
                break
            latest = run
        if latest is not None:
            return latest
        window *= 4
    runs, _ = _due_runs(timing, schedule_id, due, now, most=2**63)
    return runs[-1]
