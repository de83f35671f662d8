"""`aiotaskq schedule`: what runs by the clock, looked at, made, paused and removed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import DefaultToList, choose_app, in_app
from aiotaskq.cli.tasks import (
    Keywords,
    Priority,
    Queue,
    Timeout,
    Wait,
    check_results,
    keywords_of,
    report,
    value_of,
    wait_for,
)
from aiotaskq.cli.texts import moment
from aiotaskq.cli.timetable import Found, described, next_run, notes, table
from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import At, Schedule, as_when
from aiotaskq.scheduling.schedules import ScheduleInfo
from aiotaskq.tasks.result import TaskResult

NOT_DONE = 1

_COMMANDS = "list, show, add, remove, pause, resume and run"

_Words = Annotated[list[str] | None, typer.Argument(metavar="APP", help="The application.")]
_Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="APP [ID]...", help="The application, and the ids of schedules."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

cli = typer.Typer(
    cls=DefaultToList,
    help="Look at the schedules, make some, pause, remove or run them.",
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cli.command("list")
def list_schedules(context: typer.Context, words: _Words = None, as_json: _Json = False) -> None:
    """List the schedules: when each runs, the next run and the last.

    Times are those of this machine's clock on the wall; a crontab goes by its own time zone.
    """
    target, words = choose_app(context, words or [])
    if words:
        raise ConfigError(f"no such command: {words[0]!r}; there are {_COMMANDS}")
    found = in_app(target, lambda app: _look(app, None))
    if as_json:
        _print_json(found.schedules)
        return
    if found.schedules:
        Console().print(table(found))
    else:
        typer.echo(f"no schedules at {found.url}")
    for note in notes(target, found):
        typer.echo(note, err=True)


@cli.command("show")
def show_schedules(context: typer.Context, words: _Ids = None, as_json: _Json = False) -> None:
    """Show all that is known of schedules: arguments, options, runs so far.

    Exit status 1: there is no schedule of one of these ids.
    """
    target, ids = _chosen(context, words, "show")
    found = in_app(target, lambda app: _look(app, ids))
    if as_json:
        _print_json(found.schedules)
    elif found.schedules:
        typer.echo("\n\n".join(described(one, found.now) for one in found.schedules))
    there = {one.id for one in found.schedules}
    _miss([one for one in ids if one not in there], found.missing)


@cli.command()
def add(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="APP ID TASK [ARGUMENT]...",
            help="The application, an id of your own, the task's name, and its arguments: each"
            " JSON, or else text. Put -- before a negative number.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        float | None, typer.Option("--every", metavar="SECONDS", help="Run each so many seconds.")
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option("--cron", metavar="TEXT", help="Run by a crontab: '0 3 * * *', or @daily."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Run once: 2026-11-21T10:00")
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(
            "--timezone",
            metavar="NAME",
            help="By whose clock, as Europe/Oslo; else that of the application.",
        ),
    ] = None,
    jitter: Annotated[
        float | None,
        typer.Option("--jitter", metavar="SECONDS", help="Come up to so much later, evenly."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--start", metavar="TIME", help="No run is due before.")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--end", metavar="TIME", help="No run is due after.")
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(
            "--overlap", help="allow (the default), or skip while the last run has not ended."
        ),
    ] = None,
    misfire: Annotated[
        str | None,
        typer.Option(
            "--misfire", help="Of runs that come too late send once (the default), skip or all."
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option("--grace", metavar="SECONDS", help="What is too late. [60]"),
    ] = None,
    queue: Queue = None,
    priority: Priority = None,
    expires: Annotated[
        float | None,
        typer.Option(
            "--expires", metavar="SECONDS", help="A run no longer starts so long after it was sent."
        ),
    ] = None,
    keywords: Keywords = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in place of one of this id.")
    ] = False,
) -> None:
    """Make a schedule.

    [bold]aiotaskq schedule add tasks:app nightly tasks.report all --cron '0 3 * * *'[/bold]
    """
    target, words = choose_app(context, words or [])
    if len(words) < 2:
        raise ConfigError(
            f"which task, and under which id? aiotaskq schedule add {target} ID TASK --every 30"
        )
    schedule_id, name, *texts = words
    bounds = {
        "timezone": timezone,
        "jitter": jitter,
        "start": _time("--start", start),
        "end": _time("--end", end),
        "overlap": overlap,
        "misfire": misfire,
        "grace": grace,
    }
    options = {"queue": queue, "priority": priority, "expires": expires}
    schedule = Schedule(
        _when(every, cron, at),
        args=[value_of(text) for text in texts],
        kwargs=keywords_of(keywords or []),
        options=_given(options),
        **_given(bounds),
    )

    async def work(app: TaskQueue) -> tuple[ScheduleInfo, datetime, bool]:
        now = await _now(app)
        await _check_new(app, schedule_id, schedule, now, replace=replace)
        try:
            added = await app.schedules.add(schedule_id, name, schedule, replace=replace)
        except TypeError as error:  # the task is registered here and the arguments do not fit it
            raise ConfigError(str(error)) from error
        return added, now, name in app.tasks

    added, now, known = in_app(target, work)
    if not known:
        typer.echo(f"{name} is not registered in {target}; added all the same", err=True)
    typer.echo(f"added {added.id}: {next_run(added, now)}")


@cli.command()
def remove(context: typer.Context, words: _Ids = None) -> None:
    """Remove schedules. What they have sent stays sent.

    One that stands in the code comes back with the next start of a scheduler.

    Exit status 1: there is no schedule of one of these ids.
    """

    async def drop(app: TaskQueue, schedule_id: str) -> str | None:
        if not await app.schedules.remove(schedule_id):
            return None
        if schedule_id in app.declared_schedules():
            return (
                f"removed {schedule_id}; it stands in the code, so the next start of a scheduler"
                " brings it back: pause it instead, or take it out of the code"
            )
        return f"removed {schedule_id}"

    _to_each(context, words, "remove", drop)


@cli.command()
def pause(context: typer.Context, words: _Ids = None) -> None:
    """Send no more runs of schedules until they are resumed.

    Exit status 1: there is no schedule of one of these ids.
    """

    async def stop(app: TaskQueue, schedule_id: str) -> str | None:
        if await app.schedules.get(schedule_id) is None:
            return None
        await app.schedules.pause(schedule_id)
        return f"paused {schedule_id}"

    _to_each(context, words, "pause", stop)


@cli.command()
def resume(context: typer.Context, words: _Ids = None) -> None:
    """Send runs of paused schedules again; those that came meanwhile stay left out.

    Exit status 1: there is no schedule of one of these ids.
    """

    async def start(app: TaskQueue, schedule_id: str) -> str | None:
        if await app.schedules.get(schedule_id) is None:
            return None
        resumed = await app.schedules.resume(schedule_id)
        return f"resumed {schedule_id}: {next_run(resumed, await _now(app))}"

    _to_each(context, words, "resume", start)


@cli.command()
def run(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP ID", help="The application, and the id of the schedule."),
    ] = None,
    wait: Wait = False,
    timeout: Timeout = None,
) -> None:
    """Send what a schedule sends, once and now; print the task's id or its result.

    Its own runs stay as they are, paused or not.

    Exit status 1: there is no such schedule, or the task failed. 3: no result in time.
    """
    target, ids = _chosen(context, words, "run")
    if len(ids) > 1:
        raise ConfigError(f"one schedule at a time: aiotaskq schedule run {target} {ids[0]}")
    waits = wait or timeout is not None

    async def work(app: TaskQueue) -> TaskResult[Any] | str:
        if waits:
            check_results(app, target)
        if await app.schedules.get(ids[0]) is None:
            _miss(ids, app.declared_schedules())
        handle = await app.schedules.run_now(ids[0])
        return await wait_for(handle, timeout) if waits else handle.id

    report(in_app(target, work))


# What is asked of the application


async def _look(app: TaskQueue, ids: Iterable[str] | None) -> Found:
    """Return some schedules, or all of them, and what else stands in the code."""
    url, now = (await app.broker()).url, await _now(app)
    if ids is None:
        found = await app.schedules.list()
    else:
        asked = [await app.schedules.get(one) for one in dict.fromkeys(ids)]
        found = [one for one in asked if one is not None]
    there = {one.id for one in found}
    return Found(url, now, found, [one for one in app.declared_schedules() if one not in there])


async def _now(app: TaskQueue) -> datetime:
    """Return the time by the store's clock, by which schedules go."""
    return datetime.fromtimestamp((await (await app.broker()).schedules().due(1)).now, UTC)


async def _check_new(
    app: TaskQueue, schedule_id: str, schedule: Schedule, now: datetime, *, replace: bool
) -> None:
    """Refuse in the words of the shell; one that stands in the code `add` itself refuses."""
    there = await app.schedules.get(schedule_id)
    if there is not None and not there.in_code and not replace:
        raise ConfigError(
            f"there is a schedule {schedule_id!r} already: choose another id, or give --replace"
        )
    timing = schedule.timing(app.conf.timezone)
    if timing.after(now.timestamp()) is None:
        raise ConfigError(
            f"{timing.describe()}: no run would ever come, as its time has passed; it is"
            f" {moment(now)}"
        )


def _to_each(
    context: typer.Context,
    words: list[str] | None,
    verb: str,
    change: Callable[[TaskQueue, str], Awaitable[str | None]],
) -> None:
    """Do something to schedules, and say of each what was done; None: there is none."""
    target, ids = _chosen(context, words, verb)

    async def work(app: TaskQueue) -> None:
        missing = []
        for schedule_id in ids:
            done = await change(app, schedule_id)
            if done is None:
                missing.append(schedule_id)
            else:
                typer.echo(done)
        _miss(missing, app.declared_schedules())

    in_app(target, work)


# What was typed


def _chosen(context: typer.Context, words: list[str] | None, verb: str) -> tuple[str, list[str]]:
    """Return the application and the ids that are meant."""
    target, ids = choose_app(context, words or [])
    if not ids:
        raise ConfigError(f"which schedule? aiotaskq schedule {verb} {target} ID")
    return target, list(dict.fromkeys(ids))


def _when(every: float | None, cron: str | None, at: str | None) -> object:
    given = [one for one in (every, cron, at) if one is not None]
    if len(given) != 1:
        raise ConfigError(
            f"when? Give {'only ' if given else ''}one of --every SECONDS, --cron TEXT and"
            " --at TIME"
        )
    return At(at) if at is not None else as_when(given[0])


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} is {text!r}; it must be a time such as 2026-11-21T10:00"
        ) from error


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _miss(ids: Sequence[str], declared: Collection[str]) -> None:
    """Tell of ids of which there is no schedule, and exit if there are any."""
    for schedule_id in ids:
        yet = (
            " yet: it stands in the code, and a scheduler that starts puts it into the store"
            if schedule_id in declared
            else ""
        )
        typer.echo(f"no schedule has the id {schedule_id}{yet}", err=True)
    if ids:
        raise typer.Exit(NOT_DONE)


def _print_json(schedules: Sequence[ScheduleInfo]) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(schedules), indent=2).decode())
