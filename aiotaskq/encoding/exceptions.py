"""Encoding of exceptions as data, and decoding.

A failure is stored as the name of its type, its message, its traceback as text, and those of its
arguments and attributes that are plain data. For safety, nothing is imported or unpickled because a
result names it. The caller gets a `TaskFailed`, which is also an instance of the remote type if
that type is already loaded in the caller, and none of this package.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import msgspec
from msgspec import Raw

from aiotaskq.contract.outcome import Outcome, RemoteError, TaskStatus
from aiotaskq.encoding import exception_parts as parts
from aiotaskq.encoding.codec import encode_json
from aiotaskq.errors import ResultError, TaskFailed, TaskRevoked

_MESSAGE_LIMIT = 10_000  # characters; a message may contain a whole response body
_TRACEBACK_LIMIT = 60_000
_SUMMARY_LIMIT = 300

_OURS = "aiotaskq."  # modules with frames between the event loop and a task

_PACKAGE = __name__.partition(".")[0]
_DEPTH = 5  # groups in one another
_MOST_MEMBERS = 100  # exceptions of a group
_NAME_LIMIT = 1000  # characters of the name of a type, or of its module
_FRAME = 200  # bytes, at most, of the names of the fields, and of the words for members left out
_MOST_SHOWN = 1000  # exceptions in a group, up to which its traceback has those of its members

# If one of these leaves a coroutine, it has a special meaning for Python.
_NEVER_MIXED = (StopIteration, StopAsyncIteration)


def describe(error: BaseException) -> tuple[Raw, str]:
    """Return the encoded `RemoteError` of an exception, and its traceback as text.

    This works for any exception, even if its `__str__` raises or its arguments cannot be encoded.
    The worker's own frames are removed from the beginning of the traceback.
    """
    # Not by assignment: an exception that is a frozen dataclass raises on assignment.
    BaseException.with_traceback(error, _of_the_task(error.__traceback__))
    return Raw(encode_json(_to_remote(error))), _traceback(error)


def encode_error(kind: str, message: str, module: str = "aiotaskq.errors") -> Raw:
    """Return the encoded `RemoteError` of a failure without an exception."""
    return Raw(encode_json(RemoteError(kind, [message], module)))


def to_exception(outcome: Outcome) -> ResultError:
    """Return the exception of an outcome, as `handle.result()` raises it."""
    if outcome.status is TaskStatus.REVOKED:
        remote = _read(outcome.result)
        return TaskRevoked(f"{outcome.task_id} was revoked: {_message(remote)}")
    return rebuild(outcome.result, outcome.task_id, outcome.traceback)


def rebuild(error: Raw, task_id: str, traceback: str | None, *, own: bool = False) -> TaskFailed:
    """Return the exception for an encoded `RemoteError`.

    Args:
        error: The encoded error.
        task_id: The id of the task that failed.
        traceback: Its traceback, as text.
        own: Whether it comes from another process of this same run, so that a type of this package
            is what the task itself has raised.
    """
    return _from_remote(_read(error), task_id, traceback, own)


def _to_remote(error: BaseException) -> RemoteError:
    """Return an exception as data.

    Level by level, so that where there is no room for all, one large group among the members of
    another one does not displace those beside it.
    """
    budget = parts.Budget()
    first = _Description(error, _MESSAGE_LIMIT, _DEPTH)
    budget.room -= first.size()
    waiting = deque([first])
    while waiting:
        waiting.extend(waiting.popleft().extend(budget))
    return first.data()


class _Description:
    """The description of an exception, while it is made.

    Args:
        error: The exception.
        limit: The characters that its message may have.
        depth: The number of groups that may be in one another in it.
    """

    def __init__(self, error: BaseException, limit: int, depth: int) -> None:
        self._error = error
        self._depth = depth
        kind = type(error)
        self._names = [
            _encodable(str(name)[:_NAME_LIMIT]) for name in (kind.__qualname__, kind.__module__)
        ]
        self._message = _plain_arguments(error, limit)
        self._arguments: list[Any] | None = None
        self._attributes: dict[str, Any] = {}
        self._members: list[_Description] = []
        self._left_out = 0

    def size(self) -> int:
        """Return the number of bytes that the type and the message need."""
        texts = (*self._names, *map(str, self._message))
        return _FRAME + sum(map(parts.size_of_text, texts))

    def extend(self, budget: parts.Budget) -> list[_Description]:
        """Add the other parts within the budget, and return the descriptions of the members."""
        room = budget.room
        self._arguments = parts.arguments(self._error, budget)
        if self._arguments == self._message:  # which is there already
            self._arguments, budget.room = None, room
        self._attributes = parts.attributes(self._error, budget)
        members = parts.members(self._error)
        usable = min(len(members), _MOST_MEMBERS) if self._depth else 0
        for index, one in enumerate(members[:usable]):
            # Each has its share of the room, so that long messages do not displace other members.
            limit = max(_SUMMARY_LIMIT, budget.room // (usable - index) - 2 * _FRAME)
            member = None
            if budget.room >= _FRAME:
                member = _Description(one, min(limit, _MESSAGE_LIMIT), self._depth - 1)
            if member is None or (size := member.size()) > budget.room:
                break
            budget.room -= size
            self._members.append(member)
        self._left_out = len(members) - len(self._members)
        return self._members

    def data(self) -> RemoteError:
        """Return the description."""
        name, module = self._names
        message = self._message
        if self._left_out:
            message = [f"{message[0]} [{self._left_out} left out]"]
        return RemoteError(
            exc_type=name,
            exc_message=message,
            exc_module=module,
            exc_args=self._arguments,
            exc_attributes=self._attributes or None,
            exc_members=[member.data() for member in self._members] or None,
        )


def _from_remote(remote: RemoteError, task_id: str, traceback: str | None, own: bool) -> TaskFailed:
    message = _message(remote)
    facts: dict[str, Any] = {
        "task_id": task_id,
        "exc_type": remote.exc_type,
        "exc_module": remote.exc_module,
        "exc_message": message,
        "remote_traceback": traceback,
    }
    attributes = remote.exc_attributes or {}
    members = [_from_remote(one, task_id, None, own) for one in remote.exc_members or ()]
    group = str(attributes.get("message", message)), members
    kind = _failed_class(remote, own)
    failure = None if kind is None else _make(kind, message, facts, group)
    if failure is None:  # with the plain TaskFailed, only the message can name the type
        failure = TaskFailed(f"{remote.exc_type}: {message}", **facts)
    _set_args(failure, remote.exc_message if remote.exc_args is None else remote.exc_args)
    parts.restore(failure, attributes)
    return failure


def _make(
    kind: type[TaskFailed],
    text: str,
    facts: dict[str, Any],
    group: tuple[str, Sequence[TaskFailed]],
) -> TaskFailed | None:
    """Make a failure of a mixed class; None if that does not work.

    Args:
        kind: The class.
        text: The text of the failure, for `str()`.
        facts: The attributes of every `TaskFailed`.
        group: The message and the members, for an exception group.
    """
    try:
        if not issubclass(kind, ExceptionGroup):
            return kind(text, **facts)
        failure = kind.__new__(kind, *group)
        TaskFailed.__init__(failure, text, **facts)
        return failure
    except Exception:  # the __new__ of the type takes other arguments, or raises
        return None


def _set_args(failure: TaskFailed, arguments: Iterable[Any]) -> None:
    if not isinstance(failure, ExceptionGroup):  # its arguments are its message and its members
        # Not by assignment: the type may have an `args` of its own, or allow none.
        BaseException.args.__set__(failure, tuple(arguments))  # type: ignore[attr-defined]  # a slot


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


def _plain_arguments(error: BaseException, limit: int) -> list[Any]:
    """Return the only argument if its text is the exception's message; otherwise the message.

    The arguments of a `KeyError` or an `OSError`, for example, differ from the message.
    """
    text = _text(error, limit)
    try:
        (only,) = error.args
        if type(only) in (str, int, float, bool) and str(only) == text:
            encode_json(only)
            return [only]
    except Exception:  # several arguments, an `args` that raises, NaN
        pass
    return [text]


def _text(error: BaseException, limit: int) -> str:
    try:
        text = str(error)
    except BaseException as hostile:  # a __str__ that raises must not end the worker
        text = f"<its message cannot be shown: {type(hostile).__name__}>"
    return _encodable(text[:limit])


def _traceback(error: BaseException) -> str:
    try:
        lines = traceback.format_exception if _is_small(error) else _without_members
        text = "".join(lines(error))
    except BaseException as hostile:  # as above
        text = f"<the traceback cannot be shown: {type(hostile).__name__}>"
    if len(text) > _TRACEBACK_LIMIT:  # the end is the most useful part
        text = "... (shortened)\n" + text[-_TRACEBACK_LIMIT:]
    return _encodable(text)


def _is_small(error: BaseException) -> bool:
    """Return whether the traceback of an exception may have those of all the members in it.

    One of Python has them wherever they occur, so that a few groups in one another may stand for
    millions.
    """
    waiting, seen, count = [error], set[int](), 0
    while waiting:
        one = waiting.pop()
        members = parts.members(one)
        count += len(members)
        if count > _MOST_SHOWN:
            return False
        waiting.extend(members)
        for other in (one.__cause__, one.__context__):
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                waiting.append(other)
    return True


def _without_members(error: BaseException) -> list[str]:
    """Return the lines of the traceback of an exception alone."""
    return [
        "Traceback (most recent call last):\n",
        *traceback.format_tb(error.__traceback__),
        f"{type(error).__module__}.{type(error).__qualname__}: {_text(error, _MESSAGE_LIMIT)}\n",
        "(the exceptions in it, and its causes, are too many to be shown)\n",
    ]


def _of_the_task(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and str(frames.tb_frame.f_globals.get("__name__")).startswith(_OURS):
        frames = frames.tb_next
    return frames


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _failed_class(remote: RemoteError, own: bool) -> type[TaskFailed] | None:
    """Return a subclass of `TaskFailed` and the remote type.

    None if the type is not loaded, or is one of this package: such a failure of one task must not
    act on another one that waits for it.
    """
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
        and (own or not _is_ours(found))
    )
    return _mixed(found) if usable else None


def _is_ours(kind: type) -> bool:
    return any(str(one.__module__).partition(".")[0] == _PACKAGE for one in kind.__mro__)


_classes: dict[type, type[TaskFailed] | None] = {}


def _mixed(kind: type[Exception]) -> type[TaskFailed] | None:
    if kind not in _classes:
        members = {
            "__module__": TaskFailed.__module__,
            "__reduce__": _reduce,
        }
        try:
            _classes[kind] = type(f"TaskFailed[{kind.__name__}]", (TaskFailed, kind), members)
        except Exception:  # the type cannot be a base class, or not together with TaskFailed
            _classes[kind] = None
    return _classes[kind]


def _reduce(failure: TaskFailed) -> tuple[Any, ...]:
    kind = type(failure).__bases__[1]  # the class itself cannot be imported by its name
    group: tuple[str, Sequence[Any]] = "", ()
    if isinstance(failure, ExceptionGroup):
        group = failure.message, failure.exceptions
    args = BaseException.args.__get__(failure)  # type: ignore[attr-defined]  # as above
    return _unpickle, (kind, args, vars(failure), dict(parts.slots(failure)), group)


def _unpickle(
    kind: type[Exception],
    args: Sequence[Any],
    facts: dict[str, Any],
    slots: dict[str, Any],
    group: tuple[str, Sequence[TaskFailed]],
) -> TaskFailed:
    mixed = _mixed(kind)
    made = None if mixed is None else _make(mixed, facts["_text"], {}, group)
    failure = TaskFailed("") if made is None else made
    _set_args(failure, args)
    vars(failure).update(facts)
    parts.restore(failure, slots)
    return failure
