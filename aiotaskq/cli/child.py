"""One worker process: what the supervisor starts."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
import threading
from functools import partial

import msgspec

from aiotaskq.app import TaskQueue
from aiotaskq.cli.banner import banner
from aiotaskq.cli.common import check_shared, complain, set_up_logging
from aiotaskq.cli.scheduler import SchedulerThread, check_schedules
from aiotaskq.cli.target import find_app, import_tasks
from aiotaskq.contract.records import Grant
from aiotaskq.errors import ConfigError, Unavailable
from aiotaskq.events import WorkerReady
from aiotaskq.processes.lease_keeper import resident
from aiotaskq.processes.supervisor import RECYCLE, SETUP_ERROR, Line, watch_parent
from aiotaskq.worker import Worker

logger = logging.getLogger("aiotaskq.worker")

_CLEANUP = 20.0  # seconds beyond both graces: to store what ended, to close
_MEMORY_LOOK = 1.0  # seconds
_ORPHAN_PATIENCE = 8.0  # seconds that a process gets to hand its tasks back without its parent
_TICK = (
    1.0  # seconds between signs of the event loop's, where there is a limit; less if it is short
)
YOUNG_OBJECTS = (
    10_000  # objects made before the collector looks at them; Python's own default is 700
)
_EXIT_WAIT = 5.0  # seconds to exit for a process that has nothing more to do


class ChildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks of each process; None: as the settings have it."""

    app: str
    loglevel: str
    processes: int | None
    concurrency: int | None
    threads: int | None
    queues: list[str] | dict[str, int] | None  # the latter with weights
    hostname: str | None
    grace_period: float | None
    burst: bool
    beat: bool
    max_tasks: int | None
    max_memory: int | None  # KiB


def serve(options: ChildOptions, number: int, again: bool, line: Line) -> None:
    """Be worker process `number`, counted from 1, and exit with a status for the supervisor.

    Args:
        options: What the command line asks.
        number: The first one prints the banner,
        again: unless it replaces one that did.
        line: To the supervisor.
    """
    os.setpgrp()  # Ctrl-C goes to the supervisor alone, which passes it on as SIGTERM
    try:
        status = _run(options, number, again, line)
    except (ConfigError, Unavailable) as error:
        complain(str(error))
        status = SETUP_ERROR
    except Exception:
        logger.exception("the worker failed")
        status = 1
    sys.exit(status)


def _run(options: ChildOptions, number: int, again: bool, line: Line) -> int:
    # Each task makes dozens of objects, and hardly any garbage that the collector has to find:
    # by default it took a tenth of the time. Set first, so that the application has the last word.
    gc.set_threshold(YOUNG_OBJECTS)
    app = find_app(options.app)
    import_tasks(app)
    gc.freeze()  # what was imported stays, and need not be looked at again
    check_shared(app)
    if options.beat:
        check_schedules(app)
    set_up_logging(app, options.loglevel)
    processes = options.processes or app.conf.worker_processes
    try:
        import uvloop
    except ImportError:  # Windows, PyPy
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        status = runner.run(_work(app, options, number, processes, again, line))
        _exit_within(_EXIT_WAIT, status)
        return status


def _exit_within(seconds: float, status: int) -> None:
    """Exit then, whatever holds the process: a task that ignores its cancellation, a thread."""

    def leave() -> None:
        logger.warning("something does not end by itself, leaving it behind")
        logging.shutdown()
        os._exit(status)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


async def _work(
    app: TaskQueue,
    options: ChildOptions,
    number: int,
    processes: int,
    again: bool,
    line: Line,
) -> int:
    worker = Worker(
        app,
        concurrency=options.concurrency,
        queues=options.queues,
        name=_name(options.hostname, number, processes),
        threads=options.threads,
        grace_period=options.grace_period,
        burst=options.burst,
        max_tasks=options.max_tasks or app.conf.worker_max_tasks_per_child,
        replaceable=True,
        on_lease=partial(_tell_lease, app, line),
    )
    if number == 1 and not again:
        print(banner(app, options.app, worker.options, processes), flush=True)
    app.observers.add(WorkerReady, lambda _: _tell_ready(app, line, worker, processes))
    _listen_to_signals(worker)
    grown = asyncio.Event()
    watches = _start_watches(app, options, line, worker, grown)
    # One of the processes is enough, and it is replaced when it dies.
    beat = SchedulerThread(app) if options.beat and number == 1 else None
    if beat is not None:
        beat.start()
    try:
        await worker.run(patient=app.conf.broker_connection_retry_on_startup)
    finally:
        if beat is not None:
            await beat.stop()
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
    if worker.exhausted:
        logger.info("the process has run its %d tasks: it is replaced", worker.options.max_tasks)
    if worker.recycle is not None:
        logger.warning("the process is replaced: %s", worker.recycle)
    return RECYCLE if grown.is_set() or worker.exhausted or worker.recycle is not None else 0


def _tell_ready(app: TaskQueue, line: Line, worker: Worker, processes: int) -> None:
    line.ready(
        processes=processes,
        patience=worker.options.grace_period + app.conf.task_cancel_grace + _CLEANUP,
        block_limit=app.conf.worker_loop_block_limit,
    )


def _tell_lease(app: TaskQueue, line: Line, grant: Grant, held: bool) -> None:
    """Have the supervisor's side look after a lease too, as far as it can reach the broker."""
    if app.broker_url is None:
        logger.debug("the broker is not given by a URL: this process alone renews its lease")
    elif held:
        line.holding(
            grant, url=app.broker_url, prefix=app.conf.prefix, beat=app.conf.worker_heartbeat
        )
    else:
        line.let_go(grant)


def _start_watches(
    app: TaskQueue, options: ChildOptions, line: Line, worker: Worker, grown: asyncio.Event
) -> list[asyncio.Task[None]]:
    watches = []
    most = options.max_memory or app.conf.worker_max_memory_per_child
    if most is not None:
        watches.append(asyncio.create_task(_watch_memory(worker, most, grown)))
    if app.conf.worker_loop_block_limit is not None:
        watches.append(asyncio.create_task(_tick(line, app.conf.worker_loop_block_limit)))
    return watches


async def _tick(line: Line, limit: float) -> None:
    """Tell the supervisor that the event loop runs."""
    try:
        while True:
            line.tick(more=True)
            await asyncio.sleep(min(_TICK, limit / 4))
    finally:
        line.tick(more=False)


def _name(given: str | None, number: int, processes: int) -> str | None:
    if given is None:
        return None
    host = os.uname().nodename
    name = given.replace("%h", host).replace("%n", host.partition(".")[0])
    return f"{name}-{number}" if processes > 1 else name


def _listen_to_signals(worker: Worker) -> None:
    loop = asyncio.get_running_loop()
    told = False

    def stop(*, again: bool) -> None:
        nonlocal told
        if told and not again:
            return
        if told:
            logger.warning("stopping now")
        elif worker.running:
            logger.warning(
                "stopping: what runs gets %g s to finish (%d). Again to stop at once",
                worker.options.grace_period,
                worker.running,
            )
        else:
            logger.warning("stopping")
        worker.stop(hurry=told)
        told = True

    # Whoever stops the whole service, as systemd does, sends SIGTERM to us and to the supervisor,
    # which passes it on: that is one wish. To hurry, the supervisor sends SIGINT.
    loop.add_signal_handler(signal.SIGTERM, partial(stop, again=False))
    loop.add_signal_handler(signal.SIGINT, partial(stop, again=True))
    watch_parent(
        lambda: loop.call_soon_threadsafe(lambda: worker.stop(hurry=True)),
        patience=_ORPHAN_PATIENCE,
    )


async def _watch_memory(worker: Worker, limit: int, reached: asyncio.Event) -> None:
    """Stop the worker when the process has grown beyond `limit` KiB."""
    while True:
        await asyncio.sleep(_MEMORY_LOOK)
        used = _resident()
        if used > limit:
            logger.warning("the process uses %d KiB, more than %d: it is replaced", used, limit)
            reached.set()
            worker.stop()
            return


def _resident() -> int:
    """Return the memory that this process occupies, in KiB."""
    used = resident("self")
    if used is not None:
        return used // 1024
    # No Linux: the most it ever had, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
