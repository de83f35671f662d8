"""One delivery → one settlement, and the outcome that goes before it.

::

    accept: decode ─ killer? ─ expired? ─ known? ─▶ run: arguments ─ context ─ call ─▶ end:
                │        │         │        │                │                  │      outcome,
               Dead     Dead    REVOKED  Again, Dead      FAILURE        SUCCESS, RETRY,  settlement
                                                                      FAILURE, REVOKED, Release
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from enum import IntEnum, auto
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from aiotaskq import events
from aiotaskq.context import State, TaskContext, enter
from aiotaskq.errors import AioTaskQError, DecodeError, UnknownTask
from aiotaskq.failures import describe, encode_error, rebuild
from aiotaskq.message import (
    Again,
    Dead,
    Delivery,
    Done,
    Envelope,
    Message,
    Outcome,
    Release,
    TaskStatus,
)
from aiotaskq.middleware import wrap_run
from aiotaskq.retry import for_call, retry_delay
from aiotaskq.task import Task
from aiotaskq.worker.application import Application
from aiotaskq.worker.completer import Completer
from aiotaskq.worker.pools import Pools
from aiotaskq.worker.processes import RemoteFailure

logger = logging.getLogger("aiotaskq.worker")

_UNKNOWN_PAUSE = 10.0  # seconds before an unknown task is offered to the workers again
_NULL = Raw(b"null")
_EMPTY_LIST = Raw(b"[]")
_EMPTY_MAP = Raw(b"{}")


class _Stop(IntEnum):
    """Why a running task was cancelled by this worker. A higher one goes before a lower one."""

    RELEASE = auto()  # the worker stops: another one is to run it
    REVOKE = auto()  # somebody cancelled the task
    ABANDON = auto()  # the lease is lost: another worker has it


class _Run:
    """A task that runs."""

    __slots__ = ("begun", "delivery", "message", "started", "stop", "task", "work")

    def __init__(self, delivery: Delivery, message: Message, task: Task[Any, Any]) -> None:
        self.delivery = delivery
        self.message = message
        self.task = task
        self.started = time.perf_counter()
        self.begun = False
        self.stop: _Stop | None = None
        self.work: asyncio.Task[None] | None = None


class _RunContext(TaskContext):
    """The context of a run, with the run itself for the innermost step of the onion."""

    __slots__ = ("run",)

    run: _Run


class TimedOut(AioTaskQError, TimeoutError):
    """A task ran longer than its timeout."""


class Executor:
    """Runs deliveries of one consumer.

    Args:
        ended: Called each time a slot becomes free.
    """

    def __init__(
        self,
        app: Application,
        completer: Completer,
        pools: Pools,
        *,
        state: State,
        worker: str,
        ended: Callable[[], None],
    ) -> None:
        self._app = app
        self._codec = app.codec
        self._conf = app.conf
        self._observers = app.observers
        self._completer = completer
        self._pools = pools
        self._state = state
        self._worker = worker
        self._ended = ended
        self._running: set[_Run] = set()  # not by id: one may be sent twice and run twice at once
        self._call = wrap_run(app.middlewares, self._call_function)
        self._plain = self._call == self._call_function  # no middleware to go through
        self._max_crashes = app.conf.max_crashes
        self._keeps_arguments = completer.wants_arguments or app.conf.result_extended

    @property
    def running(self) -> int:
        """How many tasks run now."""
        return len(self._running)

    # Accept

    def accept(self, delivery: Delivery) -> None:
        """Start a delivery, or settle it at once if it cannot be started. Never raises."""
        try:
            message = self._codec.decode_message(delivery.body)
        except DecodeError as error:
            self._bury_unread(delivery, error)
            return
        if delivery.crashes >= self._max_crashes:
            self._bury_killer(delivery, message)
            return
        if self._observers.heard(events.Received):
            self._observers.emit(events.Received(message=message))
        if delivery.expired:
            self._end_revoked(delivery, message, "expired")
            return
        task = self._app.tasks.get(message.task)
        if task is None:
            self._put_back_unknown(delivery, message)
            return
        run = _Run(delivery, message, task)
        self._running.add(run)
        run.work = asyncio.create_task(self._run(run))

    def _bury(self, delivery: Delivery, reason: str, outcome: Outcome | None) -> None:
        name = delivery.id or "without an id"
        logger.error("message %s goes to the dead letters: %s", name, reason)
        self._completer.add(Dead(delivery, reason), outcome)
        if self._observers.heard(events.Buried):
            self._observers.emit(
                events.Buried(task_id=delivery.id, queue=delivery.queue, reason=reason)
            )

    def _bury_unread(self, delivery: Delivery, error: DecodeError) -> None:
        outcome = None
        if delivery.id:  # whoever waits for it is told, though nothing else is known of it
            unread = Message(id=delivery.id, task="", queue=delivery.queue)
            outcome = self._outcome(unread, TaskStatus.FAILURE, describe(error)[0])
        self._bury(delivery, str(error), outcome)

    def _bury_killer(self, delivery: Delivery, message: Message) -> None:
        """End what worker after worker died of, before anything of it runs here as well."""
        died = delivery.crashes
        reason = "a worker" if died == 1 else f"{died} workers"
        reason += " died while running it"
        error = encode_error("WorkerLost", reason)
        self._bury(delivery, reason, self._outcome(message, TaskStatus.FAILURE, error))

    def _put_back_unknown(self, delivery: Delivery, message: Message) -> None:
        """Leave a task for a worker that knows it: one may be on its way, in a rolling deploy."""
        now = time.time()
        since = message.unknown_since or now
        if now - since >= self._conf.unknown_task_ttl:
            reason = f"no worker has had a task {message.task!r} for {now - since:.0f} s"
            error = encode_error(UnknownTask.__name__, reason)
            self._bury(delivery, reason, self._outcome(message, TaskStatus.FAILURE, error))
            return
        logger.error(
            "task %s[%s] is unknown here; it goes back for a worker that knows it, and in"
            " %.0f s to the dead letters. Known are: %s",
            message.task,
            message.id,
            since + self._conf.unknown_task_ttl - now,
            ", ".join(sorted(self._app.tasks)) or "none",
        )
        marked = msgspec.structs.replace(message, unknown_since=since)
        pause = min(_UNKNOWN_PAUSE, self._conf.unknown_task_ttl)
        self._completer.add(Again(delivery, self._envelope(delivery, marked, now + pause)))

    def _envelope(self, delivery: Delivery, message: Message, not_before: float) -> Envelope:
        return Envelope(
            id=message.id,
            queue=delivery.queue,
            body=self._codec.encode_again(message, delivery.body),
            priority=message.priority,
            not_before=not_before,
            expires_at=message.expires_at,
        )

    # Run

    async def _run(self, run: _Run) -> None:
        try:
            run.begun = True
            if run.stop is not None:
                self._end_stopped(run)
                return
            try:
                args, kwargs = run.task.arguments.load(run.message, run.delivery.body)
            except Exception as error:  # trying again would read the same bytes
                self._end_failed(run, error, may_retry=False)
                return
            context = _RunContext(run.message, args, kwargs, state=self._state, worker=self._worker)
            context.run = run
            enter(context)
            if run.task.options.executor == "loop":
                await self._run_in(context, run)
            else:
                await self._run_in_pool(context, run)
        except Exception as error:
            # Nothing a task does gets here: this is a fault of the worker's own. It would fail
            # another worker as well, so the delivery is kept and not handed on.
            logger.exception("the worker failed at %s[%s]", run.message.task, run.message.id)
            result, traceback = describe(error)
            outcome = self._outcome(run.message, TaskStatus.FAILURE, result, traceback=traceback)
            self._bury(run.delivery, f"the worker failed at it: {error}", outcome)
        finally:
            self._running.discard(run)
            self._ended()

    async def _run_in_pool(self, context: _RunContext, run: _Run) -> None:
        try:
            async with self._pools.slot(run.task.options.executor):
                await self._run_in(context, run)
        except asyncio.CancelledError:  # while it waited: what happens later is handled inside
            if run.stop is None:
                raise
            self._end_stopped(run)

    async def _run_in(self, context: _RunContext, run: _Run) -> None:
        if self._observers.heard(events.Started):
            self._observers.emit(events.Started(message=run.message))
        if self._tracks_start(run.task):
            self._completer.add(None, self._outcome(run.message, TaskStatus.STARTED, _NULL))
        run.started = time.perf_counter()
        try:
            timeout = self._timeout(run)
            if timeout is not None:
                value = await self._call_in_time(context, timeout)
            elif self._plain and run.task.options.executor == "loop":
                value = await run.task.fn(*context.args, **context.kwargs)
            else:
                value = await self._call(context)
            encoded = value if type(value) is Raw else self._codec.encode_result(value)
        except BaseException as error:  # SystemExit included: it ends the task only
            if run.stop is None:
                self._end_failed(run, error)
            else:  # whatever it made of its cancellation
                self._end_stopped(run)
        else:
            if run.stop in (None, _Stop.RELEASE):  # it may have finished in spite of a release
                self._end_succeeded(run, value, encoded)
            else:
                self._end_stopped(run)

    def _timeout(self, run: _Run) -> float | None:
        if run.message.timeout is not None:
            return run.message.timeout
        own = run.task.options.timeout
        return self._conf.task_time_limit if own is None else own

    async def _call_in_time(self, context: TaskContext, timeout: float) -> Any:
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await self._call(context)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimedOut(f"it ran longer than its timeout of {timeout:g} s") from error

    async def _call_function(self, context: TaskContext) -> Any:
        assert isinstance(context, _RunContext)  # middleware passes on the one it got
        run = context.run
        executor = run.task.options.executor
        if executor == "loop":
            return await run.task.fn(*context.args, **context.kwargs)
        if executor == "process":
            return await self._pools.processes().run(run.task, run.delivery.body)
        return await self._pools.threads().call(run.task.fn, *context.args, **context.kwargs)

    # End

    def _end_succeeded(self, run: _Run, value: Any, encoded: Raw) -> None:
        took = time.perf_counter() - run.started
        outcome = self._outcome(run.message, TaskStatus.SUCCESS, encoded, took=took)
        self._completer.add(Done(run.delivery), outcome)
        if self._observers.heard(events.Succeeded):
            if type(value) is Raw:
                value = self._codec.decode_result(value)
            self._observers.emit(
                events.Succeeded(message=run.message, value=value, execution_time=took)
            )

    def _end_failed(self, run: _Run, error: BaseException, *, may_retry: bool = True) -> None:
        took = time.perf_counter() - run.started
        if isinstance(error, RemoteFailure):
            result, traceback = error.error, error.traceback
            error = rebuild(result, run.message.id, traceback)
        else:
            result, traceback = describe(error)
        delay = self._retry_delay(run, error) if may_retry else None
        if delay is not None:
            self._retry(run, error, delay, result, traceback)
            return
        outcome = self._outcome(
            run.message, TaskStatus.FAILURE, result, traceback=traceback, took=took
        )
        self._completer.add(Done(run.delivery), outcome)
        if self._observers.heard(events.Failed):
            self._observers.emit(
                events.Failed(
                    message=run.message, error=error, traceback=traceback, execution_time=took
                )
            )

    def _retry_delay(self, run: _Run, error: BaseException) -> float | None:
        retry = run.task.options.retry
        if run.message.retry is not None:
            retry = for_call(run.message.retry, retry)
        if retry.max_attempts == 1:
            return None
        try:
            return retry_delay(retry, run.message.attempt, error)
        except Exception:  # a backoff function of the user's
            logger.exception("the backoff of %s failed; it is not retried", run.message.task)
            return None

    def _retry(
        self, run: _Run, error: BaseException, delay: float, result: Raw, traceback: str
    ) -> None:
        message = msgspec.structs.replace(
            run.message, attempt=run.message.attempt + 1, unknown_since=None
        )
        self._completer.add(
            Again(run.delivery, self._envelope(run.delivery, message, time.time() + delay)),
            self._outcome(run.message, TaskStatus.RETRY, result, traceback=traceback),
        )
        if self._observers.heard(events.Retried):
            self._observers.emit(events.Retried(message=run.message, error=error, delay=delay))

    def _end_stopped(self, run: _Run) -> None:
        """End a run that this worker cancelled; one that was taken away needs nothing more."""
        if run.stop is _Stop.RELEASE:
            self._completer.add(Release(run.delivery))
            if self._observers.heard(events.Released):
                self._observers.emit(events.Released(message=run.message))
        elif run.stop is _Stop.REVOKE:
            self._end_revoked(run.delivery, run.message, "cancelled")
        else:
            logger.warning("Task %s[%s] given up", run.message.task, run.message.id)

    def _end_revoked(self, delivery: Delivery, message: Message, why: str) -> None:
        error = encode_error("TaskRevoked", why)
        self._completer.add(Done(delivery), self._outcome(message, TaskStatus.REVOKED, error))
        if self._observers.heard(events.Revoked):
            self._observers.emit(events.Revoked(message=message))

    def _outcome(
        self,
        message: Message,
        status: TaskStatus,
        result: Raw,
        *,
        traceback: str | None = None,
        took: float | None = None,
    ) -> Outcome | None:
        if self._ignores_result(message.task):
            return None
        return Outcome(
            task_id=message.id,
            status=status,
            result=result,
            traceback=traceback,
            date_done=datetime.now(UTC),
            name=message.task or None,
            worker=self._worker,
            queue=message.queue,
            retries=message.attempt - 1,
            execution_time=took,
            args=self._shown(message.args, message, _EMPTY_LIST),
            kwargs=self._shown(message.kwargs, message, _EMPTY_MAP),
        )

    def _ignores_result(self, name: str) -> bool:
        task = self._app.tasks.get(name)
        own = None if task is None else task.options.ignore_result
        return self._conf.task_ignore_result if own is None else own

    def _tracks_start(self, task: Task[Any, Any]) -> bool:
        own = task.options.track_started
        return self._conf.task_track_started if own is None else own

    def _shown(self, raw: Raw, message: Message, empty: Raw) -> Raw | msgspec.UnsetType:
        """Return arguments as JSON, for a store that keeps them beside the result."""
        if not self._keeps_arguments or message.pickled is not None:
            return UNSET
        encoded = bytes(raw)
        if not encoded:
            return empty
        if encoded[:1] in b"[{":
            return raw
        try:
            return Raw(msgspec.json.encode(msgspec.msgpack.decode(encoded)))
        except (ValueError, TypeError):  # MessagePack has keys that JSON has not
            return UNSET

    # Stop

    def revoke(self, ids: Iterable[str]) -> None:
        """Cancel those of these tasks that run here."""
        wanted = frozenset(ids)
        for run in [run for run in self._running if run.delivery.id in wanted] if wanted else ():
            self._cancel(run, _Stop.REVOKE)

    async def release(self, wait: float) -> None:
        """Cancel what runs, for other workers to run, and wait for it to end.

        What does not end within `wait` seconds is released all the same; its outcome will be
        refused.
        """
        await self._cancel_all(_Stop.RELEASE, wait)
        for run in self._running:
            if run.stop is _Stop.RELEASE:
                self._completer.add(Release(run.delivery))
            elif run.stop is _Stop.REVOKE:
                self._end_revoked(run.delivery, run.message, "cancelled")
            run.stop = _Stop.ABANDON

    async def abandon(self, wait: float) -> None:
        """Cancel what runs and forget it: it was given to others."""
        await self._cancel_all(_Stop.ABANDON, wait)

    async def _cancel_all(self, stop: _Stop, wait: float) -> None:
        works = []
        for run in list(self._running):
            self._cancel(run, stop)
            if run.work is not None:
                works.append(run.work)
        if works:
            await asyncio.wait(works, timeout=wait)

    def _cancel(self, run: _Run, stop: _Stop) -> None:
        run.stop = stop if run.stop is None else max(run.stop, stop)
        # One that has not begun is not cancelled: its coroutine would never be entered and
        # nothing would settle it. It sees `stop` first thing.
        if run.begun and run.work is not None:
            run.work.cancel()
