"""The executor: runs deliveries, from the bytes of a message to the call of the function.

::

    accept: decode ─ killer? ─ expired? ─ known? ─ slot? ─▶ run: arguments ─ context ─ call ─▶ end

Each delivery reaches exactly one method of `Endings`, or is handed back before it has started. The
steps before `run` are synchronous, so that a delivery is settled at once, or among those that run
or wait for a slot, when `accept` returns.

An execution that is cancelled, for any `Stop`, gets `task_cancel_grace` seconds to end. One that
does not end is *stuck*: its end is told for it, its slot is freed, and everything that it does from
then on is ignored. It stays in `_stuck` until it ends, so that a worker with too many of them can
be replaced. If its end is another attempt, that is told only when it has ended or the worker stops,
so that a task does not run twice at once; its delivery is held until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any

from msgspec import Raw

from aiotaskq import events, forks
from aiotaskq.context import TaskContext, enter
from aiotaskq.contract.message import Delivery, Message
from aiotaskq.contract.results import Transaction
from aiotaskq.errors import DecodeError, TimeLimitExceeded
from aiotaskq.middleware import wrap_run
from aiotaskq.readable import get_logger
from aiotaskq.tasks.option_table import Executor as ExecutorName
from aiotaskq.worker.census import Census
from aiotaskq.worker.completer import Completer
from aiotaskq.worker.endings import Endings
from aiotaskq.worker.environment import WorkerEnvironment
from aiotaskq.worker.execution import (
    Execution,
    ExecutionContext,
    OutcomeExists,
    Stop,
    UnwritableResult,
    starter,
)
from aiotaskq.worker.garbage import GarbageWatch, drop_tracebacks
from aiotaskq.worker.interrupt import as_coroutine, interruptible
from aiotaskq.worker.thread_call import ThreadCall
from aiotaskq.worker.waiting_room import WaitingRoom

logger = get_logger("aiotaskq.worker")

_CANCELLED_EARLY_FOR = 10.0  # seconds by which the news of a cancel may arrive before its task
_C_CODE = 1.0  # seconds for a cancelled function in a thread to return from C code
_LEAVE_WAIT = 0.1  # seconds for what is stuck to hear that nobody waits for it


class Executor:
    """Runs the deliveries of one consumer.

    Args:
        environment: The objects that all parts of the worker share.
        completer: Takes the tasks that have ended.
        census: The tasks that other workers know.
        slot_freed: Called each time that there is room for another delivery.
        pool_freed: Called when a thread or a process is free and nothing waits for it.
    """

    def __init__(
        self,
        environment: WorkerEnvironment,
        completer: Completer,
        census: Census,
        *,
        slot_freed: Callable[[], None],
        pool_freed: Callable[[ExecutorName], None],
    ) -> None:
        app = environment.app
        self._tasks = app.tasks
        self._effective = app.effective_options
        self._codec = app.codec
        self._observers = app.observers
        self._completer = completer
        self._pools = environment.pools
        self._health = environment.health
        self._state = environment.state
        self._worker = environment.options.name
        self._slot_freed = slot_freed
        self._pool_freed = pool_freed
        self._loop = asyncio.get_running_loop()
        self._start = starter(self._loop)
        self._generation = forks.generation
        # Not by id: a task may have been sent twice under one id, and run twice at once.
        self._running: set[Execution] = set()
        self._waiting = WaitingRoom()
        self._stuck: set[Execution] = set()
        self._cancelled_early: dict[str, float] = {}  # ids, and until when they count
        self._call = wrap_run(app.middlewares, self._call_function)
        self._plain = self._call == self._call_function  # no middleware to go through
        self._begin_transaction = completer.begin
        self._keeps_results = completer.keeps_results
        self._max_crashes = app.conf.max_crashes
        self._grace = app.conf.task_cancel_grace
        self._result_ttl = app.conf.result_expires
        self._end = Endings(environment, completer, census)
        self._garbage = GarbageWatch()

    @property
    def running(self) -> int:
        """The number of tasks that run now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of tasks that wait for a thread or a process."""
        return len(self._waiting)

    @property
    def held(self) -> int:
        """The number of tasks that run or wait."""
        return len(self._running) + len(self._waiting)

    def waiting_since(self) -> Mapping[ExecutorName, float]:
        """Return for each executor that tasks wait for since when the first one does."""
        return self._waiting.since() if self._waiting else {}

    @property
    def stuck(self) -> int:
        """The number of tasks that run on after they were cancelled, in threads as well."""
        calls = [execution.thread for execution in self._stuck]
        return sum(call is None or call.over for call in calls) + self._pools.stuck

    def describe(self, work: asyncio.Task[Any] | None) -> str:
        """Return the name and id of the task that an asyncio task runs; empty if it runs none."""
        for execution in [*self._running, *self._stuck]:
            if execution.work is work:
                return str(execution)
        return ""

    # Accept

    def accept(self, delivery: Delivery) -> ExecutorName | None:
        """Start a delivery, or settle it at once if it cannot be started. Never raises.

        Returns:
            The executor for which it has to wait; None: it does not wait.
        """
        try:
            message = self._codec.decode_message(delivery.body)
        except DecodeError as error:
            self._end.unread(delivery, error)
            return None
        if delivery.crashes >= self._max_crashes:
            self._end.killer(delivery, message)
            return None
        if delivery.expired or (self._cancelled_early and self._was_cancelled_early(delivery)):
            self._tell_received(message)
            self._end.revoked(delivery, message, "expired" if delivery.expired else "cancelled")
            return None
        task = self._tasks.get(message.task)
        if task is None:
            self._tell_received(message)
            self._end.unknown(delivery, message)
            return None
        options = self._effective(message.task).for_run(message)
        execution = Execution(delivery, message, task, options)
        if options.executor == "loop":
            self._begin(execution)
            return None
        if not self._waiting.has(options.executor) and self._pools.take(options.executor):
            execution.has_slot = True
            self._begin(execution)
            return None
        self._waiting.add(execution)
        return options.executor

    def _was_cancelled_early(self, delivery: Delivery) -> bool:
        return self._cancelled_early.get(delivery.id, -math.inf) > self._loop.time()

    def _fill(self, executor: ExecutorName) -> None:
        """Start what waits for an executor, as long as it has free slots."""
        while self._waiting.has(executor):
            if not self._pools.take(executor):
                return
            execution = self._waiting.next(executor)
            execution.has_slot = True
            self._begin(execution)
        if self._pools.has_free(executor):
            self._pool_freed(executor)

    def _begin(self, execution: Execution) -> None:
        self._tell_received(execution.message)
        self._running.add(execution)
        execution.work = self._start(self._run(execution))

    def _tell_received(self, message: Message) -> None:
        if self._observers.heard(events.Received):
            self._observers.emit(events.Received(message=message))

    def hand_back(self, executor: ExecutorName | None = None) -> Sequence[Execution]:
        """Give all that waits for an executor, or for any, back to its queues; return it.

        It has not started, so no observer has heard of it.
        """
        back = self._waiting.empty(executor)
        for execution in back:
            self._end.handed_back(execution)
        return back

    # Run

    async def _run(self, execution: Execution) -> None:
        try:
            execution.begun = True
            execution.work = execution.work or asyncio.current_task()  # if it was started at once
            if execution.stop is not None:
                self._end_stopped(execution)
                return
            # Its last worker died, or lost its lease: the outcome may be stored already.
            lost = execution.delivery.crashes or execution.delivery.crash_note
            if lost and (told := await self._completer.earlier(execution.message.id)):
                self._end.ended_before(execution, told)
                return
            try:
                args, kwargs = execution.task.arguments.load(
                    execution.message, execution.delivery.body
                )
            except Exception as error:
                self._end.misfit(execution, error)
                return
            context = ExecutionContext(
                execution,
                args,
                kwargs,
                state=self._state,
                worker=self._worker,
                begin=self._begin_transaction,
            )
            enter(context)
            if execution.options.executor == "process":  # its start is none of the task's time
                await self._pools.processes().prepare(execution.task)
            await self._run_in(context, execution)
        except asyncio.CancelledError:  # before its function was called
            if execution.stop is None:
                raise
            self._end_stopped(execution)
        except Exception as error:  # a fault of the worker: no exception of a task gets here
            self._end.fault(execution, error)
        finally:
            self._note_end(execution)

    def _note_end(self, execution: Execution) -> None:
        if execution.timers is not None:
            execution.stop_timers()
        if execution.has_slot:
            self._free_slot(execution)
        if self._stuck and execution in self._stuck:
            self._stuck.discard(execution)
            if execution.stop is Stop.ABANDON:
                self._health.refused([execution.message.id])
        else:
            self._running.discard(execution)
            self._slot_freed()
        self._garbage.note_end()

    def _free_slot(self, execution: Execution) -> None:
        executor = execution.options.executor
        execution.has_slot = False
        self._pools.give_back(executor)
        if self._waiting.has(executor):
            self._loop.call_soon(self._fill, executor)  # tasks that end at once would nest
        else:
            self._pool_freed(executor)

    async def _run_in(self, context: ExecutionContext, execution: Execution) -> None:
        if execution.options.track_started or self._observers.heard(events.Started):
            self._end.started(execution)
        execution.started = time.perf_counter()
        try:
            if execution.options.is_limited:
                execution.start_timers(self._loop, self._time_out)
            if self._plain and execution.timers is None and execution.options.executor == "loop":
                value = await execution.task.call(*context.args, **context.kwargs)
            else:
                value = await self._call(context)
            forks.end_child(self._generation)
            if context.verdict is not None:
                raise context.verdict
            encoded = execution.encode(value, self._codec, kept=self._keeps_results)
            if execution.transaction is not None:
                await self._commit(execution, execution.transaction, encoded)
        except BaseException as error:  # SystemExit included: it ends the task only
            forks.end_child(self._generation, error)
            if execution.transaction is not None:
                # The function has ended, so a soft limit that passes now, or a cancellation of its
                # own that arrives late, changes nothing: its end has to be told.
                with contextlib.suppress(asyncio.CancelledError):
                    await execution.transaction.roll_back()
            judged = context.judge(error)
            self._end_raised(execution, judged)
            drop_tracebacks(judged)
        else:
            if execution.may_succeed:
                self._end.succeeded(execution, value, encoded)
            else:
                self._end_stopped(execution)

    async def _commit(self, execution: Execution, transaction: Transaction, encoded: Raw) -> None:
        """Commit the writes of a task and its outcome together, or neither."""
        if not execution.may_succeed:  # the function has hidden its cancellation
            await transaction.roll_back()
            return
        if not await transaction.commit(self._end.success(execution, encoded), self._result_ttl):
            raise OutcomeExists

    def _end_raised(self, execution: Execution, error: BaseException) -> None:
        if execution.stop is not None:  # whatever the function raised instead of its cancellation
            self._end_stopped(execution, error)
        elif execution.softened and isinstance(error, asyncio.CancelledError):
            self._end.raised(execution, execution.soft_error())  # in middleware
        elif isinstance(error, OutcomeExists):
            self._end.outcome_exists(execution)
        elif isinstance(error, UnwritableResult) and isinstance(error.__cause__, Exception):
            self._end.misfit(execution, error.__cause__)
        else:
            self._end.raised(execution, error)

    async def _call_function(self, context: TaskContext) -> Any:
        assert isinstance(context, ExecutionContext)  # middleware passes on the one it got
        execution = context.execution
        executor = execution.options.executor
        if executor == "process":
            return await self._pools.processes().run(
                execution.task,
                execution.delivery.body,
                execution.options.soft_timeout,
                keeps_result=self._keeps_results and not execution.options.ignore_result,
            )
        if executor == "thread":
            execution.thread = ThreadCall(execution.task.call, context.args, context.kwargs)
            value = await self._pools.threads().call(
                execution.thread, lambda: self._interruption(execution)
            )
            if not isawaitable(value):
                return value
            # A plain function around a coroutine function has returned its coroutine.
            execution.thread = None
            return await self._run_coroutine(execution, as_coroutine(value))
        body = execution.task.call(*context.args, **context.kwargs)
        return await self._run_coroutine(execution, body)

    async def _run_coroutine(self, execution: Execution, body: Coroutine[Any, Any, Any]) -> Any:
        if execution.options.soft_timeout is None:
            return await body
        return await interruptible(body, execution.take_soft_error)

    # Stop

    def _time_out(self, execution: Execution) -> None:
        self._cancel(execution, Stop.TIMEOUT)

    def _interruption(self, execution: Execution) -> Callable[[], BaseException] | None:
        """Return what is raised in a thread whose execution is cancelled; None: give it up."""
        if execution.stop is None or execution not in self._running:  # the loop or the worker ends
            return None
        if execution.stop is Stop.TIMEOUT:
            return execution.hard_error
        return asyncio.CancelledError

    def _end_stopped(self, execution: Execution, error: BaseException | None = None) -> None:
        """Tell the end of an execution that this worker cancelled, unless it was abandoned."""
        if execution.stop is Stop.RELEASE:
            self._end.released(execution)
        elif execution.stop is Stop.TIMEOUT:
            late = execution.hard_error()
            if execution.thread is not None and isinstance(error, TimeLimitExceeded):
                late = error  # it was raised there
            else:
                late.__cause__ = error  # its traceback shows where the function was
            self._end.raised(execution, late)
        elif execution.stop is Stop.REVOKE:
            self._end.revoked(execution.delivery, execution.message, "cancelled")
        elif execution in self._running:
            logger.warning("Task %s given up", execution)

    def revoke(self, ids: Iterable[str]) -> None:
        """Cancel the tasks among these that run here."""
        now = self._loop.time()
        if self._cancelled_early:
            self._cancelled_early = {
                name: end for name, end in self._cancelled_early.items() if end > now
            }
        wanted = frozenset(ids)
        if not wanted:
            return
        # A delivery that was fetched at about the same time may still be on its way here.
        self._cancelled_early.update(dict.fromkeys(wanted, now + _CANCELLED_EARLY_FOR))
        for execution in [
            execution for execution in self._running if execution.delivery.id in wanted
        ]:
            self._cancel(execution, Stop.REVOKE)
        for execution in self._waiting.remove(wanted):
            self._tell_received(execution.message)
            self._end.revoked(execution.delivery, execution.message, "cancelled")
            self._slot_freed()

    async def release(self) -> None:
        """Cancel all that runs, for other workers to run, and wait for it to end.

        Executions that do not end within the grace period are released all the same; their outcomes
        will be refused.
        """
        await self._cancel_all(Stop.RELEASE)
        for execution in list(self._running):
            self._give_up(execution)
        for execution in self._stuck:
            if execution.stop is not Stop.ABANDON:  # its next attempt waits for it
                self._end_stopped(execution)
                execution.stop = Stop.ABANDON
        await self._leave()

    async def abandon(self) -> None:
        """Cancel all that runs and tell no ends: other workers have the tasks."""
        self._waiting.empty()
        for execution in self._stuck:
            execution.stop = Stop.ABANDON
        await self._cancel_all(Stop.ABANDON)
        for execution in list(self._running):
            self._give_up(execution)
        await self._leave()

    async def _leave(self) -> None:
        """Wait no longer for what is stuck. Nothing of it is told any more."""
        works = [execution.work for execution in self._stuck if execution.work is not None]
        self._stuck.clear()
        for work in works:
            work.cancel()
        if works:
            await asyncio.wait(works, timeout=_LEAVE_WAIT)

    async def _cancel_all(self, stop: Stop) -> None:
        for execution in list(self._running):
            self._cancel(execution, stop)
        soon = min(_C_CODE, self._grace)
        for seconds in (soon, self._grace - soon):
            works = [one.work for one in self._running if one.work is not None]
            if works:
                await asyncio.wait(works, timeout=seconds)
            for execution in list(self._running):
                self._give_up_unheard(execution)

    def _cancel(self, execution: Execution, stop: Stop) -> None:
        first = execution.stop is None
        execution.stop = stop if execution.stop is None else max(execution.stop, stop)
        # One that has not begun is not cancelled: its coroutine would never be entered, and nothing
        # would settle the delivery. It looks at `stop` first.
        if execution.begun and execution.work is not None:
            execution.work.cancel()
        if first and stop in (Stop.TIMEOUT, Stop.REVOKE):
            later, soon = self._grace, min(_C_CODE, self._grace)
            timers = [self._loop.call_later(later, self._give_up, execution)]
            if execution.thread is not None:
                timers.append(self._loop.call_later(soon, self._give_up_unheard, execution))
            execution.timers = [*(execution.timers or ()), *timers]

    def _give_up_unheard(self, execution: Execution) -> None:
        """Give up a function in a thread that runs C code, and so does not even begin to end."""
        if execution.thread is not None and execution.thread.unheard:
            self._give_up(execution)

    def _give_up(self, execution: Execution) -> None:
        """Tell the end of an execution that does not end, and free its slot.

        Another attempt is not stored yet: it might run while this one goes on.
        """
        if execution not in self._running:
            return
        held = execution.stop is Stop.TIMEOUT and self._end.retries(
            execution, execution.hard_error()
        )
        if not held:
            self._end_stopped(execution)
            execution.stop = Stop.ABANDON
        self._running.discard(execution)
        self._stuck.add(execution)
        if execution.thread is not None:
            self._pools.threads().give_up(execution.thread)
        if execution.has_slot:
            self._free_slot(execution)
        self._end.stuck(execution, held=held)
        self._slot_freed()
