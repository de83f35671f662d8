"""Runs deliveries: from the message's bytes to the call of the function, within its limits.

::

    accept: decode ─ killer? ─ expired? ─ known? ─▶ run: arguments ─ slot ─ context ─ call ─▶ end

What came of it is told to `Endings`. A run that is cancelled, for whatever reason, gets
`task_cancel_grace` seconds to end; one that does not is stuck: its end is told for it, its slot is
freed, and whatever it still does is ignored.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any, TypeAlias

from msgspec import Raw

from aiotaskq import events
from aiotaskq.context import State, TaskContext, enter
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.results import Transaction
from aiotaskq.errors import DecodeError, SoftTimeLimitExceeded, TimeLimitExceeded
from aiotaskq.middleware import wrap_run
from aiotaskq.tasks.application import Application
from aiotaskq.worker.completer import Completer
from aiotaskq.worker.endings import Endings
from aiotaskq.worker.execution import Execution, ExecutionContext, Outdone, Profile, Stop
from aiotaskq.worker.health import Health
from aiotaskq.worker.interrupt import interruptible
from aiotaskq.worker.pools import Pools

logger = logging.getLogger("aiotaskq.worker")

_Start: TypeAlias = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]

_OVERTAKING = 10.0  # seconds by which the news of a cancelling may overtake the task itself


class Executor:
    """Runs deliveries of one consumer.

    Args:
        ended: Called each time a slot becomes free.
        known_elsewhere: Queues and names of tasks that other workers serve and know.
    """

    def __init__(
        self,
        app: Application,
        completer: Completer,
        pools: Pools,
        health: Health,
        *,
        state: State,
        worker: str,
        ended: Callable[[], None],
        known_elsewhere: Collection[tuple[str, str]] = (),
    ) -> None:
        self._app = app
        self._codec = app.codec
        self._conf = app.conf
        self._observers = app.observers
        self._completer = completer
        self._pools = pools
        self._health = health
        self._state = state
        self._worker = worker
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._start = _starter(self._loop)
        self._running: set[Execution] = (
            set()
        )  # not by id: one may be sent twice and run twice at once
        self._stuck: set[Execution] = set()
        self._profiles: dict[str, Profile] = {}
        self._overtaken: dict[str, float] = {}  # cancelled ids, and until when they count
        self._call = wrap_run(app.middlewares, self._call_function)
        self._plain = self._call == self._call_function  # no middleware to go through
        self._begin = completer.begin
        self._max_crashes = app.conf.max_crashes
        self._grace = app.conf.task_cancel_grace
        self._end = Endings(
            app,
            completer,
            health,
            worker=worker,
            profile=self._profile,
            known_elsewhere=known_elsewhere,
        )

    @property
    def running(self) -> int:
        """How many tasks run now."""
        return len(self._running)

    @property
    def stuck(self) -> int:
        """How many tasks go on though they were told to end, threads included."""
        return len(self._stuck) + self._pools.stuck

    def describe(self, work: asyncio.Task[Any] | None) -> str:
        """Return the name and id of the task that an asyncio task runs; empty if it runs none."""
        for run in [*self._running, *self._stuck]:
            if run.work is work:
                return str(run)
        return ""

    def _profile(self, name: str) -> Profile:
        profile = self._profiles.get(name)
        if profile is None:
            task = self._app.tasks.get(name)
            profile = Profile(task, self._conf)
            if task is not None:  # other names are anything that anybody sends
                self._profiles[name] = profile
        return profile

    # Accept

    def accept(self, delivery: Delivery) -> None:
        """Start a delivery, or settle it at once if it cannot be started. Never raises."""
        try:
            message = self._codec.decode_message(delivery.body)
        except DecodeError as error:
            self._end.unread(delivery, error)
            return
        if delivery.crashes >= self._max_crashes:
            self._end.killer(delivery, message)
            return
        if self._observers.heard(events.Received):
            self._observers.emit(events.Received(message=message))
        if delivery.expired or (self._overtaken and delivery.id in self._overtaken):
            self._end.revoked(delivery, message, "expired" if delivery.expired else "cancelled")
            return
        task = self._app.tasks.get(message.task)
        if task is None:
            self._end.unknown(delivery, message)
            return
        profile = self._profiles.get(message.task) or self._profile(message.task)
        run = Execution(delivery, message, task, profile)
        self._running.add(run)
        run.work = self._start(self._run(run))

    # Run

    async def _run(self, run: Execution) -> None:
        try:
            run.begun = True
            run.work = run.work or asyncio.current_task()  # if it was started at once
            if run.stop is not None:
                self._end_stopped(run)
                return
            # Whose worker died, or lost its lease: its end may be stored, and not settled.
            lost = run.delivery.crashes or run.delivery.crash_note
            if lost and (told := await self._completer.earlier(run.message.id)):
                self._end.ended_before(run, told)
                return
            try:
                args, kwargs = run.task.arguments.load(run.message, run.delivery.body)
            except Exception as error:
                self._end.misfit(run, error)
                return
            context = ExecutionContext(
                run.message, args, kwargs, state=self._state, worker=self._worker
            )
            context.run = run
            context.begin = self._begin
            enter(context)
            if run.task.options.executor == "loop":
                await self._run_in(context, run)
            else:
                async with self._pools.slot(run.task.options.executor):
                    await self._run_in(context, run)
        except asyncio.CancelledError:  # before its function was called
            if run.stop is None:
                raise
            self._end_stopped(run)
        except Exception as error:  # nothing a task does gets here
            self._end.fault(run, error)
        finally:
            if run.timers is not None:
                self._stop_timers(run)
            if self._stuck and run in self._stuck:
                self._stuck.discard(run)
                self._health.refused([run.message.id])
            else:
                self._running.discard(run)
                self._ended()

    async def _run_in(self, context: ExecutionContext, run: Execution) -> None:
        if run.profile.tracks_start or self._observers.heard(events.Started):
            self._end.started(run)
        run.started = time.perf_counter()
        try:
            if run.limited:
                self._start_timers(run)
            if self._plain and run.timers is None and run.task.options.executor == "loop":
                value = await run.task.call(*context.args, **context.kwargs)
            else:
                value = await self._call(context)
            encoded = value if type(value) is Raw else self._codec.encode_result(value)
            if run.transaction is not None:
                await self._commit(run, run.transaction, encoded)
        except BaseException as error:  # SystemExit included: it ends the task only
            if run.transaction is not None:
                await run.transaction.roll_back()
            self._end_raised(run, error)
        else:
            if run.may_succeed:
                self._end.succeeded(run, value, encoded)
            else:
                self._end_stopped(run)

    async def _commit(self, run: Execution, transaction: Transaction, encoded: Raw) -> None:
        """Commit what a task wrote together with its success, or neither."""
        if not run.may_succeed:  # it has hidden that it was cancelled
            await transaction.roll_back()
            return
        if not await transaction.commit(self._end.success(run, encoded), self._conf.result_expires):
            raise Outdone

    def _end_raised(self, run: Execution, error: BaseException) -> None:
        if run.stop is not None:  # whatever it made of its cancellation
            self._end_stopped(run, error)
        elif run.softened and isinstance(error, asyncio.CancelledError):
            self._end.raised(run, self._soft_error(run))  # outside the function, in middleware
        elif isinstance(error, Outdone):
            self._end.outdone(run)
        else:
            self._end.raised(run, error)

    async def _call_function(self, context: TaskContext) -> Any:
        assert isinstance(context, ExecutionContext)  # middleware passes on the one it got
        run = context.run
        executor = run.task.options.executor
        if executor == "process":
            return await self._pools.processes().run(run.task, run.delivery.body, run.soft_timeout)
        if executor == "thread":
            return await self._pools.threads().call(run.task.call, *context.args, **context.kwargs)
        coroutine = run.task.call(*context.args, **context.kwargs)
        if run.soft_timeout is None:
            return await coroutine
        return await interruptible(coroutine, lambda: self._take_soft_error(run))

    # Limits

    def _start_timers(self, run: Execution) -> None:
        timeout, soft = run.timeout, run.soft_timeout
        run.timers = []
        if timeout is not None:
            run.timers.append(self._loop.call_later(timeout, self._time_out, run))
        if soft is not None and run.task.options.executor == "loop":
            run.timers.append(self._loop.call_later(soft, self._soften, run))

    def _stop_timers(self, run: Execution) -> None:
        for timer in run.timers or ():
            timer.cancel()

    def _time_out(self, run: Execution) -> None:
        self._cancel(run, Stop.TIMEOUT)

    def _soften(self, run: Execution) -> None:
        if run.stop is None and run.work is not None:
            run.softened = True
            run.work.cancel()

    def _take_soft_error(self, run: Execution) -> BaseException | None:
        """Return what to raise in a function that is cancelled, if it is for its soft limit."""
        if not run.softened or run.stop is not None:
            return None
        run.softened = False
        assert run.work is not None  # it is what was cancelled
        run.work.uncancel()
        return self._soft_error(run)

    def _soft_error(self, run: Execution) -> SoftTimeLimitExceeded:
        return SoftTimeLimitExceeded(
            f"it ran longer than its soft_timeout of {run.soft_timeout:g} s"
        )

    # Stop

    def _end_stopped(self, run: Execution, error: BaseException | None = None) -> None:
        """End a run that this worker cancelled; one that was taken away needs nothing more."""
        if run.stop is Stop.RELEASE:
            self._end.released(run)
        elif run.stop is Stop.TIMEOUT:
            late = TimeLimitExceeded(f"it ran longer than its timeout of {run.timeout:g} s")
            late.__cause__ = error  # it shows where it was
            self._end.raised(run, late)
        elif run.stop is Stop.REVOKE:
            self._end.revoked(run.delivery, run.message, "cancelled")
        elif run not in self._stuck:
            logger.warning("Task %s given up", run)

    def revoke(self, ids: Iterable[str]) -> None:
        """Cancel those of these tasks that run here."""
        now = self._loop.time()
        if self._overtaken:
            self._overtaken = {name: end for name, end in self._overtaken.items() if end > now}
        wanted = frozenset(ids)
        if not wanted:
            return
        # What was fetched at about the same time may still be on its way here.
        self._overtaken.update(dict.fromkeys(wanted, now + _OVERTAKING))
        for run in [run for run in self._running if run.delivery.id in wanted]:
            self._cancel(run, Stop.REVOKE)

    async def release(self) -> None:
        """Cancel what runs, for other workers to run, and wait for it to end.

        What does not end within the grace is released all the same; its outcome will be refused.
        """
        await self._cancel_all(Stop.RELEASE)
        for run in list(self._running):
            self._give_up(run)

    async def abandon(self) -> None:
        """Cancel what runs and forget it: it was given to others."""
        await self._cancel_all(Stop.ABANDON)

    async def _cancel_all(self, stop: Stop) -> None:
        works = []
        for run in list(self._running):
            self._cancel(run, stop)
            if run.work is not None:
                works.append(run.work)
        if works:
            await asyncio.wait(works, timeout=self._grace)

    def _cancel(self, run: Execution, stop: Stop) -> None:
        first = run.stop is None
        run.stop = stop if run.stop is None else max(run.stop, stop)
        # One that has not begun is not cancelled: its coroutine would never be entered and
        # nothing would settle it. It sees `stop` first thing.
        if run.begun and run.work is not None:
            run.work.cancel()
        if first and stop in (Stop.TIMEOUT, Stop.REVOKE):
            timer = self._loop.call_later(self._grace, self._give_up, run)
            run.timers = [*(run.timers or ()), timer]

    def _give_up(self, run: Execution) -> None:
        """Tell the end of a run that does not end, and free its slot."""
        if run not in self._running:
            return
        self._end_stopped(run)
        run.stop = Stop.ABANDON
        self._running.discard(run)
        self._stuck.add(run)
        self._end.stuck(run)
        self._ended()


def _starter(loop: asyncio.AbstractEventLoop) -> _Start:
    """Return what starts a coroutine as a task: at once where Python can, else at the next turn.

    What ends without having waited for anything costs less then. A task factory of the
    application's goes first.
    """
    if sys.version_info < (3, 12) or loop.get_task_factory() is not None:
        return loop.create_task

    def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.Task(coroutine, loop=loop, eager_start=True)

    return start
