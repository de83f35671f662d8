"""Schedules in the form in which `aiotaskq schedule` prints them: as a table, and one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from aiotaskq.cli.formatting import duration, fact_lines, local_time
from aiotaskq.cli.output import cell, json_or_repr
from aiotaskq.readable import on_one_line
from aiotaskq.scheduling.schedules import ScheduleInfo

_MOST_NAMED = 5  # schedules that a note names
_FAR = timedelta(days=300)  # a date as far away as this needs its year, or it could be misread
_LATE = timedelta(seconds=60)  # a scheduler that runs would have sent the run by then


class ScheduleListing(NamedTuple):
    """Schedules as they were read from a store.

    Attributes:
        url: The store.
        now: When they were read, by the clock of the store.
        schedules: The schedules.
        not_stored: Ids of schedules that stand in the code and are not among them.
    """

    url: str
    now: datetime
    schedules: Sequence[ScheduleInfo]
    not_stored: Collection[str]


def schedule_table(listing: ScheduleListing) -> Table:
    """Return a table that fits in 80 columns, with two lines for each schedule."""
    title = f"schedules at {listing.url}"
    shown = Table(title=cell(title), title_justify="left", title_style="", box=SIMPLE_HEAD)
    shown.add_column("id\ntask", overflow="fold")
    shown.add_column("when", overflow="fold")
    shown.add_column("next run\nlast run", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    for one in listing.schedules:
        shown.add_row(
            cell(one.id, one.task),
            cell(one.when),
            cell(_short_time(one.next_at, listing.now), _short_time(one.last_at, listing.now)),
            cell("in code" if one.in_code else "run time", _halt(one)),
        )
    return shown


def _short_time(at: datetime | None, now: datetime) -> str:
    if at is None:
        return "none"
    form = "%Y-%m-%d" if abs(at - now) > _FAR else "%m-%d %H:%M"
    return f"{at.astimezone():{form}}, {_distance(at, now)}"


def _distance(at: datetime, now: datetime) -> str:
    return f"in {duration(now, at)}" if at >= now else f"{duration(at, now)} ago"


def next_run(one: ScheduleInfo, now: datetime) -> str:
    """Return a text on the next run of a schedule that was just changed."""
    if one.next_at is None:
        return "no run is left" if not one.paused else "it is paused"
    return f"next run {_exact_time(one.next_at, now)}"


def _halt(one: ScheduleInfo) -> str:
    if one.paused:
        return "paused"
    return "" if one.next_at is not None else "ended"


def listing_notes(target: str, listing: ScheduleListing) -> Iterator[str]:
    """Yield the notes below a list: schedules that no scheduler seems to serve."""
    if listing.not_stored:
        yield (
            f"not in the store yet, but in the code: {_names(sorted(listing.not_stored))}; start"
            f" `aiotaskq scheduler {target}`, or a worker with -B"
        )
    late = [
        one.id for one in listing.schedules if one.next_at and one.next_at < listing.now - _LATE
    ]
    if late:
        yield (
            f"not sent in time: {_names(late)}; if no scheduler runs, start `aiotaskq scheduler"
            f" {target}`, or a worker with -B"
        )


def _names(ids: Sequence[str]) -> str:
    named = ", ".join(map(on_one_line, ids[:_MOST_NAMED]))
    return named if len(ids) <= _MOST_NAMED else f"{named} and {len(ids) - _MOST_NAMED:,} more"


def describe_schedule(one: ScheduleInfo, now: datetime) -> Iterator[str]:
    """Yield everything that is known of a schedule, as lines."""
    state = ("stands in the code" if one.in_code else "made at run time", _halt(one))
    facts: dict[str, str | None] = {
        "task": one.task,
        "when": one.when,
        "state": ", ".join(filter(None, state)),
        "next run": "none" if one.next_at is None else _exact_time(one.next_at, now),
        "last run": "none" if one.last_at is None else _exact_time(one.last_at, now),
        "last task": one.last_id,
        "runs": f"{one.runs:,} sent, {one.skipped:,} left out",
        "args": json_or_repr(one.args) if one.args else "",
        "kwargs": json_or_repr(one.kwargs) if one.kwargs else "",
        "options": json_or_repr(one.options) if one.options else "",
        "overlap": one.overlap,
        "misfire": f"{one.misfire}, after {one.grace:g} s",
        "jitter": f"up to {one.jitter:g} s" if one.jitter else "",
        "start": "" if one.start is None else _exact_time(one.start, now),
        "end": "" if one.end is None else _exact_time(one.end, now),
    }
    yield one.id
    yield from fact_lines(facts)


def _exact_time(at: datetime, now: datetime) -> str:
    return f"{local_time(at)} ({_distance(at, now)})"
