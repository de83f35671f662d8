"""`aiotaskq dead`: what could not end well, sent back or dropped."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, NamedTuple

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import DefaultToList, choose_app, in_app
from aiotaskq.cli.texts import between, indented, moment, plain
from aiotaskq.client.dead_letters import DeadTask, Which
from aiotaskq.errors import ConfigError

NOT_DONE = 1

_REASON = 200  # characters that are shown of a reason in a list
_UNREADABLE = 2000  # bytes that are shown of what is no message

_Words = Annotated[list[str] | None, typer.Argument(metavar="APP", help="The application.")]
_Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="APP [ID]...", help="The application, and the ids of tasks."),
]
_Queue = Annotated[str | None, typer.Option("--queue", help="Only of this queue.")]
_Task = Annotated[
    str | None, typer.Option("--task", metavar="NAME", help="Only of this task, or 'billing.*'.")
]
_Reason = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Only with this in the reason.")
]
_All = Annotated[bool, typer.Option("--all", help="All of them.")]
_Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")]

cli = typer.Typer(
    cls=DefaultToList,
    help="Look at dead letters, run them again, or drop them.",
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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

    "tries" are the attempts that ended with an error; "crashes" the workers that died.
    """
    target, words = choose_app(context, words or [])
    if words:
        raise ConfigError(f"no such command: {words[0]!r}; there are list, show, retry and discard")
    which: Which = {"queue": queue, "task": task, "reason": reason}

    async def work(app: TaskQueue) -> tuple[str, Sequence[DeadTask]]:
        # One more than is shown, to know whether there are more.
        return (await app.broker()).url, await app.dead.list(limit=limit + 1, **which)

    url, found = in_app(target, work)
    shown = found[:limit]
    if as_json:
        _print_json(shown, payload=False)
    elif not found:
        typer.echo(f"no dead letters at {url}{_among(which)}")
    else:
        Console().print(_table(url, shown))
        if len(found) > limit:
            typer.echo(f"there are more than these {limit:,}: --limit shows them", err=True)


@cli.command()
def show(
    context: typer.Context, words: _Ids = None, queue: _Queue = None, as_json: _Json = False
) -> None:
    """Show all that is known of dead letters: arguments, reason, attempts with tracebacks.

    Exit status 1: there is no dead letter of one of these ids.
    """
    target, ids = choose_app(context, words or [])
    if not ids:
        raise ConfigError(f"which task? aiotaskq dead show {target} ID")
    found = in_app(target, lambda app: app.dead.list(limit=None, id=ids, queue=queue))
    if as_json:
        _print_json(found, payload=True)
    elif found:
        typer.echo("\n\n".join(_described(one) for one in found))
    _miss(ids, {one.id for one in found})


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
) -> None:
    """Run dead tasks again, under their old ids and from the first attempt on.

    Their stored failures are forgotten. It asks first where there are several.

    Exit status 1: there is no dead letter of one of these ids, or the answer was no.
    """
    target, ids = choose_app(context, words or [])
    which: Which = {"id": ids or None, "queue": queue, "task": task, "reason": reason}
    found = _meant(target, which, everything=everything)
    if _agreed(found, which, limit, yes=yes, question="Run {} again?", refused="retried"):
        count = in_app(
            target, lambda app: app.dead.retry(everything=everything, limit=limit, **which)
        )
        typer.echo(f"sent {_tasks(count)} back to {'its queue' if count == 1 else 'their queues'}")
    _miss(ids, found.ids)


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
) -> None:
    """Drop dead letters. It cannot be undone, and asks first where there are several.

    Exit status 1: there is no dead letter of one of these ids, or the answer was no.
    """
    target, ids = choose_app(context, words or [])
    which: Which = {"id": ids or None, "queue": queue, "task": task, "reason": reason}
    found = _meant(target, which, everything=everything)
    if _agreed(found, which, limit, yes=yes, question="Drop {} for good?", refused="dropped"):
        count = in_app(
            target, lambda app: app.dead.discard(everything=everything, limit=limit, **which)
        )
        typer.echo(f"dropped {_tasks(count)}")
    _miss(ids, found.ids)


class _Found(NamedTuple):
    """What a command is about, before it does anything."""

    url: str
    many: int
    ids: Collection[str]  # only where ids were asked for


def _meant(target: str, which: Which, *, everything: bool) -> _Found:
    if everything and any(which.values()):
        raise ConfigError("--all means all dead letters: leave the ids and other options out")
    if not everything and not any(which.values()):
        raise ConfigError("which dead letters? Give their ids, --queue, --task, --reason, or --all")

    async def look(app: TaskQueue) -> _Found:
        url = (await app.broker()).url
        if not which.get("id"):
            return _Found(url, await app.dead.count(**which), ())
        letters = await app.dead.list(limit=None, **which)
        return _Found(url, len(letters), {one.id for one in letters})

    return in_app(target, look)


def _agreed(
    found: _Found, which: Which, limit: int | None, *, yes: bool, question: str, refused: str
) -> bool:
    """Say whether there is something to do, after asking if it is much."""
    count = found.many if limit is None else min(found.many, limit)
    if not count:
        if not which.get("id"):  # else each of them is told of by `_miss`
            typer.echo(f"no dead letters at {found.url}{_among(which)}")
        return False
    asked = f"{question.format(_tasks(count))} They are at {found.url}."
    if count > 1 and not yes and not typer.confirm(asked):
        typer.echo(f"nothing was {refused}", err=True)
        raise typer.Exit(NOT_DONE)
    return True


def _miss(ids: Iterable[str], found: Collection[str]) -> None:
    missing = [task_id for task_id in ids if task_id not in found]
    for task_id in missing:
        typer.echo(f"no dead letter has the id {task_id}", err=True)
    if missing:
        raise typer.Exit(NOT_DONE)


def _among(which: Which) -> str:
    said = [f"{name} {value!r}" for name, value in which.items() if value and name != "id"]
    return f" with {', '.join(said)}" if said else ""


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count:,} tasks"


# What is shown


def _table(url: str, letters: Sequence[DeadTask]) -> Table:
    """Return a table that fits 80 columns, as an id alone takes 36: two lines for each letter."""
    title = f"dead letters at {url}"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD)
    table.add_column("id\nreason", min_width=36)
    table.add_column("task\nqueue", overflow="fold")
    table.add_column("died", no_wrap=True)
    table.add_column("tries\ncrashes", justify="right", no_wrap=True)
    now = datetime.now(UTC)
    for one in letters:
        reason = " ".join(one.reason.split())
        cells = (
            f"{one.id or 'without an id'}\n{textwrap.shorten(reason, _REASON, placeholder=' ...')}",
            f"{one.task or 'cannot be read'}\n{one.queue}",
            f"{one.died_at.astimezone():%m-%d %H:%M}\n{between(one.died_at, now)} ago",
            f"{_tries(one)}\n{one.crashes}",
        )
        # Text, as a reason may have brackets, which would be taken for markup.
        table.add_row(*(Text(plain(cell)) for cell in cells))
    return table


def _described(one: DeadTask) -> str:
    """Return all that is known of a dead letter, as lines."""
    now = datetime.now(UTC)
    facts = {
        "task": one.task or "cannot be read",
        "queue": one.queue,
        "reason": one.reason,
        "died": f"{moment(one.died_at)} ({between(one.died_at, now)} ago)",
        "buried by": one.worker,
        "attempts": str(_tries(one)),
        "crashes": str(one.crashes),
        "last crash": one.crash_note,
        "args": one.args,
        "kwargs": one.kwargs,
        "payload": f"{len(one.payload):,} bytes",
    }
    if not one.args:
        facts["payload"] += f": {one.payload[:_UNREADABLE]!r}"
    lines = [one.id or "without an id"]
    lines += [f"  {name:<10} {indented(value, 13)}" for name, value in facts.items() if value]
    for attempt in one.attempts:
        at = moment(datetime.fromtimestamp(attempt.at, UTC))
        lines.append(f"  attempt {attempt.number}, {at}, {attempt.worker}: {attempt.error}")
        lines += [f"    {line}" for line in attempt.traceback.rstrip().splitlines()]
    return plain("\n".join(lines))


def _tries(one: DeadTask) -> int:
    return one.attempts[-1].number if one.attempts else 0  # a retry begins at 1 again


def _print_json(letters: Sequence[DeadTask], *, payload: bool) -> None:
    shown = []
    for one in letters:
        fields = {**msgspec.structs.asdict(one), "args": one.args, "kwargs": one.kwargs}
        if not payload:
            del fields["payload"]
        shown.append(fields)
    # The payload is in Base64: it may be anything.
    typer.echo(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
