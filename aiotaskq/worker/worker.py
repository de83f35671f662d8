"""`Worker`: the life of a worker in one event loop.

::

    connect ──▶ lifespans begin ──▶ incarnation ──▶ told to stop ──▶ lifespans end ──▶ close
                                     ▲        │
                                     └────────┘ the lease was lost, or the broker was away

One exit stack ends everything that was begun, in the reverse order, also when the set-up fails
halfway. `stop` only sets an event, so that it may be called at any moment, also before the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack

from aiotaskq import events, forks
from aiotaskq.client.outbox import Outbox
from aiotaskq.client.outbox_relay import OutboxRelay
from aiotaskq.context import State
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import Grant, WorkerInfo
from aiotaskq.contract.results import ResultBackend
from aiotaskq.errors import LeaseLost, Unavailable
from aiotaskq.ids import host_name
from aiotaskq.readable import get_logger
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.options import check_process
from aiotaskq.worker.environment import WorkerEnvironment
from aiotaskq.worker.fetching import Quota
from aiotaskq.worker.health import Health, Outage
from aiotaskq.worker.incarnation import Incarnation
from aiotaskq.worker.loop_monitor import LoopMonitor
from aiotaskq.worker.pools import Pools
from aiotaskq.worker.task_log import logged
from aiotaskq.worker.worker_options import WorkerKeywords, WorkerOptions

logger = get_logger("aiotaskq.worker")

LeaseHook: TypeAlias = Callable[[Grant, bool], None]

_RECONNECT = (0.1, 5.0)  # seconds: the first pause while a server is away, and the longest
_RELAY_PAUSES = (0.1, 5.0)  # the same while the relay cannot pass tasks on


class Worker:
    """Takes tasks and runs them in the running event loop.

    There are two ways to run a worker. ``async with worker:`` starts it on entry and drains it on
    exit; ``await worker.run()`` returns when the worker was told to `stop`, or had nothing more to
    do. A worker touches no signal handler.

    Args:
        app: The application whose tasks are run.
        replaceable: Whether the worker may stop by itself to have its process replaced; see
            `recycle`.
        on_lease: Called in the event loop with the grant of a lease and True when the lease has
            begun, and with False when it has ended.

    The other arguments are those of `TaskQueue.worker`, and `max_tasks`, the most deliveries to
    take.

    Attributes:
        options: The options of the worker.
        recycle: The reason why the process is to be replaced; None: there is none.
        health: Problems that last, and counts of rare events.
        loop_monitor: Measures how late the event loop is.
    """

    def __init__(
        self,
        app: Application,
        *,
        replaceable: bool = False,
        on_lease: LeaseHook | None = None,
        **options: Unpack[WorkerKeywords],
    ) -> None:
        self.options = WorkerOptions.choose(app.conf, **options)
        self._app = app
        self._state = State()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._quota = Quota(self.options.max_tasks)
        self._replaceable = replaceable
        self._on_lease = on_lease
        self.recycle: str | None = None
        self.health = Health(app.observers, self.options.name)
        self.loop_monitor = LoopMonitor(
            app.conf.worker_loop_block_warning,
            observers=app.observers,
            worker=self.options.name,
            describe=self._name_work,
            blocked=self._count_block,
        )
        self._main: asyncio.Task[None] | None = None
        self._lived = False
        self._incarnation: Incarnation | None = None

    @property
    def running(self) -> int:
        """The number of tasks that run now."""
        return 0 if self._incarnation is None else self._incarnation.running

    @property
    def exhausted(self) -> bool:
        """Return whether the worker has taken as many tasks as it may."""
        return self._quota.spent

    def stop(self, *, hurry: bool = False) -> None:
        """Ask the worker to stop: it takes no more tasks, and those that run get the grace period.

        Args:
            hurry: Whether to cancel running tasks and hand them back now, without a grace period.
        """
        self._stopping.set()
        if hurry:
            self._hurry.set()

    async def run(self, *, patient: bool = True) -> None:
        """Work until told to stop.

        Args:
            patient: Wait for servers that cannot be reached at start; otherwise raise.

        Raises:
            ConfigError: The set-up is wrong.
            Unavailable: A server cannot be reached at start, and it is not to be waited for.
        """
        await self._live(patient=patient, connected=None)

    async def __aenter__(self) -> Self:
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._live(patient=True, connected=connected))
        try:
            await asyncio.wait([self._main, connected], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # there will be no exit, as there was no entry
            self._main.cancel()
            await asyncio.wait([self._main])
            raise
        if self._main.done():
            self._main.result()  # raises the error of the set-up
        self._main.add_done_callback(_tell_failure)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._main is not None  # entered
        self.stop()
        await self._main

    async def _live(self, *, patient: bool, connected: asyncio.Future[None] | None) -> None:
        if self._lived:
            raise RuntimeError("a worker lives once; make another one")
        self._lived = True
        forks.guard(asyncio.get_running_loop())
        self._app.import_tasks()
        for task in self._app.tasks.values():
            task.arguments.prepare()
            if self._app.effective_options(task.name).executor == "process":
                check_process(task.fn)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(logged(self._app.observers))
            broker, backend = self._app.drivers()
            stack.push_async_callback(broker.close)
            if backend is not None:
                stack.push_async_callback(backend.close)
            if not await self._connect(broker, backend, patient=patient, connected=connected):
                return  # told to stop while it waited
            for lifespan in self._app.lifespans:
                await stack.enter_async_context(lifespan(self._state))
            pools = Pools(
                threads=self.options.threads,
                processes=self.options.processes,
                codec_settings=self._app.codec.settings,
                worker=self.options.name,
                end_orphans=self._app.conf.worker_end_orphans,
            )
            stack.push_async_callback(pools.close)
            self.loop_monitor.start()
            stack.push_async_callback(self.loop_monitor.stop)
            self._start_relay(broker, stack)
            await self._work(
                WorkerEnvironment(
                    app=self._app,
                    options=self.options,
                    broker=broker,
                    backend=backend,
                    pools=pools,
                    health=self.health,
                    state=self._state,
                    info=self._describe(),
                ),
                connected,
            )
        if self._app.observers.heard(events.WorkerStopped):
            self._app.observers.emit(events.WorkerStopped(worker=self.options.name))

    def _start_relay(self, broker: Broker, stack: contextlib.AsyncExitStack) -> None:
        store = self._app.outbox_broker()
        if store is None:
            return
        relay = OutboxRelay(
            Outbox(store),
            broker,
            Outage(self.health, "tasks wait in the outbox", _RELAY_PAUSES),
            name=self.options.name,
            lease=self._app.conf.worker_lease,
        )
        relaying = asyncio.create_task(relay.run(), name="aiotaskq-relay")
        relaying.add_done_callback(_tell_failure)

        async def stop() -> None:
            relaying.cancel()
            await asyncio.wait([relaying])

        stack.push_async_callback(stop)

    async def _connect(
        self,
        broker: Broker,
        backend: ResultBackend | None,
        *,
        patient: bool,
        connected: asyncio.Future[None] | None,
    ) -> bool:
        """Open both drivers; False if told to stop first."""
        outage = Outage(self.health, "cannot begin", _RECONNECT)
        while not self._stopping.is_set():
            try:
                await broker.open()
                if backend is not None:
                    await backend.open()
            except Unavailable as error:
                if not patient:
                    raise
                _settle(connected)  # an application that embeds the worker starts all the same
                await self._rest(outage.pause(error))
            else:
                outage.over()
                return True
        return False

    async def _rest(self, seconds: float) -> None:
        """Sleep; return early if told to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _work(
        self, environment: WorkerEnvironment, connected: asyncio.Future[None] | None
    ) -> None:
        """Run one incarnation after another, until told to stop or nothing is left to do."""
        outage = Outage(self.health, "cannot begin to take tasks", _RECONNECT)
        told = False
        while not self._stopping.is_set():
            incarnation = Incarnation(environment, quota=self._quota, count_stuck=self._count_stuck)
            try:
                await incarnation.open()
                outage.over()
                _settle(connected)
                self._incarnation = incarnation
                self._tell_lease(incarnation.grant, held=True)
                if not told:
                    told = True
                    self._tell_ready()
                await self._serve(incarnation)
                self._stopping.set()
                await incarnation.finish(self.options.grace_period, self._hurry)
            except Unavailable as error:
                _settle(connected)
                await self._rest(outage.pause(error))
            except LeaseLost as lost:
                self.health.counts["lost"] += 1
                logger.error("%s. What runs here is given up; going on under a new lease", lost)
                await incarnation.abandon()
            except BaseException:  # a fault in the worker itself, or the loop ends
                await incarnation.abandon()
                raise
            finally:
                self._incarnation = None
                await incarnation.close()
                self._tell_lease(incarnation.grant, held=False)

    def _describe(self) -> WorkerInfo:
        return WorkerInfo(
            name=self.options.name,
            host=host_name(),
            pid=os.getpid(),
            started_at=time.time(),
            tasks=tuple(sorted(self._app.tasks)),
        )

    def _tell_lease(self, grant: Grant, *, held: bool) -> None:
        if self._on_lease is not None:
            self._on_lease(grant, held)

    def _count_stuck(self, count: int) -> None:
        """Have the process replaced when too many tasks do not end."""
        most = self._app.conf.worker_max_stuck_tasks
        if most is None or count < most:
            self.health.recover("stuck")
            return
        problem = f"{count} tasks do not end though they were told to"
        self.health.complain("stuck", problem)
        if self._replaceable and not self._stopping.is_set():
            self.recycle = problem
            self.stop()

    def _name_work(self, work: asyncio.Task[Any] | None) -> str:
        incarnation = self._incarnation
        return "" if incarnation is None else incarnation.describe(work)

    def _count_block(self) -> None:
        self.health.counts["blocked"] += 1

    async def _serve(self, incarnation: Incarnation) -> None:
        serving = asyncio.create_task(incarnation.serve())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            for task in (serving, stopping):
                task.cancel()
            await asyncio.wait([serving, stopping])

    def _tell_ready(self) -> None:
        logger.info("%s ready", self.options.name)
        if self._app.observers.heard(events.WorkerReady):
            self._app.observers.emit(events.WorkerReady(worker=self.options.name))


def _tell_failure(main: asyncio.Task[None]) -> None:
    """Log at once that an embedded worker failed; its error is raised only on exit."""
    error = None if main.cancelled() else main.exception()
    if error is not None:
        logger.error("the worker failed", exc_info=error)


def _settle(connected: asyncio.Future[None] | None) -> None:
    if connected is not None and not connected.done():
        connected.set_result(None)
