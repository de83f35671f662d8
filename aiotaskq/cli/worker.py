"""`aiotaskq worker`."""

from __future__ import annotations

import logging
from functools import partial
from typing import Annotated

import typer

from aiotaskq.cli.child import ChildOptions, serve
from aiotaskq.cli.common import choose_app
from aiotaskq.config import Config
from aiotaskq.errors import ConfigError
from aiotaskq.supervisor import Supervisor

_LEVELS = ("debug", "info", "warning", "error", "critical")


def worker(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP", help="The application: tasks:app", show_default=False),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("-c", "--concurrency", min=1, help="Tasks at once in each process. [100]"),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("-w", "--processes", min=1, help="Worker processes. [1]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads of each process, for plain functions."),
    ] = None,
    queues: Annotated[
        str | None,
        typer.Option("-Q", "--queues", metavar="A,B", help="Queues, the one to drain first first."),
    ] = None,
    hostname: Annotated[
        str | None,
        typer.Option("-n", "--hostname", help="The worker's name; %h stands for the host's."),
    ] = None,
    loglevel: Annotated[
        str,
        typer.Option("-l", "--loglevel", metavar="LEVEL", help=f"One of {', '.join(_LEVELS)}."),
    ] = "info",
    burst: Annotated[bool, typer.Option("--burst", help="Stop when the queues are empty.")] = False,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start anew when a Python file changes.")
    ] = False,
    grace_period: Annotated[
        float | None,
        typer.Option(
            "--grace-period", min=0, help="Seconds that running tasks get when it stops. [25]"
        ),
    ] = None,
    max_tasks: Annotated[
        int | None,
        typer.Option("--max-tasks-per-child", min=1, help="Replace a process after so many tasks."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory-per-child",
            metavar="KIB",
            help="Replace a process that uses more memory: KiB, or 200MB.",
        ),
    ] = None,
) -> None:
    """Run a worker.

    [bold]aiotaskq worker tasks:app -c 200 -w 2 -Q critical,default[/bold]

    Ctrl-C or SIGTERM: no more tasks are taken, running ones get the grace period,
    what is left then is handed back for other workers. A second one skips the wait.
    """
    target, words = choose_app(context, words or [])
    if words:
        raise ConfigError(f"unexpected {words[0]!r}; options come with a dash: see --help")
    if loglevel.lower() not in _LEVELS:
        raise ConfigError(f"no log level {loglevel!r}; there are {', '.join(_LEVELS)}")
    options = ChildOptions(
        app=target,
        loglevel=loglevel.upper(),
        processes=processes,
        concurrency=concurrency,
        threads=threads,
        queues=_split(queues),
        hostname=hostname,
        grace_period=grace_period,
        burst=burst,
        max_tasks=max_tasks,
        max_memory=_kibibytes(max_memory),
    )
    logging.basicConfig(level=options.loglevel, format=Config().worker_log_format)
    raise typer.Exit(Supervisor(partial(serve, options), finite=burst, reload=reload).run())


def _split(queues: str | None) -> list[str] | None:
    if queues is None:
        return None
    names = [name.strip() for name in queues.split(",") if name.strip()]
    if not names:
        raise ConfigError("-Q names no queue; write -Q critical,default")
    return names


def _kibibytes(text: str | None) -> int | None:
    if text is None:
        return None
    conf = Config({})
    conf.update({"worker_max_memory_per_child": int(text) if text.isdigit() else text})
    return conf.worker_max_memory_per_child
