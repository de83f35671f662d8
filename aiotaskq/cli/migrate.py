"""`aiotaskq migrate`: bring the tables of a database up to date."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Protocol, runtime_checkable

import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import only_app
from aiotaskq.cli.find_app import find_app, import_tasks
from aiotaskq.cli.output import say, say_lines


@runtime_checkable
class MigratableDriver(Protocol):
    """A driver whose tables change from release to release."""

    async def migrate(self, *, dry_run: bool = False) -> Sequence[tuple[str, str]]:
        """Apply the missing steps, all or none; return the name and the statements of each."""
        ...


def migrate(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP", help="The application: tasks:app", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the missing steps, and change nothing.")
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements instead, to be run by psql.")
    ] = False,
) -> None:
    """Make the tables in the database, or bring them up to date.

    [bold]aiotaskq migrate tasks:app[/bold]

    Programs do this by themselves if their database user may create tables.
    If not, run this command as a user who may, once for each release, before
    the release starts.
    """
    app = find_app(only_app(context, words))
    import_tasks(app)
    asyncio.run(_migrate(app, dry_run=dry_run or sql, sql=sql))


async def _migrate(app: TaskQueue, *, dry_run: bool, sql: bool) -> None:
    broker, backend = app.drivers()
    for role, driver in (
        ("broker", broker),
        ("results", backend),
        ("outbox", app.outbox_broker()),
        ("schedules", app.schedule_broker()),
    ):
        if driver is None:
            continue
        if not isinstance(driver, MigratableDriver):
            _print_note(f"{role} {driver.url}: has no tables to migrate", sql)
            continue
        steps = await driver.migrate(dry_run=dry_run)
        for name, statements in steps:
            done = " is missing" if dry_run else " applied"
            _print_note(f"{role} {driver.url}: {name}{done}", sql)
            if sql:
                say_lines(statements.split("\n"))
        if not steps:
            _print_note(f"{role} {driver.url}: up to date", sql)


def _print_note(text: str, sql: bool) -> None:
    say(f"-- {text}" if sql else text)  # a comment among the statements
