"""`TaskResult`: how a task ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar, cast

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.encoding.codec import Codec
from aiotaskq.encoding.exceptions import to_exception
from aiotaskq.errors import ResultError
from aiotaskq.tasks.definition import TaskDefinition

R = TypeVar("R", covariant=True)


@dataclass(frozen=True, slots=True)
class TaskResult(Generic[R]):
    """The end of a task: its value or its error.

    Attributes:
        task_id: The id of the task.
        status: SUCCESS, FAILURE or REVOKED.
        return_value: The value that it returned; None unless it succeeded.
        error: The exception that `result()` raises; None if it succeeded.
        traceback: The traceback in the worker, as text.
        execution_time: Seconds that its function took in the last attempt.
        attempts: The number of runs.
        worker: The name of the worker that ended it.
        name: The name of the task.
        queue: The queue that it came from.
        date_done: The time at which it ended, by the worker's clock.
        history: The attempts before the last one, the oldest first; of many, the latest.
    """

    task_id: str
    status: TaskStatus
    return_value: R | None
    error: ResultError | None
    traceback: str | None
    execution_time: float | None
    attempts: int
    worker: str | None
    name: str | None
    queue: str | None
    date_done: datetime | None
    history: tuple[Attempt, ...] = ()

    @property
    def is_err(self) -> bool:
        """Return whether it failed or was revoked."""
        return self.error is not None

    def value(self) -> R:
        """Return the value of the task, or raise its failure."""
        if self.error is not None:
            raise self.error
        return cast("R", self.return_value)


def read_outcome(outcome: Outcome, task: TaskDefinition | None, codec: Codec) -> TaskResult[Any]:
    """Return an outcome with its value or error decoded.

    Args:
        outcome: A final one.
        task: The task, if it is registered here: the value has its annotated type then.
        codec: The codec of results.
    """
    error = value = None
    if outcome.status is TaskStatus.SUCCESS:
        value = codec.decode_result(
            outcome.result, None if task is None else task.arguments.read_result
        )
    else:
        error = to_exception(outcome)
    return TaskResult(
        task_id=outcome.task_id,
        status=outcome.status,
        return_value=value,
        error=error,
        traceback=outcome.traceback,
        execution_time=outcome.execution_time,
        attempts=outcome.retries + 1,
        worker=outcome.worker,
        name=outcome.name,
        queue=outcome.queue,
        date_done=outcome.date_done,
        history=outcome.history,
    )
