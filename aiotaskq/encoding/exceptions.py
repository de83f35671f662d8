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

from aiotaskq.contract.outcome import Outcome, RemoteError, TaskStatus
from aiotaskq.encoding.codec import encode_json
from aiotaskq.errors import ResultError, TaskFailed, TaskRevoked

_MESSAGE_LIMIT = 10_000  # characters; a message may hold a whole response body
_TRACEBACK_LIMIT = 60_000
_SUMMARY_LIMIT = 300

_OURS = "aiotaskq."  # the modules whose frames lie between the event loop and a task

# An exception of these leaving a coroutine would mean something else to asyncio.
_NEVER_MIXED = (StopIteration, StopAsyncIteration)


def describe(error: BaseException) -> tuple[Raw, str]:
    """Return the encoded `RemoteError` of an exception, and its traceback as text.

    Works for hostile ones too, whose `__str__` or arguments raise or cannot be encoded. The
    worker's own frames are taken off the head of the traceback: they say nothing of the task.
    """
    kind = type(error)
    # Not by assignment, which an exception that is a frozen dataclass would refuse.
    BaseException.with_traceback(error, _of_the_task(error.__traceback__))
    remote = RemoteError(
        exc_type=_encodable(str(kind.__qualname__)),
        exc_message=_plain_arguments(error),
        exc_module=_encodable(str(kind.__module__)),
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
        except Exception:  # a type whose __new__ wants more, or refuses
            pass
    # The type's own name says nothing where the class is the plain TaskFailed.
    return TaskFailed(f"{remote.exc_type}: {message}", **facts)


def is_error(error: Raw, kind: type[BaseException]) -> bool:
    """Whether an encoded `RemoteError` stands for an exception of exactly this type."""
    remote = _read(error)
    return (remote.exc_module, remote.exc_type) == (kind.__module__, kind.__qualname__)


def summarize(error: Raw) -> str:
    """Return an encoded `RemoteError` in one line: its type and the beginning of its message."""
    remote = _read(error)
    text = " ".join(f"{remote.exc_type}: {_message(remote)}".split()).removesuffix(":")
    return text if len(text) <= _SUMMARY_LIMIT else text[: _SUMMARY_LIMIT - 3] + "..."


def _read(error: Raw) -> RemoteError:
    try:
        return msgspec.json.decode(bytes(error), type=RemoteError)
    except (ValueError, RecursionError):  # not written by a worker of ours
        return RemoteError("Exception", [bytes(error).decode(errors="replace")], "builtins")


def _message(remote: RemoteError) -> str:
    return ", ".join(str(part) for part in remote.exc_message)


def _plain_arguments(error: BaseException) -> list[Any]:
    """Return the only argument if it says what `str()` says, else that text.

    Of a `KeyError` or an `OSError` the arguments say less.
    """
    text = _text(error)
    try:
        (only,) = error.args
        if type(only) in (str, int, float, bool) and str(only) == text:
            encode_json(only)
            return [only]
    except Exception:  # other arguments, a hostile `args`, NaN
        pass
    return [text]


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException as hostile:  # a failing __str__ must not fail the worker
        text = f"<its message cannot be shown: {type(hostile).__name__}>"
    return _encodable(text[:_MESSAGE_LIMIT])


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as hostile:  # as above
        text = f"<the traceback cannot be shown: {type(hostile).__name__}>"
    if len(text) > _TRACEBACK_LIMIT:  # the end says most
        text = "... (shortened)\n" + text[-_TRACEBACK_LIMIT:]
    return _encodable(text)


def _of_the_task(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and str(frames.tb_frame.f_globals.get("__name__")).startswith(_OURS):
        frames = frames.tb_next
    return frames


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _failed_class(remote: RemoteError) -> type[TaskFailed] | None:
    """Return `TaskFailed`, mixed with the remote type; None if that is not loaded here."""
    module = builtins if remote.exc_module == "builtins" else sys.modules.get(remote.exc_module)
    found: Any = module
    for part in remote.exc_type.split("."):
        # Not getattr(), which makes some modules import what is asked for.
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
            # Pickled by what it is made of: the class itself cannot be found by its name.
            "__reduce__": lambda self: (_unpickle, (kind, self.args[0], vars(self))),
        }
        try:
            _classes[kind] = type(f"TaskFailed[{kind.__name__}]", (TaskFailed, kind), members)
        except Exception:  # a type that cannot be a base, or not beside another
            _classes[kind] = None
    return _classes[kind]


def _unpickle(kind: type[Exception], message: str, facts: dict[str, Any]) -> TaskFailed:
    error = (_mixed(kind) or TaskFailed)(message)
    vars(error).update(facts)
    return error
