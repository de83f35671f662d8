"""The command line. Every mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from aiotaskq.cli import dead, migrate, queues, scheduler, schedules, tasks, worker
from aiotaskq.cli.common import ROOT_HELP, Settings, complain
from aiotaskq.errors import AioTaskQError
from aiotaskq.ids import version
from aiotaskq.processes.supervisor import SETUP_ERROR

cli = typer.Typer(
    name="aiotaskq",
    help=ROOT_HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli.command("worker", no_args_is_help=False)(worker.worker)
cli.command("scheduler")(scheduler.scheduler)
cli.command("beat", hidden=True)(scheduler.scheduler)
cli.command("call")(tasks.call)
cli.command("result")(tasks.result)
cli.command("migrate")(migrate.migrate)
cli.add_typer(queues.cli, name="queues")
cli.add_typer(dead.cli, name="dead")
cli.add_typer(schedules.cli, name="schedule")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aiotaskq {version()}")
        raise typer.Exit


@cli.callback()
def root(
    context: typer.Context,
    app: Annotated[
        str | None,
        typer.Option("-A", "--app", metavar="APP", help="The application, for all commands."),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take what comes before the command. `ROOT_HELP` is what people read."""
    context.obj = Settings(app=app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        status = cli(list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except AioTaskQError as error:
        complain(str(error))
        status = SETUP_ERROR
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped", err=True)
        status = 130
    except Exception as error:
        # Typer's own usage errors; it carries its copy of click, whose classes are not public.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        if message := _with_mend(describe()):  # empty where the help was shown instead
            complain(message)
        status = SETUP_ERROR
    raise SystemExit(status)


def _with_mend(message: str) -> str:
    if re.search(r"No such option: -\d", message):
        return f"{message} Put -- before a negative number."
    return message
