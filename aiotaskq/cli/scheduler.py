"""`aiotaskq scheduler`, and the scheduler beside a worker (``worker -B``)."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from typing import Annotated

import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.banner import scheduler_banner
from aiotaskq.cli.common import LEVELS, check_shared, level_of, only_app, set_up_logging
from aiotaskq.cli.target import find_app, import_tasks
from aiotaskq.errors import ConfigError, Unavailable
from aiotaskq.scheduling.scheduler import Scheduler
from aiotaskq.scheduling.schedules import define_all

logger = logging.getLogger("aiotaskq.scheduler")

_STOP_WAIT = 35.0  # seconds for runs that are being sent


def scheduler(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP", help="The application: tasks:app", show_default=False),
    ] = None,
    loglevel: Annotated[
        str,
        typer.Option("-l", "--loglevel", metavar="LEVEL", help=f"One of {', '.join(LEVELS)}."),
    ] = "info",
) -> None:
    """Send tasks by the clock: run their schedules.

    [bold]aiotaskq scheduler tasks:app[/bold]

    Any number may run, here and on other machines, beside those in workers (worker -B):
    each run is sent once, and when one dies the others just go on. Ctrl-C or SIGTERM stops it.
    """
    target = only_app(context, words)
    level = level_of(loglevel)
    app = find_app(target)
    import_tasks(app)
    check_shared(app)
    check_schedules(app)
    set_up_logging(app, level)
    print(scheduler_banner(app, target), flush=True)
    asyncio.run(_run(app))


def check_schedules(app: TaskQueue) -> None:
    """Raise a `ConfigError` if the schedules of an application cannot be run."""
    broker, _ = app.drivers()
    if not broker.traits.schedules:
        raise ConfigError(f"{broker.url} keeps no schedules, so there is nothing to run them from")
    define_all(app, app.declared_schedules())


async def _run(app: TaskQueue) -> None:
    loop = asyncio.get_running_loop()
    running = app.scheduler()

    def stop() -> None:
        logger.warning("stopping")
        running.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await _serve(app, running)


async def _serve(app: TaskQueue, running: Scheduler) -> None:
    try:
        await running.run(patient=app.conf.broker_connection_retry_on_startup)
    finally:
        await app.close()


class SchedulerThread:
    """A scheduler in a thread with an event loop of its own, so that no task's code delays it."""

    def __init__(self, app: TaskQueue) -> None:
        self._app = app
        self._thread = threading.Thread(target=self._main, name="aiotaskq-scheduler", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: Scheduler | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to send what is due."""
        self._thread.start()

    async def stop(self) -> None:
        """Stop, after what is being sent."""
        with self._lock:
            self._stopped = True
            if self._loop is not None and self._running is not None:
                self._loop.call_soon_threadsafe(self._running.stop)
        await asyncio.to_thread(self._thread.join, _STOP_WAIT)

    def _main(self) -> None:
        try:
            asyncio.run(self._work())
        except (ConfigError, Unavailable) as error:
            logger.error("the scheduler cannot run: %s", error)
        except Exception:  # whatever it is, the worker goes on without it, and the log says so
            logger.exception("the scheduler failed")

    async def _work(self) -> None:
        with self._lock:
            if self._stopped:
                return
            self._running = self._app.scheduler()
            self._loop = asyncio.get_running_loop()
        try:
            await _serve(self._app, self._running)
        finally:
            with self._lock:
                self._loop = None
