"""All exceptions of the package.

::

    AioTaskQError
    ├── ConfigError                 the set-up is wrong; the same call cannot work later
    │   ├── UnknownTask             no task with that name is registered
    │   ├── DuplicateTask           another function has the name
    │   └── Unsupported             the driver does not have this feature
    ├── Unavailable                 a server cannot be reached now; the same call may work later
    │   ├── BrokerUnavailable
    │   │   └── BrokerFull          it has no memory or disk left, and takes no more messages
    │   └── BackendUnavailable
    ├── BatchRefused                some entries of a batch can never be stored; the others were
    ├── LeaseLost                   the broker counts this consumer as dead
    ├── CodecError
    │   ├── EncodeError             the serializer cannot encode a value
    │   │   └── PayloadTooLarge     a message or a result is too large
    │   └── DecodeError             the bytes are not a message, or not of the annotated type
    ├── TimeLimitExceeded           a task ran longer than its timeout; also a TimeoutError
    ├── SoftTimeLimitExceeded       raised inside a task before that; also a TimeoutError
    ├── Verdict                     raised by a task to decide how its run ends
    │   ├── RetryLater              run the task again, as another attempt
    │   ├── Snooze                  run the task again, without counting this attempt
    │   └── Reject                  move the task to the dead letters
    ├── MaxRetriesExceededError     `self.retry()` after the last attempt
    └── ResultError
        ├── ResultTimeout           no result in time; also a TimeoutError
        ├── TaskFailed              the task failed; with its exception type and traceback
        └── TaskRevoked             the task was cancelled, or it expired

Details are attributes of an exception; its message is a sentence for people. A driver converts
every exception of its client library into one of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class AioTaskQError(Exception):
    """Base of all exceptions of aiotaskq."""


class ConfigError(AioTaskQError):
    """The set-up is wrong; the same call cannot work later."""


class UnknownTask(ConfigError):
    """No task with that name is registered."""


class DuplicateTask(ConfigError):
    """Another function is registered as a task with that name."""


class Unsupported(ConfigError):
    """The driver does not have a feature that was asked for; see its `traits`."""


class Unavailable(AioTaskQError):
    """A server cannot be reached now; the same call may work later."""


class BrokerUnavailable(Unavailable):
    """The broker cannot be reached now."""


class BrokerFull(BrokerUnavailable):
    """The broker answers, but has no memory or disk left for another message."""


class BackendUnavailable(Unavailable):
    """The result backend cannot be reached now."""


class BatchRefused(AioTaskQError):
    """Some entries of a batch were refused for good; all other entries took effect.

    An entry that was refused is not stored, and the same call cannot work for it later.

    Attributes:
        errors: The reason of each refusal, by the position of the entry in the batch. The type of
            each is the one that is raised where its entry is the whole batch.
        answer: The value that the call returns for the other entries.
    """

    def __init__(self, errors: Mapping[int, Exception], *, answer: Any = ()) -> None:
        first = min(errors)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(f"entry {first} of the batch was refused: {errors[first]}{more}")
        self.errors = errors
        self.answer = answer

    def __reduce__(self) -> tuple[Any, ...]:
        return _batch_refused, (self.errors, self.answer)


def _batch_refused(errors: Mapping[int, Exception], answer: Any) -> BatchRefused:
    return BatchRefused(errors, answer=answer)


class LeaseLost(AioTaskQError):
    """The broker counts this consumer as dead and gives its messages to other workers."""


class CodecError(AioTaskQError):
    """A value cannot be encoded, or bytes cannot be decoded."""


class EncodeError(CodecError):
    """The serializer cannot encode a value."""


class PayloadTooLarge(EncodeError):
    """An encoded message or result is larger than its setting allows.

    Attributes:
        size: Its size in bytes.
        limit: The largest size allowed, in bytes.
    """

    def __init__(self, message: str, *, size: int, limit: int) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit

    def __reduce__(self) -> tuple[Any, ...]:
        return _too_large, (str(self), self.size, self.limit)


def _too_large(message: str, size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(message, size=size, limit=limit)


class DecodeError(CodecError):
    """Bytes are not a message, or an argument is not of its annotated type."""


class TimeLimitExceeded(AioTaskQError, TimeoutError):
    """A task ran longer than its `timeout`."""


class SoftTimeLimitExceeded(AioTaskQError, TimeoutError):
    """Raised inside a task that runs longer than its `soft_timeout`, so that it can finish."""


class Verdict(AioTaskQError):
    """Raised by a task to decide how its run ends. See the three subclasses."""


def _check_seconds(delay: Any) -> float:
    # Checked here and not in the worker: the traceback shows the wrong line of the task.
    if not isinstance(delay, int | float) or not 0 <= delay < math.inf:
        raise TypeError(f"delay is {delay!r}; it must be a number of seconds, 0 or more")
    return delay


class RetryLater(Verdict):
    """Run the task again after `delay` seconds, as another attempt.

    The attempt counts towards the `max_attempts` of the task's `Retry`, or of ``Retry()`` if the
    task has none. After the last attempt the task fails with the cause of this exception
    (``raise RetryLater(5) from error``), or with this exception if it has no cause.

    Args:
        delay: Seconds; None: as the task's `Retry` says.
        reason: A text for people, in logs and in the task's history.
        max_attempts: The number of runs in all, instead of that of the `Retry`; ``math.inf`` for
            no limit.
    """

    def __init__(
        self, delay: float | None = None, reason: str = "", *, max_attempts: float | None = None
    ) -> None:
        super().__init__(reason or "the task asked to run again later")
        self.delay = None if delay is None else _check_seconds(delay)
        self.reason = reason
        self.max_attempts = max_attempts

    def __reduce__(self) -> tuple[Any, ...]:
        return _retry_later, (self.delay, self.reason, self.max_attempts)


def _retry_later(delay: float | None, reason: str, max_attempts: float | None) -> RetryLater:
    return RetryLater(delay, reason, max_attempts=max_attempts)


class Snooze(Verdict):
    """Run the task again after `delay` seconds; this run does not count as an attempt."""

    def __init__(self, delay: float, reason: str = "") -> None:
        super().__init__(reason or "the task asked to be postponed")
        self.delay = _check_seconds(delay)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.delay, self.reason)


class Reject(Verdict):
    """Do not run the task again: move it to the dead letters, with the reason."""

    def __init__(self, reason: str = "rejected by the task") -> None:
        super().__init__(reason)
        self.reason = reason


class MaxRetriesExceededError(AioTaskQError):
    """A task called ``self.retry()`` in its last attempt."""


class ResultError(AioTaskQError):
    """A task has no value: it failed, was revoked, or has not ended in time."""


class ResultTimeout(ResultError, TimeoutError):
    """No result arrived in time. The task goes on, and the caller may wait again."""


class TaskFailed(ResultError):
    """The task failed.

    The exception that the caller gets is also an instance of the task's exception type, if that
    is a builtin or its module is already imported in the caller, and has those of its attributes
    that are plain data. For safety, nothing is imported because a result names it. Exceptions of
    this package are an exception: ``except ResultTimeout`` catches no failure of a task that itself
    waited in vain, and a `Reject` of one task is none of the task that waits for it.

    Attributes:
        task_id: The id of the task.
        exc_type: The name of the task's exception type, such as ``"ZeroDivisionError"``.
        exc_module: The module of that type, such as ``"builtins"``.
        exc_message: The message of the task's exception, from ``str()``.
        args: The arguments of the task's exception where they are plain data; else its message.
        remote_traceback: The traceback in the worker as text, or None.
    """

    task_id: str
    exc_type: str
    exc_module: str
    exc_message: str
    remote_traceback: str | None

    def __init__(
        self,
        message: str,
        *,
        task_id: str = "",
        exc_type: str = "",
        exc_module: str = "",
        exc_message: str = "",
        remote_traceback: str | None = None,
    ) -> None:
        # Not super(): a subclass may have a remote type among its bases, whose __init__ takes
        # other arguments.
        Exception.__init__(self, message)
        # Not by assignment: a remote type that is a frozen dataclass raises on assignment.
        vars(self).update(
            _text=message,
            task_id=task_id,
            exc_type=exc_type,
            exc_module=exc_module,
            exc_message=exc_message,
            remote_traceback=remote_traceback,
        )
        if remote_traceback:
            vars(self)["__notes__"] = ["\nIn the worker:\n" + remote_traceback.rstrip()]

    def __str__(self) -> str:
        return str(vars(self)["_text"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _task_failed, (self.args, vars(self))


def _task_failed(args: tuple[Any, ...], facts: dict[str, Any]) -> TaskFailed:
    error = TaskFailed("")
    error.args = args
    vars(error).update(facts)
    return error


class TaskRevoked(ResultError):
    """The task was cancelled, or it expired before it started."""
