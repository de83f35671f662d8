"""`aiotaskq queues`: how many tasks wait, and emptying a queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.table import Table

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import GROUP_SETTINGS, GroupWithDefaultList, choose_app, run_with_app
from aiotaskq.cli.exit_status import NOT_DONE
from aiotaskq.cli.formatting import task_count
from aiotaskq.cli.output import ask, cell, say, say_table
from aiotaskq.contract.records import Depth
from aiotaskq.errors import ConfigError

cli = typer.Typer(
    cls=GroupWithDefaultList,
    help="Show how many tasks wait, or empty a queue.",
    no_args_is_help=False,
    context_settings=GROUP_SETTINGS,
)


@cli.command("list")
def list_queues(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="APP", help="The application.")
    ] = None,
) -> None:
    """Show each queue: how many tasks are ready, delayed, held by workers, and dead."""
    target, words = choose_app(context, words or [])
    if words:
        raise ConfigError(f"no such command: {words[0]!r}; there are list and purge")

    async def work(app: TaskQueue) -> tuple[str, Mapping[str, Depth]]:
        broker = await app.broker()
        return broker.url, await broker.depth()

    url, depths = run_with_app(target, work)
    if not depths:
        say(f"no queue at {url} holds anything")
        return
    table = Table("queue", title=cell(f"queues at {url}"), title_justify="left", title_style="")
    for state in ("ready", "delayed", "held", "dead"):
        table.add_column(state, justify="right")
    for queue, depth in sorted(depths.items()):
        counts = (depth.ready, depth.delayed, depth.held, depth.dead)
        table.add_row(cell(queue), *(f"{count:,}" for count in counts))
    say_table(table)


@cli.command()
def purge(
    context: typer.Context,
    words: Annotated[
        list[str], typer.Argument(metavar="APP QUEUE", help="The application and the queue.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Drop all tasks that wait in a queue, delayed ones too. It cannot be undone.

    Tasks held by workers go on, and dead letters stay.
    """
    target, words = choose_app(context, words)
    if len(words) != 1:
        raise ConfigError(f"which queue? aiotaskq queues purge {target} default")
    (queue,) = words

    async def count(app: TaskQueue) -> tuple[str, Depth]:
        broker = await app.broker()
        return broker.url, (await broker.depth()).get(queue, Depth())

    async def drop(app: TaskQueue) -> int:
        return await (await app.broker()).purge(queue)

    url, depth = run_with_app(target, count)
    waiting = depth.ready + depth.delayed
    if not waiting:
        say(f"nothing waits in {queue!r} at {url}")
        return
    if not yes and not ask(f"Drop {task_count(waiting)} waiting in {queue!r} at {url}?"):
        say("nothing was dropped", err=True)
        raise typer.Exit(NOT_DONE)
    say(f"dropped {task_count(run_with_app(target, drop))}")
