"""aiotaskq: a task queue for asyncio."""

from aiotaskq import events
from aiotaskq.app import TaskQueue
from aiotaskq.context import State, TaskContext, current_task
from aiotaskq.errors import (
    AioTaskQError,
    BackendUnavailable,
    BrokerUnavailable,
    CodecError,
    ConfigError,
    DecodeError,
    DuplicateTask,
    EncodeError,
    LeaseLost,
    PayloadTooLarge,
    ResultError,
    ResultTimeout,
    TaskFailed,
    TaskRevoked,
    Unavailable,
    UnknownTask,
    Unsupported,
)
from aiotaskq.handle import AsyncResult, TaskHandle, TaskResult
from aiotaskq.message import Message, TaskStatus
from aiotaskq.middleware import Middleware
from aiotaskq.retry import Retry
from aiotaskq.task import Call, Task
from aiotaskq.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "AioTaskQError",
    "AsyncResult",
    "BackendUnavailable",
    "BrokerUnavailable",
    "Call",
    "CodecError",
    "ConfigError",
    "DecodeError",
    "DuplicateTask",
    "EncodeError",
    "LeaseLost",
    "Message",
    "Middleware",
    "PayloadTooLarge",
    "ResultError",
    "ResultTimeout",
    "Retry",
    "State",
    "Task",
    "TaskContext",
    "TaskFailed",
    "TaskHandle",
    "TaskQueue",
    "TaskResult",
    "TaskRevoked",
    "TaskStatus",
    "Unavailable",
    "UnknownTask",
    "Unsupported",
    "Worker",
    "current_task",
    "events",
]
