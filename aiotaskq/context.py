"""What a running task knows of itself.

Held by a context variable that each run sets in its own context, so that tasks which run at
the same time never see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, TypeAlias

from aiotaskq.contract.message import Attempt, Message, RetryPolicy


class State(SimpleNamespace):
    """What a worker's lifespan puts there for its tasks: a database pool, a client, a model."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the worker's state has no {name!r}: set it in a function under @app.lifespan"
        )


Lifespan: TypeAlias = Callable[[State], AbstractAsyncContextManager[None]]
"""What a worker does around its life, as a context manager over its state."""


class TaskContext:
    """One run of a task.

    Attributes:
        id: The task's id, the same for all its attempts.
        name: The name it is registered under.
        args: The positional arguments, converted.
        kwargs: The keyword arguments, converted.
        state: What the worker's lifespan set up, shared by its tasks. In a process pool, which
            has no lifespan, it is empty.
        worker: The name of the worker.
    """

    __slots__ = ("_message", "args", "kwargs", "state", "worker")

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

    @property
    def id(self) -> str:
        return self._message.id

    @property
    def name(self) -> str:
        return self._message.task

    @property
    def attempt(self) -> int:
        """Which run this is; 1 is the first."""
        return self._message.attempt

    @property
    def retries(self) -> int:
        """How often it ran before."""
        return self._message.attempt - 1

    @property
    def history(self) -> tuple[Attempt, ...]:
        """The attempts before this one; of many, the latest."""
        return self._message.history

    @property
    def queue(self) -> str:
        return self._message.queue

    @property
    def priority(self) -> int:
        return self._message.priority

    @property
    def headers(self) -> Mapping[str, str]:
        """What the sender and the middleware attached."""
        return self._message.headers

    @property
    def sent_at(self) -> float:
        """When it was sent, in Unix time by the sender's clock."""
        return self._message.sent_at

    @property
    def expires_at(self) -> float | None:
        return self._message.expires_at

    @property
    def timeout(self) -> float | None:
        """Seconds that the call gave it; None: as the task says."""
        return self._message.timeout

    @property
    def soft_timeout(self) -> float | None:
        """Seconds after which the call wants it told to come to an end; None: as the task says."""
        return self._message.soft_timeout

    @property
    def retry(self) -> RetryPolicy | None:
        """The retry that the call asked for; None: as the task says."""
        return self._message.retry

    async def transaction(self) -> Any:
        """Return a connection to the result backend's PostgreSQL, with a transaction open on it.

        What the task writes there commits together with its success, when it returns, and is
        rolled back when it fails, is cancelled or its worker dies. Should it run twice, the
        second commit is refused and undone: run twice, done once. The task must not commit by
        itself. Each call within one run returns the same connection.

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
            RuntimeError: No worker runs the task here, or it is no coroutine function.
            Unsupported: The result backend is another system.
            BackendUnavailable: The server cannot be reached now.
        """
        raise RuntimeError("only a coroutine task that a worker runs has a transaction")

    def __repr__(self) -> str:
        return f"<TaskContext {self.name}[{self.id}] attempt {self.attempt}>"


_current: ContextVar[TaskContext] = ContextVar("aiotaskq.task")

enter = _current.set
"""Make a context the current one of the running coroutine or thread."""


def find_task() -> TaskContext | None:
    """Return the context of the task that runs here, if one does."""
    return _current.get(None)


def current_task() -> TaskContext:
    """Return the context of the task that runs here.

    Raises:
        RuntimeError: No task runs here.
    """
    context = find_task()
    if context is None:
        raise RuntimeError(
            "no task runs here: current_task() works in a task's own function and in what it calls"
        )
    return context
