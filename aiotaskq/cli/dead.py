"""`aiotaskq dead`: list and show dead letters, run them again or drop them."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, NamedTuple

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import GROUP_SETTINGS, GroupWithDefaultList, choose_app, run_with_app
from aiotaskq.cli.exit_status import NOT_DONE
from aiotaskq.cli.formatting import duration, fact_lines, local_time, task_count
from aiotaskq.cli.output import ask, cell, say, say_json, say_lines, say_table
from aiotaskq.client.dead_letters import DeadTask, Which, moment
from aiotaskq.errors import BatchRefused, ConfigError
from aiotaskq.readable import on_lines

_REASON_LENGTH = 200  # characters of a reason that a list shows
_UNREADABLE_LENGTH = 2000  # bytes of a payload that cannot be read as a message

_Words = Annotated[list[str] | None, typer.Argument(metavar="APP", help="The application.")]
_Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="APP [ID]...", help="The application, and the ids of tasks."),
]
_Queue = Annotated[str | None, typer.Option("--queue", help="Only those of this queue.")]
_Task = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="Only those of this task, or 'billing.*'."),
]
_Reason = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Only those with this in the reason.")
]
_All = Annotated[bool, typer.Option("--all", help="All of them.")]
_Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")]

cli = typer.Typer(
    cls=GroupWithDefaultList,
    help="Look at dead letters, run them again, or drop them.",
    no_args_is_help=False,
    context_settings=GROUP_SETTINGS,
)


@cli.command("list")
def list_dead(
    context: typer.Context,
    words: _Words = None,
    queue: _Queue = None,
    task: _Task = None,
    reason: _Reason = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 100,
    as_json: _Json = False,
) -> None:
    """List dead letters, the newest of each queue first.

    "tries" counts the attempts that ended with an error, "crashes" the workers that died.
    """
    target, words = choose_app(context, words or [])
    if words:
        raise ConfigError(f"no such command: {words[0]!r}; there are list, show, retry and discard")
    which: Which = {"queue": queue, "task": task, "reason": reason}

    async def work(app: TaskQueue) -> tuple[str, Sequence[DeadTask]]:
        # One more than is shown, to know whether there are more.
        return (await app.broker()).url, await app.dead.list(limit=limit + 1, **which)

    url, found = run_with_app(target, work)
    shown = found[:limit]
    if as_json:
        _print_json(shown, payload=False)
    elif not found:
        say(f"no dead letters at {url}{_describe_filters(which)}")
    else:
        say_table(_letters_table(url, shown))
        if len(found) > limit:
            say(f"there are more than these {limit:,}: --limit shows them", err=True)


@cli.command()
def show(
    context: typer.Context, words: _Ids = None, queue: _Queue = None, as_json: _Json = False
) -> None:
    """Show everything about dead letters: arguments, reason, attempts with tracebacks.

    Exit status 1: there is no dead letter of one of these ids.
    """
    target, ids = choose_app(context, words or [])
    if not ids:
        raise ConfigError(f"which task? aiotaskq dead show {target} ID")
    found = run_with_app(target, lambda app: app.dead.list(limit=None, id=ids, queue=queue))
    if as_json:
        _print_json(found, payload=True)
    elif found:
        for number, one in enumerate(found):
            say_lines([*([""] if number else []), *_describe(one)])
    _report_missing(ids, {one.id for one in found})


@cli.command()
def retry(
    context: typer.Context,
    words: _Ids = None,
    queue: _Queue = None,
    task: _Task = None,
    reason: _Reason = None,
    everything: _All = False,
    limit: _Limit = None,
    yes: _Yes = False,
    as_json: _Json = False,
) -> None:
    """Run dead tasks again, under their old ids and from the first attempt on.

    Their stored failures are forgotten. The command asks first if there are several, but not with
    --json.

    Exit status 1: there is no dead letter of one of these ids, or the answer was no.
    """
    target, ids = choose_app(context, words or [])
    which: Which = {"id": ids or None, "queue": queue, "task": task, "reason": reason}
    selection = _select(target, which, everything=everything)
    question = _Question("Run {} again?", "retried", yes=yes, as_json=as_json)
    count, refused = 0, list[Exception]()
    if _confirm(selection, which, limit, question):
        try:
            count = run_with_app(
                target, lambda app: app.dead.retry(everything=everything, limit=limit, **which)
            )
        except BatchRefused as error:
            count, refused = error.answer, list(error.errors.values())
        if not as_json:
            say(f"sent {task_count(count)} back to {'its queue' if count == 1 else 'their queues'}")
    if as_json:
        _print_count("retried", count, set(ids) - set(selection.ids))
    if refused:
        raise ConfigError(
            f"{task_count(len(refused))} can never go back, and stay dead letters: {refused[0]}"
        )
    _report_missing(ids, selection.ids)


@cli.command()
def discard(
    context: typer.Context,
    words: _Ids = None,
    queue: _Queue = None,
    task: _Task = None,
    reason: _Reason = None,
    everything: _All = False,
    limit: _Limit = None,
    yes: _Yes = False,
    as_json: _Json = False,
) -> None:
    """Drop dead letters. It cannot be undone.

    The command asks first if there are several, but not with --json.

    Exit status 1: there is no dead letter of one of these ids, or the answer was no.
    """
    target, ids = choose_app(context, words or [])
    which: Which = {"id": ids or None, "queue": queue, "task": task, "reason": reason}
    selection = _select(target, which, everything=everything)
    question = _Question("Drop {} for good?", "dropped", yes=yes, as_json=as_json)
    count = 0
    if _confirm(selection, which, limit, question):
        count = run_with_app(
            target, lambda app: app.dead.discard(everything=everything, limit=limit, **which)
        )
        if not as_json:
            say(f"dropped {task_count(count)}")
    if as_json:
        _print_count("dropped", count, set(ids) - set(selection.ids))
    _report_missing(ids, selection.ids)


class _Selection(NamedTuple):
    """The dead letters that a command is about to change.

    Attributes:
        url: Where they are.
        total: How many there are.
        ids: Their ids, if the command was given ids; else none.
    """

    url: str
    total: int
    ids: Collection[str]


def _select(target: str, which: Which, *, everything: bool) -> _Selection:
    if everything and any(which.values()):
        raise ConfigError("--all means all dead letters: leave the ids and other options out")
    if not everything and not any(which.values()):
        raise ConfigError("which dead letters? Give their ids, --queue, --task, --reason, or --all")

    async def look(app: TaskQueue) -> _Selection:
        url = (await app.broker()).url
        if not which.get("id"):
            return _Selection(url, await app.dead.count(**which), ())
        letters = await app.dead.list(limit=None, **which)
        return _Selection(url, len(letters), {one.id for one in letters})

    return run_with_app(target, look)


class _Question(NamedTuple):
    """The question before several letters are changed.

    Attributes:
        text: The question, with a place for the number of tasks.
        refused: What was not done, where the answer is no.
        yes: Whether the answer was given with the command.
        as_json: Whether a program reads the output. It is not asked, and told in JSON.
    """

    text: str
    refused: str
    yes: bool
    as_json: bool


def _confirm(selection: _Selection, which: Which, limit: int | None, question: _Question) -> bool:
    """Return whether there is something to do, after asking where it is more than one letter.

    Raises:
        typer.Exit: The answer was no.
    """
    count = selection.total if limit is None else min(selection.total, limit)
    if not count:
        if not which.get("id") and not question.as_json:  # missing ids are told one by one
            say(f"no dead letters at {selection.url}{_describe_filters(which)}")
        return False
    asked = f"{question.text.format(task_count(count))} They are at {selection.url}."
    asks = count > 1 and not (question.yes or question.as_json)
    if asks and not ask(asked):
        say(f"nothing was {question.refused}", err=True)
        raise typer.Exit(NOT_DONE)
    return True


def _report_missing(ids: Sequence[str], found: Collection[str]) -> None:
    """Tell which ids have no dead letter, and exit if there are any."""
    missing = [task_id for task_id in ids if task_id not in found]
    for task_id in missing:
        say(f"no dead letter has the id {task_id}", err=True)
    if missing:
        raise typer.Exit(NOT_DONE)


def _describe_filters(which: Which) -> str:
    given = [f"{name} {value!r}" for name, value in which.items() if value and name != "id"]
    return f" with {', '.join(given)}" if given else ""


# --- output -------------------------------------------------------------------------------------


def _letters_table(url: str, letters: Sequence[DeadTask]) -> Table:
    """Return a table that fits 80 columns, as an id alone takes 36: two lines for each letter."""
    title = f"dead letters at {url}"
    table = Table(title=cell(title), title_justify="left", title_style="", box=SIMPLE_HEAD)
    table.add_column("id\nreason", min_width=36)
    table.add_column("task\nqueue", overflow="fold")
    table.add_column("died", no_wrap=True)
    table.add_column("tries\ncrashes", justify="right", no_wrap=True)
    now = datetime.now(UTC)
    for one in letters:
        reason = textwrap.shorten(one.reason, _REASON_LENGTH, placeholder=" ...")
        table.add_row(
            cell(one.id or "without an id", reason),
            cell(one.task or "cannot be read", one.queue),
            cell(f"{one.died_at.astimezone():%m-%d %H:%M}", f"{duration(one.died_at, now)} ago"),
            cell(str(_attempt_count(one)), str(one.crashes)),
        )
    return table


def _describe(one: DeadTask) -> Iterator[str]:
    """Yield everything that is known of a dead letter, as lines."""
    now = datetime.now(UTC)
    facts = {
        "task": one.task or "cannot be read",
        "queue": one.queue,
        "reason": one.reason,
        "died": f"{local_time(one.died_at)} ({duration(one.died_at, now)} ago)",
        "buried by": one.worker,
        "attempts": str(_attempt_count(one)),
        "crashes": str(one.crashes),
        "last crash": one.crash_note,
        "args": one.args,
        "kwargs": one.kwargs,
        "payload": f"{len(one.payload):,} bytes",
    }
    if not one.args:
        facts["payload"] += f": {one.payload[:_UNREADABLE_LENGTH]!r}"
    yield one.id or "without an id"
    yield from fact_lines(facts)
    for attempt in one.attempts:
        at = local_time(moment(attempt.at))
        yield f"  attempt {attempt.number}, {at}, {attempt.worker}: {attempt.error}"
        yield from on_lines(attempt.traceback.rstrip(), indent="    ").split("\n")


def _attempt_count(one: DeadTask) -> int:
    return one.attempts[-1].number if one.attempts else 0  # a retry begins at 1 again


def _print_json(letters: Sequence[DeadTask], *, payload: bool) -> None:
    shown = []
    for one in letters:
        fields = {**msgspec.structs.asdict(one), "args": one.args, "kwargs": one.kwargs}
        if not payload:
            del fields["payload"]
        shown.append(fields)
    # Base64 for the payload, which need not be text.
    say_json(shown)


def _print_count(what: str, count: int, missing: Collection[str]) -> None:
    say_json({what: count, "missing": sorted(missing)})
