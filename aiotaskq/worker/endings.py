"""The ends of deliveries: for each end the outcome to store and the settlement that follows it.

Each delivery that is accepted reaches exactly one of the methods of `Endings`:

==============================  ==================  =====================================
the task                        outcome             settlement
==============================  ==================  =====================================
returned                        SUCCESS             `Done`
raised, and may try again       RETRY               `Again`, later, as another attempt
raised for good                 FAILURE             `Dead` if it was tried before, or `Done`
asked to be put off             RETRY               `Again`, later, as the same attempt
rejected its task               FAILURE             `Dead`
was cancelled, or had expired   REVOKED             `Done`
killed worker after worker      FAILURE             `Dead`
cannot be read                  FAILURE             `Dead`
is unknown here                                     `Again` for ten minutes, then `Dead`
was handed back                                     `Release`
is not taken back               FAILURE             `Dead`
==============================  ==================  =====================================
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Raw
from msgspec.structs import replace

from aiotaskq import events
from aiotaskq.contract.message import Attempt, Delivery, Envelope, Message
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import DeathDetails
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.encoding.exceptions import describe, encode_error, is_error, rebuild, summarize
from aiotaskq.errors import DecodeError, Reject, RetryLater, Snooze, UnknownTask, Verdict
from aiotaskq.readable import get_logger, on_one_line
from aiotaskq.retry import NEVER, Retry, backoff_delay, may_retry, retry_delay
from aiotaskq.worker.census import Census
from aiotaskq.worker.completer import Completer
from aiotaskq.worker.environment import WorkerEnvironment
from aiotaskq.worker.execution import Execution
from aiotaskq.worker.health import LineBudget
from aiotaskq.worker.process_pool import RemoteFailure

logger = get_logger("aiotaskq.worker")

Delay = TypeVar("Delay", float, float | None)

_UNKNOWN_PAUSE = 10.0  # seconds before an unknown task is offered to the workers again
_KNOWN_PAUSE = 1.0  # the same where another live worker knows the task
_TELL_UNKNOWN_EVERY = 60.0  # seconds between errors in the log about one name
_MOST_NAMES = 1000  # names that are remembered for that; anybody can send more of them
_MOST_ATTEMPTS = 10  # attempts that are kept in a task's history, the latest ones
_TRACEBACK = 2000  # characters that are kept of the traceback of each attempt
_NULL = Raw(b"null")
_EMPTY_LIST = Raw(b"[]")
_EMPTY_MAP = Raw(b"{}")


class Endings:
    """Hands each end to the completer, and tells the observers.

    Args:
        environment: The objects that all parts of the worker share.
        completer: Stores outcomes, then settles.
        census: The tasks that other workers know.
    """

    def __init__(
        self, environment: WorkerEnvironment, completer: Completer, census: Census
    ) -> None:
        app = environment.app
        self._tasks = app.tasks
        self._effective = app.effective_options
        self._codec = app.codec
        self._conf = app.conf
        self._observers = app.observers
        self._completer = completer
        self._census = census
        self._health = environment.health
        self._worker = environment.options.name
        self._told_unknown: dict[str, float] = {}  # when a name is to be logged again
        self._unknown_lines = LineBudget("tasks that are unknown here", 50)
        self._buried_lines = LineBudget("messages that go to the dead letters", 200)
        self._keeps_arguments = completer.wants_arguments or app.conf.result_extended

    # Before it runs

    def unread(self, delivery: Delivery, error: DecodeError) -> None:
        """Bury a delivery that is not a message, or is written in a serializer not accepted."""
        outcome = None
        if delivery.id:  # callers that wait for it are told, though nothing else is known of it
            message = Message(id=delivery.id, task="", queue=delivery.queue)
            outcome = self._outcome(message, TaskStatus.FAILURE, describe(error)[0])
        self._bury(delivery, None, str(error), outcome)

    def killer(self, delivery: Delivery, message: Message) -> None:
        """Bury a message under which `max_crashes` workers died, before any of it runs here."""
        died = delivery.crashes
        reason = "a worker" if died == 1 else f"{died} workers"
        reason += " died while running it"
        if delivery.crash_note:
            reason += f"; the last: {delivery.crash_note}"
        error = encode_error("WorkerLost", reason)
        self._bury(delivery, message, reason, self._outcome(message, TaskStatus.FAILURE, error))

    def unknown(self, delivery: Delivery, message: Message) -> None:
        """Put a task back for a worker that knows it: a rolling deploy may be under way."""
        self._health.counts["unknown"] += 1
        self._census.note_unknown()
        waited, most = message.unknown_for, self._conf.unknown_task_ttl
        elsewhere = self._census.knows(delivery.queue, message.task)
        if waited >= most and not elsewhere:
            reason = f"no worker has had a task {message.task!r} for {waited:.0f} s"
            error = encode_error(UnknownTask.__name__, reason)
            self._bury(delivery, message, reason, self._outcome(message, TaskStatus.FAILURE, error))
            return
        self._tell_unknown(message, most - waited, elsewhere=elsewhere)
        # The first time it comes back soon: by then the census has been taken.
        soon = elsewhere or not waited
        pause = min(_KNOWN_PAUSE if soon else _UNKNOWN_PAUSE, most)
        # The time is added up, and not counted from a beginning: clocks of workers may disagree.
        marked = replace(message, unknown_for=0.0 if elsewhere else waited + pause)
        self._run_again(delivery, marked, pause)

    def _tell_unknown(self, message: Message, left: float, *, elsewhere: bool) -> None:
        """Log an unknown task: its name once a minute as an error, the rest at debug level."""
        now = time.monotonic()
        level = logging.DEBUG
        if now >= self._told_unknown.get(message.task, now):
            level = self._unknown_lines.level()
            if len(self._told_unknown) >= _MOST_NAMES:
                self._told_unknown.clear()
            self._told_unknown[message.task] = now + _TELL_UNKNOWN_EVERY
        logger.log(
            level,
            "task %s is unknown here; it goes back for %s. Known here are: %s",
            message,
            "another worker, which knows it"
            if elsewhere
            else f"a worker that knows it, and in {max(left, 0):.0f} s to the dead letters",
            ", ".join(sorted(self._tasks)) or "none",
        )

    # While it runs

    def started(self, execution: Execution) -> None:
        """Tell that the function of a task is about to be called."""
        if self._observers.heard(events.Started):
            self._observers.emit(events.Started(message=execution.message))
        if execution.options.track_started:
            self._completer.add(None, self._outcome(execution.message, TaskStatus.STARTED, _NULL))

    # After it ran

    def succeeded(self, execution: Execution, value: Any, encoded: Raw) -> None:
        """End a task that returned."""
        took = execution.took
        outcome = None
        if (
            not execution.options.ignore_result and execution.transaction is None
        ):  # or it was committed
            outcome = self._make_outcome(execution.message, TaskStatus.SUCCESS, encoded, None, took)
        self._completer.add(Done(execution.delivery), outcome)
        if self._observers.heard(events.Succeeded):
            if type(value) is Raw:
                value = self._codec.decode_result(value)
            self._observers.emit(
                events.Succeeded(message=execution.message, value=value, execution_time=took)
            )

    def success(self, execution: Execution, encoded: Raw) -> Outcome:
        """Return the outcome of a task that returned, for the transaction that stores it."""
        return self._make_outcome(
            execution.message, TaskStatus.SUCCESS, encoded, None, execution.took
        )

    def outcome_exists(self, execution: Execution) -> None:
        """Settle a task that has an outcome of another run, so that its transaction was undone."""
        self._health.refused([execution.message.id])
        self._completer.add(Done(execution.delivery))

    def raised(self, execution: Execution, error: BaseException) -> None:
        """End a task that raised a failure or a verdict."""
        verdict: Verdict | None
        if isinstance(error, RemoteFailure):
            verdict, result, traceback = error.verdict, error.error, error.traceback
            is_final = error.is_final
            error = rebuild(result, execution.message.id, traceback, own=True)
            if is_final:
                self._fail(execution, error, result, traceback)
                return
        else:
            verdict = error if isinstance(error, Verdict) else None
            if isinstance(error, RetryLater) and error.__cause__ is not None:
                error = error.__cause__
            result, traceback = describe(error)
        if verdict is None:
            self._retry_or_fail(execution, error, result, traceback)
        elif isinstance(verdict, Snooze):
            self._snooze(execution, verdict, result)
        elif isinstance(verdict, RetryLater):
            self._retry_later(execution, verdict, error, result, traceback)
        else:
            self._fail(execution, error, result, traceback, buried=str(verdict))

    def misfit(self, execution: Execution, error: Exception) -> None:
        """Fail a task whose arguments do not fit, or whose value has no form.

        Another attempt would end in the same way.
        """
        result, traceback = describe(error)
        self._fail(execution, error, result, traceback)

    def ended_before(self, execution: Execution, told: Outcome) -> None:
        """Settle a task whose outcome was stored by a worker that died, as that one would have."""
        logger.warning("Task %s has ended before, with a worker that died then", execution)
        if told.status is TaskStatus.FAILURE:
            if is_error(told.result, Reject):
                reason = summarize(told.result).removeprefix("Reject: ")
                self._bury(execution.delivery, execution.message, reason, None)
                return
            if told.retries:
                history = self._history(execution.message, told.result, told.traceback or "")
                message = replace(execution.message, history=history)
                self._bury(
                    execution.delivery, message, _gave_up(told.retries + 1, told.result), None
                )
                return
        self._completer.add(Done(execution.delivery))

    def handed_back(self, execution: Execution) -> None:
        """Hand back a task that has not started; no observer has heard of it."""
        self._completer.add(
            Release(execution.delivery),
            on_refused=partial(self._not_taken_back, execution.delivery, execution.message),
        )

    def released(self, execution: Execution) -> None:
        """Hand back a task that did not end, for another worker to run."""
        self.handed_back(execution)
        if self._observers.heard(events.Released):
            self._observers.emit(events.Released(message=execution.message))

    def revoked(self, delivery: Delivery, message: Message, why: str) -> None:
        """End a task that was cancelled or has expired."""
        error = encode_error("TaskRevoked", why)
        self._completer.add(Done(delivery), self._outcome(message, TaskStatus.REVOKED, error))
        if self._observers.heard(events.Revoked):
            self._observers.emit(events.Revoked(message=message))

    def retries(self, execution: Execution, error: BaseException) -> bool:
        """Return whether the task is to run again after this error."""
        return may_retry(self._policy(execution), execution.message.attempt, error)

    def stuck(self, execution: Execution, *, held: bool) -> None:
        """Tell of an execution that runs on though it was cancelled.

        Args:
            execution: The execution.
            held: Whether another attempt waits until it has ended.
        """
        self._health.counts["stuck"] += 1
        logger.error(
            "task %s does not end though it was cancelled; its slot is freed, and what it"
            " still does is ignored%s",
            execution,
            ". Its next attempt waits until it has ended" if held else "",
        )
        if self._observers.heard(events.Stuck):
            self._observers.emit(events.Stuck(message=execution.message))

    def fault(self, execution: Execution, error: Exception) -> None:
        """Bury a task at which the worker itself failed; it would fail another worker as well."""
        logger.error("the worker failed at %s", execution, exc_info=error)
        result, traceback = describe(error)
        outcome = self._outcome(execution.message, TaskStatus.FAILURE, result, traceback=traceback)
        self._bury(
            execution.delivery, execution.message, f"the worker failed at it: {error}", outcome
        )

    # Another attempt

    def _retry_or_fail(
        self, execution: Execution, error: BaseException, result: Raw, traceback: str
    ) -> None:
        retry = self._policy(execution)
        delay = self._delay(execution, retry, retry_delay, error)
        if delay is None:
            self._give_up(execution, error, result, traceback)
        else:
            self._again(execution, error, delay, result, traceback)

    def _retry_later(
        self,
        execution: Execution,
        verdict: RetryLater,
        error: BaseException,
        result: Raw,
        traceback: str,
    ) -> None:
        retry = self._policy(execution)
        if retry.max_attempts == 1 and execution.message.retry is None:
            retry = Retry()  # nobody gave a retry, and the task asks for one
        most = retry.max_attempts if verdict.max_attempts is None else verdict.max_attempts
        if execution.message.attempt < most:
            delay = verdict.delay
            if delay is None:
                delay = self._delay(execution, retry, backoff_delay)
            self._again(execution, error, delay, result, traceback)
        else:
            self._give_up(execution, error, result, traceback)

    def _give_up(
        self, execution: Execution, error: BaseException, result: Raw, traceback: str
    ) -> None:
        """Fail a task; bury it as well if it was tried several times, as it was to succeed."""
        attempt, buried = execution.message.attempt, None
        if attempt > 1:
            buried = _gave_up(attempt, result)
        self._fail(execution, error, result, traceback, buried=buried)

    def _snooze(self, execution: Execution, verdict: Snooze, result: Raw) -> None:
        outcome = self._outcome(execution.message, TaskStatus.RETRY, result)
        self._run_again(execution.delivery, execution.message, verdict.delay, outcome)
        if self._observers.heard(events.Snoozed):
            self._observers.emit(events.Snoozed(message=execution.message, delay=verdict.delay))

    def _policy(self, execution: Execution) -> Retry:
        return execution.options.retry or NEVER

    def _delay(
        self, execution: Execution, retry: Retry, compute: Callable[..., Delay], *of: BaseException
    ) -> Delay | float:
        try:
            return compute(retry, execution.message.attempt, *of)
        except Exception:  # raised by a backoff function of the user
            logger.exception("the backoff of %s failed; max_delay is taken", execution.message.task)
            return retry.max_delay

    def _again(
        self, execution: Execution, error: BaseException, delay: float, result: Raw, traceback: str
    ) -> None:
        message = replace(
            execution.message,
            attempt=execution.message.attempt + 1,
            unknown_for=0.0,
            history=self._history(execution.message, result, traceback),
        )
        outcome = self._outcome(execution.message, TaskStatus.RETRY, result, traceback=traceback)
        self._run_again(execution.delivery, message, delay, outcome)
        if self._observers.heard(events.Retried):
            self._observers.emit(
                events.Retried(message=execution.message, error=error, delay=delay)
            )

    def _run_again(
        self, delivery: Delivery, message: Message, delay: float, outcome: Outcome | None = None
    ) -> None:
        """Put a task back for another run; one that the broker does not take back is buried."""
        envelope = Envelope(
            id=message.id,
            queue=delivery.queue,
            body=self._codec.encode_again(message, delivery.body),
            priority=message.priority,
            delay=max(delay, 0.0),
            expires_at=delivery.expires_at,
        )
        self._completer.add(
            Again(delivery, envelope),
            outcome,
            on_refused=partial(self._not_taken_back, delivery, message),
        )

    def _not_taken_back(self, delivery: Delivery, message: Message, why: Exception) -> None:
        outcome = self._outcome(message, TaskStatus.FAILURE, describe(why)[0])
        self._bury(delivery, message, f"it cannot go back to its queue: {why}", outcome)

    def _history(self, message: Message, result: Raw, traceback: str) -> tuple[Attempt, ...]:
        attempt = Attempt(
            number=message.attempt,
            at=time.time(),
            worker=self._worker,
            error=summarize(result),
            traceback=traceback[-_TRACEBACK:],
        )
        return (*message.history, attempt)[-_MOST_ATTEMPTS:]

    # The end

    def _fail(
        self,
        execution: Execution,
        error: BaseException,
        result: Raw,
        traceback: str,
        *,
        buried: str | None = None,
    ) -> None:
        """End a task that failed for good; bury it if there is a reason to."""
        took = execution.took
        outcome = self._outcome(
            execution.message, TaskStatus.FAILURE, result, traceback=traceback, took=took
        )
        if self._observers.heard(events.Failed):
            self._observers.emit(
                events.Failed(
                    message=execution.message, error=error, traceback=traceback, execution_time=took
                )
            )
        if buried is None:
            self._completer.add(Done(execution.delivery), outcome)
            return
        history = self._history(execution.message, result, traceback)
        self._bury(execution.delivery, replace(execution.message, history=history), buried, outcome)

    def _bury(
        self, delivery: Delivery, message: Message | None, reason: str, outcome: Outcome | None
    ) -> None:
        self._health.counts["buried"] += 1
        name = on_one_line(delivery.id) or "without an id"
        level = self._buried_lines.level()
        logger.log(level, "message %s goes to the dead letters: %s", name, reason)
        details = DeathDetails(
            task="" if message is None else message.task,
            worker=self._worker,
            attempts=() if message is None else message.history,
            crash_note=delivery.crash_note,
        )
        self._completer.add(Dead(delivery, reason, msgspec.json.encode(details)), outcome)
        if self._observers.heard(events.Buried):
            self._observers.emit(
                events.Buried(task_id=delivery.id, queue=delivery.queue, reason=reason)
            )

    def _outcome(
        self,
        message: Message,
        status: TaskStatus,
        result: Raw,
        *,
        traceback: str | None = None,
        took: float | None = None,
    ) -> Outcome | None:
        if self._effective(message.task).ignore_result:
            return None
        return self._make_outcome(message, status, result, traceback, took)

    def _make_outcome(
        self,
        message: Message,
        status: TaskStatus,
        result: Raw,
        traceback: str | None,
        took: float | None,
    ) -> Outcome:
        shown = self._keeps_arguments and message.pickled is None
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
            args=_as_json(message.args, _EMPTY_LIST) if shown else UNSET,
            kwargs=_as_json(message.kwargs, _EMPTY_MAP) if shown else UNSET,
            history=message.history,
            reply_to=message.reply_to or UNSET,
        )


def _as_json(raw: Raw, empty: Raw) -> Raw | msgspec.UnsetType:
    """Return arguments as JSON, for a store that keeps them beside the result."""
    view = memoryview(raw)  # no copy: arguments may be large
    if not view:
        return empty
    if view[0] in b"[{":
        return raw
    try:
        return Raw(msgspec.json.encode(msgspec.msgpack.decode(view)))
    except (ValueError, TypeError):  # MessagePack has keys that JSON has not
        return UNSET


def _gave_up(attempts: int, result: Raw) -> str:
    return f"failed {attempts} times, the last time with {summarize(result)}"
