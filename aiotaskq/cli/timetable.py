"""How schedules are shown: as a table, and one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from aiotaskq.cli.common import show
from aiotaskq.cli.texts import between, indented, moment, plain
from aiotaskq.scheduling.schedules import ScheduleInfo

_NAMED = 5  # schedules that a note names
_FAR = timedelta(days=300)  # from so far on a date without its year could be misread
_LATE = timedelta(seconds=60)  # a scheduler that runs sends sooner


class Found(NamedTuple):
    """What is known of some schedules, at a moment by the store's clock."""

    url: str
    now: datetime
    schedules: Sequence[ScheduleInfo]
    missing: Collection[str]  # ids that stand in the code and are not among them


def table(found: Found) -> Table:
    """Return a table that fits 80 columns: two lines for each schedule."""
    title = f"schedules at {found.url}"
    shown = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD)
    shown.add_column("id\ntask", overflow="fold")
    shown.add_column("when", overflow="fold")
    shown.add_column("next run\nlast run", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    for one in found.schedules:
        cells = (
            f"{one.id}\n{one.task}",
            one.when,
            f"{_short(one.next_at, found.now)}\n{_short(one.last_at, found.now)}",
            f"{'in code' if one.in_code else 'run time'}\n{_halted(one)}",
        )
        # Text, as an id may have brackets, which would be taken for markup.
        shown.add_row(*(Text(plain(cell)) for cell in cells))
    return shown


def _short(at: datetime | None, now: datetime) -> str:
    if at is None:
        return "none"
    form = "%Y-%m-%d" if abs(at - now) > _FAR else "%m-%d %H:%M"
    return f"{at.astimezone():{form}}, {_distance(at, now)}"


def _distance(at: datetime, now: datetime) -> str:
    return f"in {between(now, at)}" if at >= now else f"{between(at, now)} ago"


def next_run(one: ScheduleInfo, now: datetime) -> str:
    """Return what is said of the next run of a schedule that was just changed."""
    if one.next_at is None:
        return "no run is left" if not one.paused else "it is paused"
    return f"next run {_exact(one.next_at, now)}"


def _halted(one: ScheduleInfo) -> str:
    if one.paused:
        return "paused"
    return "" if one.next_at is not None else "ended"


def notes(target: str, found: Found) -> Iterator[str]:
    """Return what else is to be said below a list."""
    if found.missing:
        yield (
            f"not in the store yet, but in the code: {_names(sorted(found.missing))}; start"
            f" `aiotaskq scheduler {target}`, or a worker with -B"
        )
    late = [one.id for one in found.schedules if one.next_at and one.next_at < found.now - _LATE]
    if late:
        yield (
            f"not sent in time: {_names(late)}; if no scheduler runs, start `aiotaskq scheduler"
            f" {target}`, or a worker with -B"
        )


def _names(ids: Sequence[str]) -> str:
    named = ", ".join(map(plain, ids[:_NAMED]))
    return named if len(ids) <= _NAMED else f"{named} and {len(ids) - _NAMED:,} more"


def described(one: ScheduleInfo, now: datetime) -> str:
    """Return all that is known of a schedule, as lines."""
    state = ("stands in the code" if one.in_code else "made at run time", _halted(one))
    facts = {
        "task": one.task,
        "when": one.when,
        "state": ", ".join(filter(None, state)),
        "next run": "none" if one.next_at is None else _exact(one.next_at, now),
        "last run": "none" if one.last_at is None else _exact(one.last_at, now),
        "last task": one.last_id,
        "runs": f"{one.runs:,} sent, {one.skipped:,} left out",
        "args": show(one.args) if one.args else "",
        "kwargs": show(one.kwargs) if one.kwargs else "",
        "options": show(one.options) if one.options else "",
        "overlap": one.overlap,
        "misfire": f"{one.misfire}, after {one.grace:g} s",
        "jitter": f"up to {one.jitter:g} s" if one.jitter else "",
        "start": "" if one.start is None else _exact(one.start, now),
        "end": "" if one.end is None else _exact(one.end, now),
    }
    lines = [f"  {name:<10} {indented(value, 13)}" for name, value in facts.items() if value]
    return plain("\n".join([one.id, *lines]))


def _exact(at: datetime, now: datetime) -> str:
    return f"{moment(at)} ({_distance(at, now)})"
