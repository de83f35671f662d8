"""`aiotaskq migrate`: bring the tables of a database up to date."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Protocol, runtime_checkable

import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import only_app
from aiotaskq.cli.target import find_app, import_tasks


@runtime_checkable
class Migrated(Protocol):
    """A driver whose tables change from release to release."""

    async def migrate(self, *, dry_run: bool = False) -> Sequence[tuple[str, str]]:
        """Apply what is missing, all or nothing; return the name and the statements of each."""
        ...


def migrate(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP", help="The application: tasks:app", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be applied, and change nothing.")
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements instead, to be run by psql.")
    ] = False,
) -> None:
    """Make the tables in the database, or bring them up to date.

    [bold]aiotaskq migrate tasks:app[/bold]

    Programs do this by themselves where their database user may create tables; where not, have one
    who may do it, once for each release, before the release starts.
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
    ):
        if driver is None:
            continue
        if not isinstance(driver, Migrated):
            _note(f"{role} {driver.url}: has no tables to migrate", sql)
            continue
        steps = await driver.migrate(dry_run=dry_run)
        for name, statements in steps:
            _note(f"{role} {driver.url}: {name}{' is missing' if dry_run else ' applied'}", sql)
            if sql:
                typer.echo(statements)
        if not steps:
            _note(f"{role} {driver.url}: up to date", sql)


def _note(text: str, sql: bool) -> None:
    typer.echo(f"-- {text}" if sql else text)
