"""Exceptions as data, and back.

A failure travels as the name of its type, its message and its traceback as text. Nothing is
imported or unpickled on a payload's word: the caller gets a `TaskFailed`, which is a subclass
of the remote type as well only where that type is already loaded here.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from types import TracebackType
from typing import Any

import msgspec
from msgspec import Raw

from aiotaskq.codec import encode_json
from aiotaskq.errors import ResultError, TaskFailed, TaskRevoked
from aiotaskq.message import Outcome, RemoteError, TaskStatus

_MESSAGE_LIMIT = 10_000  # characters; a message may hold a whole response body
_TRACEBACK_LIMIT = 60_000

_OURS = "aiotaskq."  # the modules whose frames lie between the event loop and a task

# An exception of these leaving a coroutine would mean something else to asyncio.
_NEVER_MIXED = (StopIteration, StopAsyncIteration)


def describe(error: BaseException) -> tuple[Raw, str]:
    """Return the encoded `RemoteError` of an exception, and its traceback as text.

    Works for hostile ones too, whose `__str__` or arguments raise or cannot be encoded. The
    worker's own frames are taken off the head of the traceback: they say nothing of the task.
    """
    kind = type(error)
    error.__traceback__ = _of_the_task(error.__traceback__)
    remote = RemoteError(
        exc_type=kind.__qualname__,
        exc_message=_plain_arguments(error),
        exc_module=kind.__module__,
    )
    return Raw(encode_json(remote)), _traceback(error)


def encode_error(kind: str, message: str, module: str = "aiotaskq.errors") -> Raw:
    """Return the encoded `RemoteError` of a failure that no exception stands for."""
    return Raw(encode_json(RemoteError(kind, [message], module)))


def to_exception(outcome: Outcome) -> ResultError:
    """Return what `handle.result()` raises for an outcome that is no success."""
    if outcome.status is TaskStatus.REVOKED:
        remote = _read(outcome.result)
        return TaskRevoked(f"{outcome.task_id} was revoked: {_message(remote)}")
    return rebuild(outcome.result, outcome.task_id, outcome.traceback)


def rebuild(error: Raw, task_id: str, traceback: str | None) -> TaskFailed:
    """Return the exception that an encoded `RemoteError` stands for."""
    remote = _read(error)
    message = _message(remote)
    kind = _failed_class(remote)
    return kind(
        # The type's own name says nothing where the class is the plain TaskFailed.
        f"{remote.exc_type}: {message}" if kind is TaskFailed else message,
        task_id=task_id,
        exc_type=remote.exc_type,
        exc_module=remote.exc_module,
        exc_message=message,
        remote_traceback=traceback,
    )


def _read(error: Raw) -> RemoteError:
    return msgspec.json.decode(bytes(error), type=RemoteError)


def _message(remote: RemoteError) -> str:
    return ", ".join(str(part) for part in remote.exc_message)


def _plain_arguments(error: BaseException) -> list[Any]:
    plain = all(
        part is None or (type(part) in (str, int, float, bool) and len(repr(part)) < _MESSAGE_LIMIT)
        for part in error.args
    )
    if plain and error.args and not isinstance(error, UnicodeError):
        try:
            encode_json(error.args)
        except Exception:  # noqa: BLE001, S110 - NaN or a lone surrogate: its text is sent below
            pass
        else:
            return list(error.args)
    return [_text(error)]


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException as hostile:  # noqa: BLE001 - a failing __str__ must not fail the worker
        text = f"<its message cannot be shown: {type(hostile).__name__}>"
    return _encodable(text[:_MESSAGE_LIMIT])


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as hostile:  # noqa: BLE001 - as above
        text = f"<the traceback cannot be shown: {type(hostile).__name__}>"
    if len(text) > _TRACEBACK_LIMIT:  # the end says most
        text = "... (shortened)\n" + text[-_TRACEBACK_LIMIT:]
    return _encodable(text)


def _of_the_task(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(_OURS):
        frames = frames.tb_next
    return frames


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _failed_class(remote: RemoteError) -> type[TaskFailed]:
    """Return `TaskFailed`, mixed with the remote type where that is loaded here."""
    module = builtins if remote.exc_module == "builtins" else sys.modules.get(remote.exc_module)
    found: Any = module
    for part in remote.exc_type.split("."):
        found = getattr(found, part, None)
    usable = (
        isinstance(found, type)
        and issubclass(found, Exception)
        and not issubclass(found, _NEVER_MIXED)
        and found is not Exception
    )
    return _mixed(found) if usable else TaskFailed


_classes: dict[type, type[TaskFailed]] = {}


def _mixed(kind: type[Exception]) -> type[TaskFailed]:
    if issubclass(kind, TaskFailed):
        return TaskFailed
    if kind not in _classes:
        try:
            _classes[kind] = type(
                f"TaskFailed[{kind.__name__}]", (TaskFailed, kind), {"__module__": "aiotaskq.errors"}
            )
        except TypeError:  # a type that cannot be a base beside another, such as a final one
            _classes[kind] = TaskFailed
    return _classes[kind]
