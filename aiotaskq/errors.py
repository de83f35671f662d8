"""Every exception of the package.

::

    AioTaskQError
    ├── ConfigError                 the set-up is wrong; the same call cannot work later
    │   ├── UnknownTask             no task of that name is registered
    │   ├── DuplicateTask           the name is taken by another function
    │   └── Unsupported             the chosen driver cannot do what was asked
    ├── Unavailable                 a server cannot be reached now; the same call may work later
    │   ├── BrokerUnavailable
    │   └── BackendUnavailable
    ├── LeaseLost                   the broker gave this consumer up for dead
    ├── CodecError
    │   ├── EncodeError             a value has no form in the chosen serializer
    │   │   └── PayloadTooLarge
    │   └── DecodeError             bytes that are no message, or no argument of the annotated type
    └── ResultError
        ├── ResultTimeout           also a TimeoutError
        ├── TaskFailed              carries the remote type, message and traceback
        └── TaskRevoked             cancelled or expired

Facts are attributes, the sentence is the message. No exception of a client library
leaves a driver: each is mapped onto one of these.
"""

from __future__ import annotations

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
