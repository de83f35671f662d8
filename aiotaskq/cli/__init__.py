"""The command line. Every mistake is one line on stderr and exit status 2.

Each command has the file of its name: `worker.py`, `scheduler.py`, `call.py`, `result.py`,
`queues.py`, `dead.py`, `schedule.py` and `migrate.py`. The worker processes that `aiotaskq worker`
starts run `worker_process.py`; the other files are shared by several commands.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from aiotaskq.cli import call, dead, migrate, queues, result, schedule, scheduler, worker
from aiotaskq.cli.common import GROUP_SETTINGS, GlobalOptions, print_error
from aiotaskq.cli.exit_status import OUTPUT_LOST, SETUP_ERROR, STOPPED
from aiotaskq.cli.output import say, say_traceback
from aiotaskq.errors import AioTaskQError
from aiotaskq.ids import version
from aiotaskq.processes.standard_streams import guard_streams, output_failure

ROOT_HELP = """A task queue for asyncio.

Write [bold]tasks.py[/bold]:

    from aiotaskq import TaskQueue
    app = TaskQueue("tasks", broker="redis://localhost:6379/0")

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

Then start a worker, [bold]aiotaskq worker tasks:app[/bold], and send it something:
[bold]aiotaskq call tasks:app tasks.add 2 8 --wait[/bold]

APP is [bold]module:name[/bold], or a module or package that holds one TaskQueue.
As in Celery: [bold]aiotaskq -A tasks worker[/bold]
"""

cli = typer.Typer(
    name="aiotaskq",
    help=ROOT_HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=GROUP_SETTINGS,
)
cli.command("worker", no_args_is_help=False)(worker.worker)
cli.command("scheduler")(scheduler.scheduler)
cli.command("beat", hidden=True)(scheduler.scheduler)
cli.command("call")(call.call)
cli.command("result")(result.result)
cli.command("migrate")(migrate.migrate)
cli.add_typer(queues.cli, name="queues")
cli.add_typer(dead.cli, name="dead")
cli.add_typer(schedule.cli, name="schedule")


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"aiotaskq {version()}")
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
    """Keep the options before the command. The help of this level is `ROOT_HELP`."""
    context.obj = GlobalOptions(app=app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    guard_streams()
    try:
        words = [_readable(word) for word in (sys.argv[1:] if arguments is None else arguments)]
        status = cli(words, standalone_mode=False)
    except AioTaskQError as error:
        print_error(str(error))
        status = SETUP_ERROR
    except (KeyboardInterrupt, typer.Abort):
        say("stopped", err=True)
        status = STOPPED
    except Exception as error:
        # Typer's own usage errors; it carries its copy of click, whose classes are not public.
        describe = getattr(error, "format_message", None)
        if describe is None:  # a fault of ours, or of the application
            say_traceback("".join(traceback.format_exception(error)))
            raise SystemExit(1) from None
        if message := _with_advice(describe()):  # empty where the help was shown instead
            print_error(message)
        status = SETUP_ERROR
    raise SystemExit(status or _output_status())


def _readable(word: str) -> str:
    """Return a word of the command line as UTF-8 where the locale, such as C, could not read it."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return os.fsencode(word).decode(errors="backslashreplace")
    return word


def _output_status() -> int:
    """Return the exit status that tells whether the output was written; 0: it was.

    A reader that has seen enough, such as ``head``, is no mistake, and ends the process as it ends
    any other: by SIGPIPE.
    """
    failure = output_failure()
    if failure is None:
        return 0
    if isinstance(failure, BrokenPipeError):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    print_error(f"the output cannot be written: {failure.strerror}")
    return OUTPUT_LOST


def _with_advice(message: str) -> str:
    if re.search(r"No such option: -\d", message):
        return f"{message} Put -- before a negative number."
    return message
