"""`aiotaskq worker`: run a worker, as worker processes below a supervisor."""

from __future__ import annotations

import logging
import re
from functools import partial
from typing import Annotated

import typer

from aiotaskq.cli.common import LOG_LEVELS, only_app, read_log_level
from aiotaskq.cli.worker_process import WorkerProcessOptions, run_worker_process
from aiotaskq.config import Config
from aiotaskq.errors import ConfigError
from aiotaskq.processes.supervisor import Supervisor

_WEIGHT = re.compile(r"(.+):([+-]?[0-9]+(?:\.[0-9]+)?)")  # follows the name of a queue


def worker(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP", help="The application: tasks:app", show_default=False),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "-c", "--concurrency", min=1, help="Tasks at the same time in each process. [100]"
        ),
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
        typer.Option(
            "-Q",
            "--queues",
            metavar="A,B",
            help="Queues, in the order in which they are drained; or with weights: A:6,B:1.",
        ),
    ] = None,
    hostname: Annotated[
        str | None,
        typer.Option("-n", "--hostname", help="The worker's name; %h stands for the host's."),
    ] = None,
    loglevel: Annotated[
        str,
        typer.Option("-l", "--loglevel", metavar="LEVEL", help=f"One of {', '.join(LOG_LEVELS)}."),
    ] = "info",
    beat: Annotated[
        bool, typer.Option("-B", "--beat", help="Run schedules as well; any number of workers may.")
    ] = False,
    burst: Annotated[bool, typer.Option("--burst", help="Stop when the queues are empty.")] = False,
    reload: Annotated[
        bool, typer.Option("--reload", help="Restart when a Python file changes.")
    ] = False,
    grace_period: Annotated[
        float | None,
        typer.Option(
            "--grace-period",
            min=0,
            help="Seconds that running tasks get when the worker stops. [25]",
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
            help="Replace a process that uses more memory than this: KiB, or 200MB.",
        ),
    ] = None,
) -> None:
    """Run a worker.

    [bold]aiotaskq worker tasks:app -c 200 -w 2 -Q critical,default[/bold]

    With weights, [bold]-Q critical:6,default:3,low:1[/bold], each queue gets its
    share of the worker while all are full, and none waits for ever.

    Ctrl-C or SIGTERM: no more tasks are taken, and running ones get the
    grace period; tasks that are left then are handed back for other workers.
    A second signal skips the wait.
    """
    target = only_app(context, words)
    options = WorkerProcessOptions(
        app=target,
        loglevel=read_log_level(loglevel),
        processes=processes,
        concurrency=concurrency,
        threads=threads,
        queues=_queues(queues),
        hostname=hostname,
        grace_period=grace_period,
        burst=burst,
        beat=beat,
        max_tasks=max_tasks,
        max_memory=_kibibytes(max_memory),
    )
    logging.basicConfig(level=options.loglevel, format=Config().worker_log_format)
    main = partial(run_worker_process, options)
    raise typer.Exit(Supervisor(main, finite=burst, reload=reload).run())


def _queues(text: str | None) -> list[str] | dict[str, int] | None:
    """Return the queues in their order, or with weights if the option gives any."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError("-Q names no queue; write -Q critical,default")
    weights = {word: found for word in words if (found := _WEIGHT.fullmatch(word))}
    bare = [word for word in words if word not in weights]
    if weights and bare:
        raise ConfigError(
            f"-Q gives no weight to {bare[0]}, but one in {next(iter(weights))}: write a whole"
            " number behind each, as in critical:6,low:1, or behind none"
        )
    names = [weights[word][1] if weights else word for word in words]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"-Q names the queue {name} twice: leave one of them out")
    if not weights:
        return names
    return {weights[word][1]: _weight(weights[word]) for word in words}


def _weight(found: re.Match[str]) -> int:
    queue, number = found.groups()
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            f"-Q gives the queue {queue} the weight {number}; it is a whole number, and 1 is the"
            " least. Leave out a queue that is not to be served"
        )
    return int(number)


def _kibibytes(text: str | None) -> int | None:
    if text is None:
        return None
    conf = Config({})
    conf.update({"worker_max_memory_per_child": int(text) if text.isdigit() else text})
    return conf.worker_max_memory_per_child
