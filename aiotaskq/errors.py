"""Every exception of the package.

::

    AioTaskQError
    ├── ConfigError                 the set-up is wrong; the same call cannot work later
    │   ├── UnknownTask             no task of that name is registered
    │   ├── DuplicateTask           the name is taken by another function
    │   └── Unsupported             the chosen driver cannot do what was asked
    ├── Unavailable                 a server cannot be reached now; the same call may work later
    │   ├── BrokerUnavailable
    │   │   └── BrokerFull          it has no room left, and takes no more messages
    │   └── BackendUnavailable
    ├── LeaseLost                   the broker gave this consumer up for dead
    ├── CodecError
    │   ├── EncodeError             a value has no form in the chosen serializer
    │   │   └── PayloadTooLarge
    │   └── DecodeError             bytes that are no message, or no argument of the annotated type
    ├── TimeLimitExceeded           a task ran longer than its timeout; also a TimeoutError
    ├── SoftTimeLimitExceeded       raised inside a task before that; also a TimeoutError
    ├── Verdict                     raised by a task, to say how its run is to end
    │   ├── RetryLater              run it again, as another attempt
    │   ├── Snooze                  run it again, without counting this attempt
    │   └── Reject                  keep it among the dead letters
    ├── MaxRetriesExceededError     `self.retry()` in a task that has had all its attempts
    └── ResultError
        ├── ResultTimeout           also a TimeoutError
        ├── TaskFailed              carries the remote type, message and traceback
        └── TaskRevoked             cancelled or expired

Facts are attributes, the sentence is the message. No exception of a client library
leaves a driver: each is mapped onto one of these.
"""

from __future__ import annotations

import math
from typing import Any


class AioTaskQError(Exception):
    """The base of all errors raised by aiotaskq."""


class ConfigError(AioTaskQError):
    """The set-up is wrong, and trying again cannot help."""


class UnknownTask(ConfigError):
    """No task of that name is registered."""


class DuplicateTask(ConfigError):
    """A task of that name is registered for another function."""


class Unsupported(ConfigError):
    """The chosen driver cannot do what was asked; its `traits` say what it can."""


class Unavailable(AioTaskQError):
    """A server cannot be reached now; the same call may work later."""


class BrokerUnavailable(Unavailable):
    """The broker cannot be reached now."""


class BrokerFull(BrokerUnavailable):
    """The broker answers, and has no memory or disk left for another message."""


class BackendUnavailable(Unavailable):
    """The result backend cannot be reached now."""


class LeaseLost(AioTaskQError):
    """The broker gave this consumer up for dead; what it held was handed to others."""


class CodecError(AioTaskQError):
    """Bytes and values do not fit each other."""


class EncodeError(CodecError):
    """A value has no form in the chosen serializer."""


class PayloadTooLarge(EncodeError):
    """An encoded message or result exceeds the configured limit.

    Attributes:
        size: Bytes it takes.
        limit: Bytes allowed.
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
    """Bytes that are no message, or an argument that does not fit its annotation."""


class TimeLimitExceeded(AioTaskQError, TimeoutError):
    """A task ran longer than its `timeout`."""


class SoftTimeLimitExceeded(AioTaskQError, TimeoutError):
    """Raised inside a task that runs longer than its `soft_timeout`, so that it can clean up."""


class Verdict(AioTaskQError):
    """Raised by a task to say how its run is to end. See the three subclasses."""


def _check_seconds(delay: Any) -> float:
    # Here and not in the worker: it fails the task in the line that is wrong.
    if not isinstance(delay, int | float) or not 0 <= delay < math.inf:
        raise TypeError(f"delay is {delay!r}; it must be a number of seconds, 0 or more")
    return delay


class RetryLater(Verdict):
    """Run the task again after `delay` seconds, as another attempt.

    It counts against the `max_attempts` of the task's `Retry`, or of a plain ``Retry()`` where
    the task has none. After the last one the task fails, with what this was raised from
    (``raise RetryLater(5) from error``), or else with this.

    Args:
        delay: Seconds; None: as the task's `Retry` says.
        reason: For people, in logs and in the task's history.
        max_attempts: Runs in all, instead of what the `Retry` says; ``math.inf`` for no limit.
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
        super().__init__(reason or "the task asked to be put off")
        self.delay = _check_seconds(delay)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.delay, self.reason)


class Reject(Verdict):
    """Do not run the task again: keep it among the dead letters, with the reason."""

    def __init__(self, reason: str = "rejected by the task") -> None:
        super().__init__(reason)
        self.reason = reason


class MaxRetriesExceededError(AioTaskQError):
    """A task asked for another attempt with ``self.retry()``, and has had all it may have."""


class ResultError(AioTaskQError):
    """A task has no value to return."""


class ResultTimeout(ResultError, TimeoutError):
    """No result arrived in time. The task goes on; asking again is fine."""


class TaskFailed(ResultError):
    """The task raised.

    Raised to the caller as a subclass of the remote type as well, where that type is a
    builtin or its module is already imported here. Nothing is imported on a payload's word.

    Attributes:
        task_id: The id of the task.
        exc_type: The name of the remote exception type, such as ``"ZeroDivisionError"``.
        exc_module: The module of that type, such as ``"builtins"``.
        exc_message: What ``str()`` gave there.
        remote_traceback: The traceback as text, or None.
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
        # Not super(): a subclass may have a remote type among its bases, whose __init__ wants
        # arguments of its own.
        Exception.__init__(self, message)
        # Not by assignment: a remote type that is a frozen dataclass would refuse it.
        vars(self).update(
            task_id=task_id,
            exc_type=exc_type,
            exc_module=exc_module,
            exc_message=exc_message,
            remote_traceback=remote_traceback,
        )
        if remote_traceback:
            vars(self)["__notes__"] = ["\nIn the worker:\n" + remote_traceback.rstrip()]

    def __str__(self) -> str:
        return str(self.args[0])


class TaskRevoked(ResultError):
    """The task was cancelled, or expired before it started."""
