"""aiotaskq: a task queue for asyncio."""

from typing import TYPE_CHECKING, Any

from aiotaskq import events
from aiotaskq.app import TaskQueue
from aiotaskq.client.dead_letters import DeadTask
from aiotaskq.context import State, TaskContext, current_task
from aiotaskq.contract.message import Attempt, Message
from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.contract.records import WorkerInfo
from aiotaskq.errors import (
    AioTaskQError,
    BackendUnavailable,
    BatchRefused,
    BrokerFull,
    BrokerUnavailable,
    CodecError,
    ConfigError,
    DecodeError,
    DuplicateTask,
    EncodeError,
    LeaseLost,
    MaxRetriesExceededError,
    PayloadTooLarge,
    Reject,
    ResultError,
    ResultTimeout,
    RetryLater,
    Snooze,
    SoftTimeLimitExceeded,
    TaskFailed,
    TaskRevoked,
    TimeLimitExceeded,
    Unavailable,
    UnknownTask,
    Unsupported,
    Verdict,
)
from aiotaskq.middleware import Middleware
from aiotaskq.recurrence import Schedule, at, crontab, every
from aiotaskq.retry import Retry
from aiotaskq.scheduling.schedules import ScheduleInfo
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.handle import AsyncResult, TaskHandle
from aiotaskq.tasks.result import TaskResult
from aiotaskq.tasks.task import Task

if TYPE_CHECKING:
    from aiotaskq.scheduling.scheduler import Scheduler
    from aiotaskq.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "AioTaskQError",
    "AsyncResult",
    "Attempt",
    "BackendUnavailable",
    "BatchRefused",
    "BrokerFull",
    "BrokerUnavailable",
    "Call",
    "CodecError",
    "ConfigError",
    "DeadTask",
    "DecodeError",
    "DuplicateTask",
    "EncodeError",
    "LeaseLost",
    "MaxRetriesExceededError",
    "Message",
    "Middleware",
    "PayloadTooLarge",
    "Reject",
    "ResultError",
    "ResultTimeout",
    "Retry",
    "RetryLater",
    "Schedule",
    "ScheduleInfo",
    "Scheduler",
    "Snooze",
    "SoftTimeLimitExceeded",
    "State",
    "Task",
    "TaskContext",
    "TaskFailed",
    "TaskHandle",
    "TaskQueue",
    "TaskResult",
    "TaskRevoked",
    "TaskStatus",
    "TimeLimitExceeded",
    "Unavailable",
    "UnknownTask",
    "Unsupported",
    "Verdict",
    "Worker",
    "WorkerInfo",
    "at",
    "crontab",
    "current_task",
    "events",
    "every",
]


def __getattr__(name: str) -> Any:
    if name == "Worker":  # a program that only sends tasks does not load it
        from aiotaskq.worker import Worker

        return Worker
    if name == "Scheduler":
        from aiotaskq.scheduling.scheduler import Scheduler

        return Scheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
