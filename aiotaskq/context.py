"""Context of a running task: `current_task`.

Each run sets a context variable in its own copy of the context, so tasks that run at the same time
never see the context of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, TypeAlias

from aiotaskq import forks
from aiotaskq.contract.message import Attempt, Message, RetryPolicy
from aiotaskq.errors import Verdict


class State(SimpleNamespace):
    """Objects that a worker's lifespan makes for its tasks: a database pool, a client, a model."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the worker's state has no {name!r}: set it in a function with @app.lifespan"
        )


Lifespan: TypeAlias = Callable[[State], AbstractAsyncContextManager[None]]
"""A context manager that a worker enters when it starts and exits when it ends."""


class TaskContext:
    """One run of a task.

    Attributes:
        id: The task's id, the same for all its attempts.
        name: The name it is registered under.
        args: The positional arguments, converted.
        kwargs: The keyword arguments, converted.
        state: The objects of the worker's lifespan, shared by its tasks. It is empty in a process
            pool, which has no lifespan.
        worker: The name of the worker.
        verdict: The verdict with which the run ends even if its function does not raise it, as
            after ``self.retry(throw=False)``; None: there is none.
    """

    __slots__ = ("_message", "args", "kwargs", "state", "verdict", "worker")

    def __init__(
        self,
        message: Message,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        state: State,
        worker: str,
    ) -> None:
        self._message = message
        self.args = args
        self.kwargs = kwargs
        self.state = state
        self.worker = worker
        self.verdict: Verdict | None = None

    @property
    def id(self) -> str:
        return self._message.id

    @property
    def name(self) -> str:
        return self._message.task

    @property
    def attempt(self) -> int:
        """The number of this attempt; 1 is the first."""
        return self._message.attempt

    @property
    def retries(self) -> int:
        """The number of attempts before this one."""
        return self._message.attempt - 1

    @property
    def history(self) -> tuple[Attempt, ...]:
        """The attempts before this one; the latest ones, if there were many."""
        return self._message.history

    @property
    def queue(self) -> str:
        return self._message.queue

    @property
    def priority(self) -> int:
        return self._message.priority

    @property
    def headers(self) -> Mapping[str, str]:
        """Texts by name that the sender and the middleware have added."""
        return self._message.headers

    @property
    def sent_at(self) -> float:
        """The Unix time at which it was sent, by the sender's clock."""
        return self._message.sent_at

    @property
    def expires_at(self) -> float | None:
        return self._message.expires_at

    @property
    def timeout(self) -> float | None:
        """The timeout of this call, in seconds; None: the task's own holds."""
        return self._message.timeout

    @property
    def soft_timeout(self) -> float | None:
        """The soft timeout of this call, in seconds; None: the task's own holds."""
        return self._message.soft_timeout

    @property
    def retry(self) -> RetryPolicy | None:
        """The retry of this call; None: the task's own holds."""
        return self._message.retry

    async def transaction(self) -> Any:
        """Return a connection to the result backend's PostgreSQL, with an open transaction.

        When the task returns, its writes are committed together with its result. They are rolled
        back if the task fails or is cancelled, or if its worker dies. If the task runs twice, the
        second commit is refused and rolled back, so the writes take effect once. The task must
        not commit by itself. Each call within one run returns the same connection.

        Example:
            ::

                @app.task
                async def pay(order: int) -> str:
                    connection = await current_task().transaction()
                    await connection.execute("UPDATE orders SET paid = true WHERE id = $1", order)
                    return "paid"

        Returns:
            An asyncpg connection.

        Raises:
            RuntimeError: No worker runs the task, or it is not a coroutine function.
            Unsupported: The result backend is not PostgreSQL.
            BackendUnavailable: The server cannot be reached now.
        """
        raise RuntimeError("only a coroutine task that a worker runs has a transaction")

    def judge(self, error: BaseException) -> BaseException:
        """Return the exception with which the run ends if its function raised `error`."""
        if self.verdict is None or not isinstance(error, Exception) or isinstance(error, Verdict):
            return error
        self.verdict.__cause__ = error
        return self.verdict

    def __repr__(self) -> str:
        return f"<TaskContext {self.name}[{self.id}] attempt {self.attempt}>"


_current: ContextVar[TaskContext] = ContextVar("aiotaskq.task")

enter = _current.set
"""Set the context of the running coroutine or thread."""


def find_task() -> TaskContext | None:
    """Return the context of the running task; None outside of a task."""
    return _current.get(None)


forks.when_task_runs(find_task)


def current_task() -> TaskContext:
    """Return the context of the running task.

    Raises:
        RuntimeError: It was called outside of a task.
    """
    context = find_task()
    if context is None:
        raise RuntimeError(
            "no task runs here: current_task() works only in a task's function and in code that"
            " it calls"
        )
    return context
