"""Encoding of exceptions as data, and decoding.

A failure is stored as the name of its type, its message and its traceback as text. For safety,
nothing is imported or unpickled because a result names it. The caller gets a `TaskFailed`, which is
also an instance of the remote type if that type is already loaded in the caller.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from types import TracebackType
from typing import Any

import msgspec
from msgspec import Raw

from aiotaskq.contract.outcome import Outcome, RemoteError, TaskStatus
from aiotaskq.encoding.codec import encode_json
from aiotaskq.errors import ResultError, TaskFailed, TaskRevoked

_MESSAGE_LIMIT = 10_000  # characters; a message may contain a whole response body
_TRACEBACK_LIMIT = 60_000
_SUMMARY_LIMIT = 300

_OURS = "aiotaskq."  # modules with frames between the event loop and a task

# If one of these leaves a coroutine, it has a special meaning for Python.
_NEVER_MIXED = (StopIteration, StopAsyncIteration)


def describe(error: BaseException) -> tuple[Raw, str]:
    """Return the encoded `RemoteError` of an exception, and its traceback as text.

    This works for any exception, even if its `__str__` raises or its arguments cannot be encoded.
    The worker's own frames are removed from the beginning of the traceback.
    """
    kind = type(error)
    # Not by assignment: an exception that is a frozen dataclass raises on assignment.
    BaseException.with_traceback(error, _of_the_task(error.__traceback__))
    remote = RemoteError(
        exc_type=_encodable(str(kind.__qualname__)),
        exc_message=_plain_arguments(error),
        exc_module=_encodable(str(kind.__module__)),
    )
    return Raw(encode_json(remote)), _traceback(error)


def encode_error(kind: str, message: str, module: str = "aiotaskq.errors") -> Raw:
    """Return the encoded `RemoteError` of a failure without an exception."""
    return Raw(encode_json(RemoteError(kind, [message], module)))


def to_exception(outcome: Outcome) -> ResultError:
    """Return the exception of an outcome, as `handle.result()` raises it."""
    if outcome.status is TaskStatus.REVOKED:
        remote = _read(outcome.result)
        return TaskRevoked(f"{outcome.task_id} was revoked: {_message(remote)}")
    return rebuild(outcome.result, outcome.task_id, outcome.traceback)


def rebuild(error: Raw, task_id: str, traceback: str | None) -> TaskFailed:
    """Return the exception for an encoded `RemoteError`."""
    remote = _read(error)
    message = _message(remote)
    facts: dict[str, Any] = {
        "task_id": task_id,
        "exc_type": remote.exc_type,
        "exc_module": remote.exc_module,
        "exc_message": message,
        "remote_traceback": traceback,
    }
    kind = _failed_class(remote)
    if kind is not None:
        try:
            return kind(message, **facts)
        except Exception:  # the __new__ of the type takes other arguments, or raises
            pass
    # With the plain TaskFailed, only the message can name the type.
    return TaskFailed(f"{remote.exc_type}: {message}", **facts)


def is_error(error: Raw, kind: type[BaseException]) -> bool:
    """Return whether an encoded `RemoteError` is of exactly this type."""
    remote = _read(error)
    return (remote.exc_module, remote.exc_type) == (kind.__module__, kind.__qualname__)


def summarize(error: Raw) -> str:
    """Return an encoded `RemoteError` as one line: its type and the beginning of its message."""
    remote = _read(error)
    text = " ".join(f"{remote.exc_type}: {_message(remote)}".split()).removesuffix(":")
    return text if len(text) <= _SUMMARY_LIMIT else text[: _SUMMARY_LIMIT - 3] + "..."


def _read(error: Raw) -> RemoteError:
    try:
        return msgspec.json.decode(bytes(error), type=RemoteError)
    except (ValueError, RecursionError):  # not written by a worker of aiotaskq
        return RemoteError("Exception", [bytes(error).decode(errors="replace")], "builtins")


def _message(remote: RemoteError) -> str:
    return ", ".join(str(part) for part in remote.exc_message)


def _plain_arguments(error: BaseException) -> list[Any]:
    """Return the only argument if its text is the exception's message; otherwise the message.

    The arguments of a `KeyError` or an `OSError`, for example, differ from the message.
    """
    text = _text(error)
    try:
        (only,) = error.args
        if type(only) in (str, int, float, bool) and str(only) == text:
            encode_json(only)
            return [only]
    except Exception:  # several arguments, an `args` that raises, NaN
        pass
    return [text]


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException as hostile:  # a __str__ that raises must not end the worker
        text = f"<its message cannot be shown: {type(hostile).__name__}>"
    return _encodable(text[:_MESSAGE_LIMIT])


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as hostile:  # as above
        text = f"<the traceback cannot be shown: {type(hostile).__name__}>"
    if len(text) > _TRACEBACK_LIMIT:  # the end is the most useful part
        text = "... (shortened)\n" + text[-_TRACEBACK_LIMIT:]
    return _encodable(text)


def _of_the_task(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and str(frames.tb_frame.f_globals.get("__name__")).startswith(_OURS):
        frames = frames.tb_next
    return frames


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _failed_class(remote: RemoteError) -> type[TaskFailed] | None:
    """Return a subclass of `TaskFailed` and the remote type; None if the type is not loaded."""
    module = builtins if remote.exc_module == "builtins" else sys.modules.get(remote.exc_module)
    found: Any = module
    for part in remote.exc_type.split("."):
        # Not getattr(): it makes some modules import the attribute.
        found = getattr(found, "__dict__", {}).get(part)
    usable = (
        isinstance(found, type)
        and issubclass(found, Exception)
        and not issubclass(found, (*_NEVER_MIXED, TaskFailed))
        and found is not Exception
    )
    return _mixed(found) if usable else None


_classes: dict[type, type[TaskFailed] | None] = {}


def _mixed(kind: type[Exception]) -> type[TaskFailed] | None:
    if kind not in _classes:
        members = {
            "__module__": TaskFailed.__module__,
            # Pickled by its parts: the class itself cannot be imported by its name.
            "__reduce__": lambda self: (_unpickle, (kind, self.args[0], vars(self))),
        }
        try:
            _classes[kind] = type(f"TaskFailed[{kind.__name__}]", (TaskFailed, kind), members)
        except Exception:  # the type cannot be a base class, or not together with TaskFailed
            _classes[kind] = None
    return _classes[kind]


def _unpickle(kind: type[Exception], message: str, facts: dict[str, Any]) -> TaskFailed:
    error = (_mixed(kind) or TaskFailed)(message)
    vars(error).update(facts)
    return error
