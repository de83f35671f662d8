"""Which runs of a schedule are to be sent now. Pure: it follows from the times given."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Literal, NamedTuple, TypeAlias

from aiotaskq.recurrence.timing import Timing

Overlap: TypeAlias = Literal["allow", "skip"]
Misfire: TypeAlias = Literal["skip", "once", "all"]


class Plan(NamedTuple):
    """What becomes of the runs that are due.

    Attributes:
        runs: The due times of those to be sent, in order.
        next_due: The due time of the first that is not decided here; None: there is none. It may
            have come already, where there were more than `most`.
        missed: Whether some are left out as they come too late.
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
    """Decide on the runs from `due` on whose time has come.

    A run that is at most `grace` seconds late is on time, and is sent. Where one is later, nobody
    sent for a while, and `misfire` tells what becomes of all that are due now: ``"skip"`` sends
    those only that are on time, ``"once"`` the latest only, and ``"all"`` each.

    Args:
        timing: When the schedule runs.
        schedule_id: Its id, on which its jitter depends.
        due: The due time of the first run that has not been sent.
        now: Unix time.
        misfire: What becomes of runs that come too late.
        grace: Seconds.
        most: The most runs to send; the rest is left for the next plan.
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
    """Return up to `most` runs from `due` on whose time has come, and the due time of the next."""
    runs: list[float] = []
    for run in _from(timing, due):
        if len(runs) == most or timing.delayed(run, schedule_id) > now:
            return runs, run
        runs.append(run)
    return runs, None


def _from(timing: Timing, due: float) -> Iterator[float]:
    return chain([due], timing.between(due, float("inf")))


def _latest(timing: Timing, schedule_id: str, due: float, now: float, window: float) -> float:
    """Return the due time of the last run whose time has come.

    It is looked for in a stretch before now that grows until there is one, since there may have
    been any number since `due`.
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
