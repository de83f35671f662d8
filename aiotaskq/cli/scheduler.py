"""`aiotaskq scheduler`: send tasks by the clock."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.banner import scheduler_banner
from aiotaskq.cli.common import (
    LOG_LEVELS,
    load_app,
    only_app,
    read_log_level,
    set_up_logging,
)
from aiotaskq.cli.output import say_lines
from aiotaskq.processes.standard_streams import forgive_output
from aiotaskq.readable import get_logger
from aiotaskq.scheduling.scheduler import Scheduler
from aiotaskq.scheduling.schedules import define_all

logger = get_logger("aiotaskq.scheduler")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def scheduler(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP", help="The application: tasks:app", show_default=False),
    ] = None,
    loglevel: Annotated[
        str,
        typer.Option("-l", "--loglevel", metavar="LEVEL", help=f"One of {', '.join(LOG_LEVELS)}."),
    ] = "info",
) -> None:
    """Send tasks by the clock: run their schedules.

    [bold]aiotaskq scheduler tasks:app[/bold]

    Any number of schedulers may run, here and on other machines, beside those
    in workers (worker -B): each run is sent once, and when one dies the others
    go on. Ctrl-C or SIGTERM stops it.
    """
    target = only_app(context, words)
    level = read_log_level(loglevel)
    app = load_app(target)
    check_schedules(app)
    set_up_logging(app, level)
    say_lines(scheduler_banner(app, target))
    asyncio.run(_run(app))
    forgive_output()  # nobody waits for the banner


async def _run(app: TaskQueue) -> None:
    loop = asyncio.get_running_loop()
    running = app.scheduler()

    def stop() -> None:
        logger.warning("stopping")
        running.stop()

    def told(*_: object) -> None:
        # The first signal says all. A further one may come until the process has ended, when no
        # event loop handles it any more, and must not end it with another exit status.
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        loop.call_soon_threadsafe(stop)

    for number in _STOP_SIGNALS:
        signal.signal(number, told)
    await run_scheduler(app, running)


def check_schedules(app: TaskQueue) -> None:
    """Raise a `ConfigError` if the schedules of an application cannot be run."""
    app.schedule_broker()
    define_all(app, app.declared_schedules())


async def run_scheduler(app: TaskQueue, running: Scheduler) -> None:
    """Run a scheduler until it is stopped, then close the application."""
    try:
        await running.run(patient=app.conf.broker_connection_retry_on_startup)
    finally:
        await app.close()
