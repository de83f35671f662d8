"""A worker process: the program that the supervisor starts, from its first line to its exit status.

Theory of operation. The process goes through these steps, in this order:

1. It begins a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone, which
   passes it on, and so that what its tasks have started can be found and ended.
2. It imports the application and checks the set-up. A mistake is one line on stderr and exit
   status `SETUP_ERROR`. Until an event loop handles them, the stop signals end the process.
3. It runs one `Worker` in one event loop. The supervisor is told when tasks are taken, and of each
   lease that begins or ends, so that the lease keeper renews it too.
4. It exits with a status that tells the supervisor whether to replace it; see
   `aiotaskq.processes.pipe`.

What may happen while the worker runs, and stops it:

- SIGTERM: stop, with the grace period. A second SIGTERM changes nothing, as a service manager sends
  one to every process and the supervisor passes its own on. SIGINT, sent by the supervisor at a
  second signal, means: stop now.
- The parent dies: stop now, and exit for good some seconds later.
- A limit is reached (tasks, memory, stuck tasks): stop, with the grace period, and be replaced.

Invariant: the process ends. Once the worker has stopped, a timer exits for good even if a task
ignores its cancellation or a thread does not return.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from functools import partial

import msgspec

from aiotaskq.app import TaskQueue
from aiotaskq.cli.banner import banner
from aiotaskq.cli.common import load_app, print_error, set_up_logging
from aiotaskq.cli.output import say_lines
from aiotaskq.cli.scheduler import check_schedules
from aiotaskq.cli.scheduler_thread import SchedulerThread
from aiotaskq.contract.records import Grant
from aiotaskq.errors import ConfigError, Unavailable
from aiotaskq.events import WorkerReady
from aiotaskq.processes.operating_system import end_own_session, kill_session, own_resident_memory
from aiotaskq.processes.parent import watch_parent
from aiotaskq.processes.pipe import RECYCLE, SETUP_ERROR, SupervisorPipe, WorkerProcessReady
from aiotaskq.readable import get_logger
from aiotaskq.worker import Worker

logger = get_logger("aiotaskq.worker")

_CLEANUP_TIME = 20.0  # seconds beyond both graces: to store what ended, to close connections
_MEMORY_LOOK_INTERVAL = 1.0  # seconds
_ORPHAN_PATIENCE = 8.0  # seconds to hand tasks back after the death of the parent
_TICK_INTERVAL = 1.0  # seconds between ticks of the event loop; less where the limit is short
_ORPHANS_PATIENCE = 1.0  # seconds to end for processes that tasks have left behind
_EXIT_WAIT = 5.0  # seconds to exit once the worker has stopped
GC_THRESHOLD = 10_000
"""Objects made before the garbage collector looks at them; Python's own default is 700."""


class WorkerProcessOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command line for each process; None: as the settings have it."""

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


def run_worker_process(
    options: WorkerProcessOptions, number: int, replaces: bool, supervisor: SupervisorPipe
) -> None:
    """Be a worker process, and exit with a status for the supervisor.

    Args:
        options: The options of the command line.
        number: The number of the process, counted from 1. Process 1 prints the banner.
        replaces: Whether it replaces another process of this number, which has printed it.
        supervisor: The pipe to the supervisor.
    """
    os.setsid()
    try:
        status = _run(options, number, replaces, supervisor)
    except (ConfigError, Unavailable) as error:
        print_error(str(error))
        status = SETUP_ERROR
    except Exception:
        logger.exception("the worker failed")
        status = 1
    sys.exit(status)


def _run(
    options: WorkerProcessOptions, number: int, replaces: bool, supervisor: SupervisorPipe
) -> int:
    # Each task makes dozens of objects and hardly any garbage that the collector has to find; with
    # Python's default it took a tenth of the time. Set before the application is imported, which
    # may choose another threshold.
    gc.set_threshold(GC_THRESHOLD)
    app = load_app(options.app)
    gc.freeze()  # imported objects stay, and need not be looked at again
    if options.beat:
        check_schedules(app)
    set_up_logging(app, options.loglevel)
    try:
        import uvloop
    except ImportError:  # Windows, PyPy
        factory = None
    else:
        factory = uvloop.new_event_loop
    process = _WorkerProcess(app, options, number, supervisor)
    with asyncio.Runner(loop_factory=factory) as runner:
        status = runner.run(process.run(show_banner=number == 1 and not replaces))
        _exit_within(_EXIT_WAIT, status)
    if app.conf.worker_end_orphans:
        end_own_session(_ORPHANS_PATIENCE)
    return status


def _exit_within(seconds: float, status: int) -> None:
    """Exit for good then, if a task that ignores its cancellation or a thread holds the process."""

    def leave() -> None:
        logger.warning("a task or a thread does not end by itself: exiting without it")
        logging.shutdown()
        os._exit(status)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


class _WorkerProcess:
    """The worker of this process, and everything that watches it."""

    def __init__(
        self,
        app: TaskQueue,
        options: WorkerProcessOptions,
        number: int,
        supervisor: SupervisorPipe,
    ) -> None:
        self._app = app
        self._options = options
        self._number = number
        self._supervisor = supervisor
        self._processes = options.processes or app.conf.worker_processes
        self._grown = False  # beyond the memory that the process may use

    async def run(self, *, show_banner: bool) -> int:
        """Run a worker until it stops, and return the exit status."""
        worker = self._create_worker()
        if show_banner:
            say_lines(banner(self._app, self._options.app, worker.options, self._processes))
        self._app.observers.add(WorkerReady, lambda _: self._tell_ready(worker))
        _handle_signals(worker)
        _stop_when_orphaned(worker, end_orphans=self._app.conf.worker_end_orphans)
        watches = self._start_watches(worker)
        # One scheduler is enough: its process is replaced when it dies.
        scheduler = SchedulerThread(self._app) if self._options.beat and self._number == 1 else None
        if scheduler is not None:
            scheduler.start()
        try:
            await worker.run(patient=self._app.conf.broker_connection_retry_on_startup)
        finally:
            if scheduler is not None:
                await scheduler.stop()
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
        if worker.exhausted:
            logger.info(
                "the process has run its %d tasks: it is replaced", worker.options.max_tasks
            )
        if worker.recycle is not None:
            logger.warning("the process is replaced: %s", worker.recycle)
        return RECYCLE if self._grown or worker.exhausted or worker.recycle is not None else 0

    def _create_worker(self) -> Worker:
        options = self._options
        return Worker(
            self._app,
            concurrency=options.concurrency,
            queues=options.queues,
            name=_worker_name(options.hostname, self._number, self._processes),
            threads=options.threads,
            grace_period=options.grace_period,
            burst=options.burst,
            max_tasks=options.max_tasks or self._app.conf.worker_max_tasks_per_child,
            replaceable=True,
            on_lease=self._tell_lease,
        )

    def _tell_ready(self, worker: Worker) -> None:
        conf = self._app.conf
        self._supervisor.ready(
            WorkerProcessReady(
                processes=self._processes,
                patience=worker.options.grace_period + conf.task_cancel_grace + _CLEANUP_TIME,
                block_limit=conf.worker_loop_block_limit,
                end_orphans=conf.worker_end_orphans,
            )
        )

    def _tell_lease(self, grant: Grant, held: bool) -> None:
        """Have the lease keeper keep a lease too, where it can reach the broker."""
        url, conf = self._app.broker_url, self._app.conf
        if url is None:
            logger.debug("the broker is not given by a URL: this process alone renews its lease")
        elif held:
            self._supervisor.lease_begun(
                grant, url=url, prefix=conf.prefix, beat=conf.worker_heartbeat
            )
        else:
            self._supervisor.lease_ended(grant)

    def _start_watches(self, worker: Worker) -> list[asyncio.Task[None]]:
        conf = self._app.conf
        watches = []
        most = self._options.max_memory or conf.worker_max_memory_per_child
        if most is not None:
            watches.append(asyncio.create_task(self._watch_memory(worker, most)))
        if conf.worker_loop_block_limit is not None:
            watches.append(asyncio.create_task(self._tick(conf.worker_loop_block_limit)))
        return watches

    async def _tick(self, limit: float) -> None:
        """Tell the supervisor that the event loop runs."""
        try:
            while True:
                self._supervisor.tick(more=True)
                await asyncio.sleep(min(_TICK_INTERVAL, limit / 4))
        finally:
            self._supervisor.tick(more=False)

    async def _watch_memory(self, worker: Worker, limit: int) -> None:
        """Stop the worker when the process has grown beyond `limit` KiB."""
        while True:
            await asyncio.sleep(_MEMORY_LOOK_INTERVAL)
            used = own_resident_memory() // 1024
            if used > limit:
                logger.warning("the process uses %d KiB, more than %d: it is replaced", used, limit)
                self._grown = True
                worker.stop()
                return


def _worker_name(given: str | None, number: int, processes: int) -> str | None:
    if given is None:
        return None
    host = os.uname().nodename
    name = given.replace("%h", host).replace("%n", host.partition(".")[0])
    return f"{name}-{number}" if processes > 1 else name


def _handle_signals(worker: Worker) -> None:
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

    # SIGTERM may come twice for one wish; see the theory of operation.
    loop.add_signal_handler(signal.SIGTERM, partial(stop, again=False))
    loop.add_signal_handler(signal.SIGINT, partial(stop, again=True))


def _stop_when_orphaned(worker: Worker, *, end_orphans: bool) -> None:
    loop = asyncio.get_running_loop()
    watch_parent(
        lambda: loop.call_soon_threadsafe(lambda: worker.stop(hurry=True)),
        patience=_ORPHAN_PATIENCE,
        on_exit=lambda: kill_session(os.getpid()) if end_orphans else None,
    )
