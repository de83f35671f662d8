"""A process of the pool, from its first line to its end, and the messages with it.

Theory of operation. The process reads requests from a pipe and answers each with one reply, in
order. It first imports the module of a task, which may take long and does not count against the
limits of the task, and then runs tasks. To the user's code it looks like a program of its own:

- It may have children, of `multiprocessing` too. They are in a process group which it leads, so
  that they can be ended with it. A child that comes back from the task's function is ended.
- The stop signals of the terminal or a service manager are left to the worker. They are handled by
  a function that does nothing, and not ignored: programs that a task starts would inherit that.
- Each task runs in a context of its own, so that context variables do not pass from one to another.

The process ends when its pipe does, or with the worker. It looks at the worker itself for that, as
other processes may hold the other end of the pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import os
import signal
from collections.abc import Iterator
from inspect import isawaitable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeAlias

import msgspec

from aiotaskq import forks
from aiotaskq.context import State, TaskContext, enter
from aiotaskq.encoding.codec import Codec
from aiotaskq.encoding.exceptions import describe
from aiotaskq.errors import Reject, RetryLater, Snooze, SoftTimeLimitExceeded, Verdict
from aiotaskq.processes.parent import watch_parent
from aiotaskq.processes.standard_streams import guard_streams
from aiotaskq.tasks.task import Task
from aiotaskq.worker.interrupt import as_coroutine


class ImportModule(msgspec.Struct, frozen=True, tag=True):
    """A request to import the module of a task."""

    module: str


class RunTask(msgspec.Struct, frozen=True, tag=True):
    """A request to run one task."""

    module: str
    qualname: str
    body: bytes
    worker: str
    soft_timeout: float | None = None
    keeps_result: bool = True


PoolRequest: TypeAlias = ImportModule | RunTask


class ProcessVerdict(msgspec.Struct, frozen=True):
    """A `Verdict` that a task raised, as data."""

    kind: str
    reason: str
    delay: float | None = None
    most: float | None = None  # attempts

    def understand(self) -> Verdict:
        """Return the verdict."""
        if self.kind == "retry":
            return RetryLater(self.delay, self.reason, max_attempts=self.most)
        if self.kind == "snooze":
            return Snooze(self.delay or 0.0, self.reason)
        return Reject(self.reason)


class ProcessReply(msgspec.Struct, frozen=True):
    """The end of a request: an encoded value, or an encoded error and its traceback."""

    value: bytes | None = None
    error: bytes | None = None
    traceback: str = ""
    verdict: ProcessVerdict | None = None
    is_final: bool = False  # another attempt would end in the same way


_requests: msgspec.msgpack.Decoder[PoolRequest] = msgspec.msgpack.Decoder(PoolRequest)


def serve(pipe: Connection, codec_settings: dict[str, Any], end_orphans: bool) -> None:
    """Answer requests one after another until the pipe ends: the main function of a process.

    Args:
        pipe: The pipe to the worker.
        codec_settings: The keyword arguments of the application's `Codec`.
        end_orphans: Whether the children of this process end with it when the worker dies.
    """
    guard_streams()
    os.setpgrp()
    for number in forks.STOP_SIGNALS:
        signal.signal(number, _leave_to_worker)
    forks.keep_private(pipe.fileno())
    watch_parent(
        # The group includes this process.
        lambda: os.killpg(0, signal.SIGKILL) if end_orphans else None,
        patience=0.0,
        on_exit=lambda: None,
    )
    codec = Codec(**codec_settings)
    while True:
        try:
            request = _requests.decode(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        if isinstance(request, ImportModule):
            reply = _import(request.module)
        else:
            reply = contextvars.copy_context().run(_run, request, codec)
        pipe.send_bytes(msgspec.msgpack.encode(reply))


def _leave_to_worker(number: int, frame: FrameType | None) -> None:
    """Handle a signal that the worker handles."""


def _import(module: str) -> ProcessReply:
    generation = forks.generation
    try:
        importlib.import_module(module)
    except BaseException as error:  # SystemExit included: the next task may be of another module
        forks.end_child(generation, error)
        failed = ImportError(
            f"the module {module} of the task cannot be imported in a process of the pool:"
            f" {type(error).__name__}: {error}"
        )
        failed.__cause__ = error
        encoded, traceback = describe(failed)
        return ProcessReply(error=bytes(encoded), traceback=traceback)
    return ProcessReply(value=b"null")


def _run(request: RunTask, codec: Codec) -> ProcessReply:
    generation = forks.generation
    context = None
    try:
        task = _find(request)
        message = codec.decode_message(request.body)
        args, kwargs = task.arguments.load(message, request.body)
        context = TaskContext(message, args, kwargs, state=State(), worker=request.worker)
        enter(context)
        with _told_in(request.soft_timeout):
            value = task.call(*args, **kwargs)
            if isawaitable(value):  # a plain function around a coroutine function
                value = asyncio.run(as_coroutine(value))
        forks.end_child(generation)
        if context.verdict is not None:
            raise context.verdict
        return _reply(task, value if request.keeps_result else None, codec)
    except BaseException as raised:  # SystemExit included: it ends the task only
        forks.end_child(generation, raised)
        error = raised if context is None else context.judge(raised)
        shown = error.__cause__ if isinstance(error, RetryLater) and error.__cause__ else error
        encoded, traceback = describe(shown)
        return ProcessReply(error=bytes(encoded), traceback=traceback, verdict=_say(error))


def _reply(task: Task[Any, Any], value: Any, codec: Codec) -> ProcessReply:
    try:
        return ProcessReply(value=bytes(codec.encode_result(value, task.arguments.result())))
    except Exception as error:  # methods of the value may raise anything
        encoded, traceback = describe(error)
        return ProcessReply(error=bytes(encoded), traceback=traceback, is_final=True)


@contextlib.contextmanager
def _told_in(seconds: float | None) -> Iterator[None]:
    """Raise `SoftTimeLimitExceeded` in the block after some seconds; in the main thread only."""
    if seconds is None:
        yield
        return

    def tell(number: int, frame: FrameType | None) -> None:
        raise SoftTimeLimitExceeded(f"it ran longer than its soft_timeout of {seconds:g} s")

    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _say(error: BaseException) -> ProcessVerdict | None:
    match error:
        case RetryLater():
            return ProcessVerdict("retry", error.reason, error.delay, error.max_attempts)
        case Snooze():
            return ProcessVerdict("snooze", error.reason, error.delay)
        case Reject():
            return ProcessVerdict("reject", error.reason)
    return None


def _find(request: RunTask) -> Task[Any, Any]:
    found: Any = importlib.import_module(request.module)
    for part in request.qualname.split("."):
        found = getattr(found, part)
    if not isinstance(found, Task):
        raise TypeError(
            f"{request.module}.{request.qualname} is no task there: a task that runs in a process"
            " must be bound to its own name"
        )
    return found
