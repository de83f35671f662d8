"""`aiotaskq schedule`: list, show, add, pause, resume, run and remove schedules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.call import Keywords, Priority, Queue, read_argument, read_keywords
from aiotaskq.cli.common import GROUP_SETTINGS, GroupWithDefaultList, choose_app, run_with_app
from aiotaskq.cli.exit_status import NOT_DONE
from aiotaskq.cli.formatting import local_time
from aiotaskq.cli.output import json_data, say, say_json, say_lines, say_table
from aiotaskq.cli.result import Timeout, Wait, check_keeps_results, print_result, wait_for
from aiotaskq.cli.schedule_table import (
    ScheduleListing,
    describe_schedule,
    listing_notes,
    next_run,
    schedule_table,
)
from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import At, Schedule, as_when
from aiotaskq.scheduling.schedules import ScheduleInfo
from aiotaskq.tasks.result import TaskResult

_COMMANDS = "list, show, add, remove, pause, resume and run"

_Words = Annotated[list[str] | None, typer.Argument(metavar="APP", help="The application.")]
_Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="APP [ID]...", help="The application, and the ids of schedules."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

cli = typer.Typer(
    cls=GroupWithDefaultList,
    help="Look at the schedules, make some, pause, remove or run them.",
    no_args_is_help=False,
    context_settings=GROUP_SETTINGS,
)


@cli.command("list")
def list_schedules(context: typer.Context, words: _Words = None, as_json: _Json = False) -> None:
    """List the schedules: when each runs, the next run and the last.

    Times are in the time zone of this machine; a crontab goes by its own.
    """
    target, words = choose_app(context, words or [])
    if words:
        raise ConfigError(f"no such command: {words[0]!r}; there are {_COMMANDS}")
    listing = run_with_app(target, lambda app: _read(app, None))
    if as_json:
        _print_json(listing.schedules)
        return
    if listing.schedules:
        say_table(schedule_table(listing))
    else:
        say(f"no schedules at {listing.url}")
    for note in listing_notes(target, listing):
        say(note, err=True)


@cli.command("show")
def show_schedules(context: typer.Context, words: _Ids = None, as_json: _Json = False) -> None:
    """Show everything about schedules: arguments, options, runs so far.

    Exit status 1: there is no schedule of one of these ids.
    """
    target, ids = _choose_schedules(context, words, "show")
    listing = run_with_app(target, lambda app: _read(app, ids))
    if as_json:
        _print_json(listing.schedules)
    elif listing.schedules:
        for number, one in enumerate(listing.schedules):
            say_lines([*([""] if number else []), *describe_schedule(one, listing.now)])
    there = {one.id for one in listing.schedules}
    _report_missing([one for one in ids if one not in there], listing.not_stored)


@cli.command()
def add(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="APP ID TASK [ARGUMENT]...",
            help="The application, an id for the schedule, the name of the task, and its"
            " arguments: each is JSON, or else text. Put -- before a negative number.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option("--every", metavar="SECONDS", help="Run every so many seconds."),
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
            help="The time zone, such as Europe/Oslo; else that of the application.",
        ),
    ] = None,
    jitter: Annotated[
        float | None,
        typer.Option(
            "--jitter", metavar="SECONDS", help="Delay each run by a random time up to this."
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--start", metavar="TIME", help="No run is due before this time.")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--end", metavar="TIME", help="No run is due after this time.")
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
            "--misfire",
            help="For runs that are too late: once (the default) sends one of them, skip sends"
            " none, all sends all.",
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option("--grace", metavar="SECONDS", help="A run is too late after this. [60]"),
    ] = None,
    queue: Queue = None,
    priority: Priority = None,
    expires: Annotated[
        float | None,
        typer.Option(
            "--expires",
            metavar="SECONDS",
            help="Seconds after which a run that was sent no longer starts.",
        ),
    ] = None,
    keywords: Keywords = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the schedule of this id, if there is one.")
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
        "start": _read_time("--start", start),
        "end": _read_time("--end", end),
        "overlap": overlap,
        "misfire": misfire,
        "grace": grace,
    }
    options = {"queue": queue, "priority": priority, "expires": expires}
    schedule = Schedule(
        _read_when(every, cron, at),
        args=[read_argument(text) for text in texts],
        kwargs=read_keywords(keywords or []),
        options=_without_none(options),
        **_without_none(bounds),
    )

    async def work(app: TaskQueue) -> tuple[ScheduleInfo, datetime, bool]:
        now = await _store_time(app)
        await _check_new(app, schedule_id, schedule, now, replace=replace)
        try:
            added = await app.schedules.add(schedule_id, name, schedule, replace=replace)
        except TypeError as error:  # the task is registered here and the arguments do not fit it
            raise ConfigError(str(error)) from error
        return added, now, name in app.tasks

    added, now, known = run_with_app(target, work)
    if not known:
        say(f"{name} is not registered in {target}; added all the same", err=True)
    say(f"added {added.id}: {next_run(added, now)}")


@cli.command()
def remove(context: typer.Context, words: _Ids = None) -> None:
    """Remove schedules. Runs that were sent stay sent.

    A schedule that stands in the code comes back with the next start of a scheduler.

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

    _change_each(context, words, "remove", drop)


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

    _change_each(context, words, "pause", stop)


@cli.command()
def resume(context: typer.Context, words: _Ids = None) -> None:
    """Send runs of paused schedules again; those that were due meanwhile stay left out.

    Exit status 1: there is no schedule of one of these ids.
    """

    async def start(app: TaskQueue, schedule_id: str) -> str | None:
        if await app.schedules.get(schedule_id) is None:
            return None
        resumed = await app.schedules.resume(schedule_id)
        return f"resumed {schedule_id}: {next_run(resumed, await _store_time(app))}"

    _change_each(context, words, "resume", start)


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
    """Send one run of a schedule now; print the id of its task, or the result.

    The other runs of the schedule stay as they are, paused or not.

    Exit status 1: there is no such schedule, or the task failed. 3: no result in time.
    """
    target, ids = _choose_schedules(context, words, "run")
    if len(ids) > 1:
        raise ConfigError(f"one schedule at a time: aiotaskq schedule run {target} {ids[0]}")
    waits = wait or timeout is not None

    async def work(app: TaskQueue) -> TaskResult[Any] | str:
        if waits:
            check_keeps_results(app, target)
        if await app.schedules.get(ids[0]) is None:
            _report_missing(ids, app.declared_schedules())
        handle = await app.schedules.run_now(ids[0])
        return await wait_for(handle, timeout) if waits else handle.id

    print_result(run_with_app(target, work))


# --- the application ----------------------------------------------------------------------------


async def _read(app: TaskQueue, ids: Iterable[str] | None) -> ScheduleListing:
    """Return some schedules, or all of them, and the ids of others that stand in the code."""
    url, now = (app.schedule_broker() or app.drivers()[0]).url, await _store_time(app)
    if ids is None:
        found = await app.schedules.list()
    else:
        asked = [await app.schedules.get(one) for one in dict.fromkeys(ids)]
        found = [one for one in asked if one is not None]
    there = {one.id for one in found}
    return ScheduleListing(
        url, now, found, [one for one in app.declared_schedules() if one not in there]
    )


async def _store_time(app: TaskQueue) -> datetime:
    """Return the time by the clock of the store, which decides when schedules run."""
    return datetime.fromtimestamp((await (await app.schedule_store()).due(1)).now, UTC)


async def _check_new(
    app: TaskQueue, schedule_id: str, schedule: Schedule, now: datetime, *, replace: bool
) -> None:
    """Refuse a schedule that cannot be added, in the words of the command line.

    `app.schedules.add` itself refuses the id of a schedule that stands in the code.
    """
    there = await app.schedules.get(schedule_id)
    if there is not None and not there.in_code and not replace:
        raise ConfigError(
            f"there is a schedule {schedule_id!r} already: choose another id, or give --replace"
        )
    timing = schedule.timing(app.conf.timezone)
    if timing.after(now.timestamp()) is None:
        raise ConfigError(
            f"{timing.describe()}: no run would ever come, as its time has passed; it is"
            f" {local_time(now)}"
        )


def _change_each(
    context: typer.Context,
    words: list[str] | None,
    verb: str,
    change: Callable[[TaskQueue, str], Awaitable[str | None]],
) -> None:
    """Change schedules one by one, and print each change.

    Args:
        context: As the command got it.
        words: As the command got them: an application and ids.
        verb: The command.
        change: Changes the schedule of an id and returns a line to print; None if there is none.
    """
    target, ids = _choose_schedules(context, words, verb)

    async def work(app: TaskQueue) -> None:
        missing = []
        for schedule_id in ids:
            done = await change(app, schedule_id)
            if done is None:
                missing.append(schedule_id)
            else:
                say(done)
        _report_missing(missing, app.declared_schedules())

    run_with_app(target, work)


# --- arguments and messages ---------------------------------------------------------------------


def _choose_schedules(
    context: typer.Context, words: list[str] | None, verb: str
) -> tuple[str, list[str]]:
    """Return the name of the application and the ids, each once."""
    target, ids = choose_app(context, words or [])
    if not ids:
        raise ConfigError(f"which schedule? aiotaskq schedule {verb} {target} ID")
    return target, list(dict.fromkeys(ids))


def _read_when(every: float | None, cron: str | None, at: str | None) -> object:
    given = [one for one in (every, cron, at) if one is not None]
    if len(given) != 1:
        raise ConfigError(
            f"when? Give {'only ' if given else ''}one of --every SECONDS, --cron TEXT and"
            " --at TIME"
        )
    return At(at) if at is not None else as_when(given[0])


def _read_time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} is {text!r}; it must be a time such as 2026-11-21T10:00"
        ) from error


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _report_missing(ids: Sequence[str], declared: Collection[str]) -> None:
    """Tell which ids have no schedule, and exit if there are any."""
    for schedule_id in ids:
        yet = (
            " yet: it stands in the code, and a scheduler that starts puts it into the store"
            if schedule_id in declared
            else ""
        )
        say(f"no schedule has the id {schedule_id}{yet}", err=True)
    if ids:
        raise typer.Exit(NOT_DONE)


def _print_json(schedules: Sequence[ScheduleInfo]) -> None:
    shown = []
    for one in schedules:
        fields = msgspec.structs.asdict(one)
        fields["args"] = [json_data(value) for value in one.args]
        for named in ("kwargs", "options"):
            fields[named] = {name: json_data(value) for name, value in fields[named].items()}
        shown.append(fields)
    say_json(shown)
