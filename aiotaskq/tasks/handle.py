"""Handles of sent tasks: `TaskHandle` for async code, `AsyncResult` for plain code."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, Generic, TypeVar, cast

from aiotaskq import bridge
from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.errors import ConfigError, ResultError, ResultTimeout
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.result import TaskResult

R = TypeVar("R", covariant=True)


class TaskHandle(Generic[R]):
    """The handle of a sent task. It works in any event loop, and does no I/O until it is used.

    Attributes:
        id: The id of the task.
    """

    __slots__ = ("_app", "_name", "id")

    def __init__(self, task_id: str, app: Application, name: str = "") -> None:
        """Make the handle of a task; `name` is the task's name, empty where it is not known."""
        self.id = task_id
        self._app = app
        self._name = name

    @property
    def task_id(self) -> str:
        """The id of the task, as Celery users call it."""
        return self.id

    async def result(self, timeout: float | None = None) -> R:
        """Wait for the task to end and return its value.

        Args:
            timeout: Seconds to wait; None: without limit, 0: only look. The task itself goes on.

        Raises:
            ConfigError: No result is kept, of this task or at all.
            ResultTimeout: It did not end in time.
            TaskRevoked: It was cancelled, or expired.
            TaskFailed: It raised an exception. The error is also an instance of the remote type
                where that is a builtin, or its module is already imported here.
        """
        return (await self.wait(timeout)).value()

    async def wait(self, timeout: float | None = None) -> TaskResult[R]:
        """Wait for the task to end and return how it ended, without raising its failure.

        Raises:
            ConfigError: No result is kept, of this task or at all.
            ResultTimeout: It did not end in time.
        """
        # Of a task that is registered elsewhere, its worker decides whether it keeps results.
        known = self._name in self._app.tasks
        never = known and self._app.effective_options(self._name).ignore_result
        # Without time to wait, an outcome that is there now still counts.
        if never or (timeout is not None and timeout <= 0):
            there = await self._app.load_outcome(self.id)
            if there is not None and there.status.final:
                return self._app.read(there)
        if never:  # and the outcome of a cancelled task, for example, is not there
            raise ConfigError(
                f"{self._name} keeps no results, so there is nothing to wait for: its"
                " ignore_result is on; set ignore_result=False where results are wanted"
            )
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                outcome = await self._app.wait_outcome(self.id)
        except TimeoutError:
            if not limit.expired():
                raise  # of a driver
            raise ResultTimeout(f"no result of {self.id} after {timeout:g} s") from None
        return self._app.read(outcome)

    async def status(self) -> TaskStatus:
        """Return the status of the task. PENDING also means that nothing is known of the id."""
        outcome = await self._app.load_outcome(self.id)
        return TaskStatus.PENDING if outcome is None else outcome.status

    async def cancel(self) -> None:
        """Revoke the task. One that waits never starts; one that runs is cancelled.

        A task that has ended is not changed. A plain function in a thread cannot be stopped; its
        outcome is refused.
        """
        await self._app.cancel(self.id)

    async def forget(self) -> bool:
        """Delete the result before its time; False if there was none."""
        return await self._app.forget(self.id)

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()

    def __repr__(self) -> str:
        return f"<TaskHandle: {self.id}>"


class AsyncResult(Generic[R]):
    """The handle of a sent task for code that cannot await, with the methods of Celery's.

    Attributes:
        id: The id of the task.
    """

    __slots__ = ("_app", "_name", "id")

    def __init__(self, task_id: str, app: Application, name: str = "") -> None:
        """Make the handle of a task; `name` is the task's name, empty where it is not known."""
        self.id = task_id
        self._app = app
        self._name = name

    @property
    def task_id(self) -> str:
        return self.id

    def get(self, timeout: float | None = None, propagate: bool = True) -> R:
        """Wait for the task to end and return its value.

        Args:
            timeout: Seconds to wait; None: without limit.
            propagate: Raise the task's failure; otherwise return the exception.

        Raises:
            ConfigError, ResultTimeout, TaskRevoked, TaskFailed: As `TaskHandle.result` does.
        """
        handle: TaskHandle[R] = TaskHandle(self.id, self._app, self._name)
        ended = bridge.run(handle.wait(timeout), instead="`await handle.result()`")
        if ended.error is not None and not propagate:
            return cast("R", ended.error)
        return ended.value()

    def _now(self) -> TaskResult[R] | TaskStatus:
        outcome = bridge.run(self._app.load_outcome(self.id), instead="`await handle.status()`")
        if outcome is None:
            return TaskStatus.PENDING
        return self._app.read(outcome) if outcome.status.final else outcome.status

    @property
    def status(self) -> str:
        """PENDING, STARTED, RETRY, SUCCESS, FAILURE or REVOKED."""
        now = self._now()
        return str(now.status if isinstance(now, TaskResult) else now)

    @property
    def state(self) -> str:
        """The same as `status`."""
        return self.status

    @property
    def result(self) -> R | ResultError | None:
        """The value of the task; its exception if it failed; None while it has not ended."""
        now = self._now()
        if not isinstance(now, TaskResult):
            return None
        return now.return_value if now.error is None else now.error

    @property
    def traceback(self) -> str | None:
        """The traceback in the worker, if the task failed."""
        now = self._now()
        return now.traceback if isinstance(now, TaskResult) else None

    def ready(self) -> bool:
        """Return whether the task has ended."""
        return isinstance(self._now(), TaskResult)

    def successful(self) -> bool:
        """Return whether the task has returned."""
        return self.status == TaskStatus.SUCCESS

    def failed(self) -> bool:
        """Return whether the task has raised."""
        return self.status == TaskStatus.FAILURE

    def revoke(self, terminate: bool = False, signal: str | int | None = None) -> None:
        """Revoke the task. One that waits never starts.

        Args:
            terminate: Whether the task is cancelled if it runs. If not, it runs to its end.
            signal: Has no effect: a coroutine is cancelled, and a process of the pool is killed. A
                plain function in a thread cannot be stopped; its outcome is refused.
        """
        revoking = self._app.cancel(self.id, running=terminate)
        bridge.run(revoking, instead="`await handle.cancel()`")

    def forget(self) -> None:
        """Delete the result before its time."""
        bridge.run(self._app.forget(self.id), instead="`await handle.forget()`")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<AsyncResult: {self.id}>"
