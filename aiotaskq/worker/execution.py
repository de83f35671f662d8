"""`Execution`: one run of a task in a worker, its context, and the reason why it was stopped.

::

    accepted ── begun ── function called ──▶ ended: exactly one end is told (`Endings`)
       │          │             │
       └──────────┴─────────────┴── stop ──▶ cancelled ── grace passes ──▶ stuck: the end was told

`stop` is set before the asyncio task is cancelled, and read wherever the execution may end. So an
execution that is cancelled before its coroutine was entered still tells its end, and a function
that hides its cancellation does not succeed. Reasons only rise: an execution that timed out and is
then taken away is not reported as a timeout.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import IntEnum, auto
from typing import Any, TypeAlias

from msgspec import Raw

from aiotaskq.context import State, TaskContext
from aiotaskq.contract.message import Delivery, Message
from aiotaskq.contract.results import Transaction
from aiotaskq.encoding.codec import Codec
from aiotaskq.errors import SoftTimeLimitExceeded, TimeLimitExceeded
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.tasks.effective import EffectiveOptions
from aiotaskq.worker.thread_call import ThreadCall

_NULL = Raw(b"null")

Start: TypeAlias = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Stop(IntEnum):
    """The reason why a worker cancels an execution. A higher one replaces a lower one."""

    RELEASE = auto()  # the worker stops: another one is to run the task
    TIMEOUT = auto()  # it ran for too long
    REVOKE = auto()  # somebody cancelled the task
    ABANDON = auto()  # another worker has the task, or its end was told already


class Execution:
    """A run of a task, from its acceptance to its end.

    Attributes:
        delivery: The delivery that is to be settled.
        message: The decoded message of the delivery.
        task: The task.
        options: The options that hold for this run.
        started: When its function was called, by the clock of `time.perf_counter`.
        begun: Whether its coroutine was entered.
        stop: Why it was cancelled; None: it was not.
        has_slot: Whether it has a thread or a process of the pools.
        thread: The call of its function in a thread, from its beginning on.
        softened: Whether its soft limit has passed and its function does not know of it yet.
        transaction: The transaction that its function has asked for.
        timers: The timers of its limits; None: it has no limits.
        work: The asyncio task that runs it.
    """

    __slots__ = (
        "begun",
        "delivery",
        "has_slot",
        "message",
        "options",
        "softened",
        "started",
        "stop",
        "task",
        "thread",
        "timers",
        "transaction",
        "work",
    )

    def __init__(
        self, delivery: Delivery, message: Message, task: TaskDefinition, options: EffectiveOptions
    ) -> None:
        self.delivery = delivery
        self.message = message
        self.task = task
        self.options = options
        self.started = time.perf_counter()
        self.begun = False
        self.stop: Stop | None = None
        self.has_slot = False
        self.thread: ThreadCall | None = None
        self.softened = False
        self.timers: list[asyncio.TimerHandle] | None = None
        self.transaction: Transaction | None = None
        self.work: asyncio.Task[None] | None = None

    @property
    def may_succeed(self) -> bool:
        """Return whether it succeeds if it returns now: a release alone does not prevent that."""
        return self.stop in (None, Stop.RELEASE)

    @property
    def took(self) -> float:
        """Seconds since its function was called."""
        return time.perf_counter() - self.started

    def encode(self, value: Any, codec: Codec, *, kept: bool) -> Raw:
        """Encode the value of its function; one that nobody gets needs no form.

        Args:
            value: The value; encoded already where a process of the pool returned it.
            codec: The codec of results.
            kept: Whether results are kept at all.

        Raises:
            UnwritableResult: The value has no form.
        """
        if type(value) is Raw:
            return value
        if not kept or self.options.ignore_result:
            return _NULL
        try:
            return codec.encode_result(value, self.task.arguments.result())
        except Exception as error:  # methods of the value may raise anything
            raise UnwritableResult from error

    # Limits of time

    def start_timers(
        self, loop: asyncio.AbstractEventLoop, time_out: Callable[[Execution], None]
    ) -> None:
        """Begin to count: at the soft limit it is told, at the hard one `time_out` is called."""
        timeout, soft = self.options.timeout, self.options.soft_timeout
        self.timers = []
        if timeout is not None:
            self.timers.append(loop.call_later(timeout, time_out, self))
        if soft is not None and self.options.executor != "process":  # that sees to it there
            self.timers.append(loop.call_later(soft, self._soften))

    def stop_timers(self) -> None:
        """Count no longer."""
        for timer in self.timers or ():
            timer.cancel()

    def _soften(self) -> None:
        if self.stop is not None or self.work is None:
            return
        if self.thread is not None:
            self.thread.interrupt(self.soft_error)
            return
        self.softened = True
        self.work.cancel()

    def take_soft_error(self) -> BaseException | None:
        """Return the exception to raise in place of a cancellation; None: a real cancellation."""
        if not self.softened or self.stop is not None:
            return None
        self.softened = False
        assert self.work is not None  # it was cancelled
        self.work.uncancel()
        return self.soft_error()

    def soft_error(self) -> SoftTimeLimitExceeded:
        """Return the exception of its soft limit."""
        return SoftTimeLimitExceeded(
            f"it ran longer than its soft_timeout of {self.options.soft_timeout:g} s"
        )

    def hard_error(self) -> TimeLimitExceeded:
        """Return the exception of its hard limit."""
        return TimeLimitExceeded(f"it ran longer than its timeout of {self.options.timeout:g} s")

    def __str__(self) -> str:
        return str(self.message)


class OutcomeExists(Exception):
    """The task has an outcome of another run, so that the transaction of this run was undone."""


class UnwritableResult(Exception):
    """The value of the task has no form; the cause says why. Another run would have none either."""


class ExecutionContext(TaskContext):
    """The context of an execution, with the execution itself for the innermost step of the onion.

    Args:
        begin: Begins a transaction for the task.
    """

    __slots__ = ("_begin", "execution")

    def __init__(
        self,
        execution: Execution,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        state: State,
        worker: str,
        begin: Callable[[], Awaitable[Transaction]],
    ) -> None:
        super().__init__(execution.message, args, kwargs, state=state, worker=worker)
        self.execution = execution
        self._begin = begin

    async def transaction(self) -> Any:
        execution = self.execution
        if execution.options.executor != "loop":
            return await super().transaction()
        if execution.work is not asyncio.current_task():  # two at once would begin two
            raise RuntimeError(
                "ask for the transaction in the task's own coroutine, before it starts others"
            )
        if execution.transaction is None:
            execution.transaction = await self._begin()
        return execution.transaction.connection


def starter(loop: asyncio.AbstractEventLoop) -> Start:
    """Return a function that starts a coroutine as an asyncio task.

    Where Python can (3.12), the task starts at once and not in the next turn of the loop: a task
    that never waits costs less. A task factory of the application is used if there is one.
    """
    if sys.version_info < (3, 12) or loop.get_task_factory() is not None:
        return loop.create_task

    def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.Task(coroutine, loop=loop, eager_start=True)

    return start
