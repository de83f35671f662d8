"""A pool of processes for plain functions that keep the interpreter busy, such as parsing.

Each process runs one task at a time over a pipe of its own. So the death of a process (a
segmentation fault, the out-of-memory killer) fails the task that it ran and no other. Nothing is
pickled: a process gets the bytes of the message, decodes the arguments itself, and sends the
encoded result back.

::

    idle ──▶ busy: one thread of the worker sends the request and waits for the reply ──▶ idle
                   │
                   ├ the process dies: the task fails with `ProcessDied`
                   └ the call is cancelled: the process is killed

Only the thread that talks to a process puts it back or collects it. An abort comes from the event
loop, so the two meet under a lock (`_Exchange`): a process that has already replied may be running
another task by then, and must not be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from inspect import isawaitable
from multiprocessing import connection
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import msgspec
from msgspec import Raw

from aiotaskq.context import State, TaskContext, enter
from aiotaskq.encoding.codec import Codec
from aiotaskq.encoding.exceptions import describe
from aiotaskq.errors import (
    AioTaskQError,
    Reject,
    RetryLater,
    Snooze,
    SoftTimeLimitExceeded,
    Verdict,
)
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.tasks.task import Task
from aiotaskq.worker.interrupt import wait_for
from aiotaskq.worker.thread_pool import ThreadPool

_STOP_WAIT = 1.0  # seconds that an idle process gets to exit by itself


class ProcessDied(AioTaskQError):
    """The process that ran a task ended before the task did."""


class ProcessRequest(msgspec.Struct, frozen=True):
    """A request to run one task."""

    module: str
    qualname: str
    body: bytes
    worker: str
    soft_timeout: float | None = None
    keeps_result: bool = True


class ProcessVerdict(msgspec.Struct, frozen=True):
    """A `Verdict` that a task raised, as data."""

    kind: str
    reason: str
    delay: float | None = None
    most: float | None = None  # attempts


class ProcessReply(msgspec.Struct, frozen=True):
    """The end of a task: its encoded value, or its encoded error and traceback."""

    value: bytes | None = None
    error: bytes | None = None
    traceback: str = ""
    verdict: ProcessVerdict | None = None
    is_final: bool = False


class RemoteFailure(Exception):
    """An exception that a task raised in a process of the pool, encoded.

    Attributes:
        error: The encoded error.
        traceback: Its traceback.
        verdict: The verdict that the task raised, if it was one; `error` is its cause then.
        is_final: Whether another attempt would fail in the same way.
    """

    def __init__(
        self, error: Raw, traceback: str, verdict: Verdict | None = None, *, is_final: bool = False
    ) -> None:
        super().__init__(traceback)
        self.error = error
        self.traceback = traceback
        self.verdict = verdict
        self.is_final = is_final


class ProcessPool:
    """Runs tasks in up to `size` processes, which are started when needed.

    It belongs to one event loop.

    Args:
        size: The most processes.
        codec_settings: The keyword arguments of the application's `Codec`.
        worker: The name of the worker, for the context of tasks.
    """

    def __init__(self, size: int, codec_settings: dict[str, Any], *, worker: str) -> None:
        self.size = size
        self._codec_settings = codec_settings
        self._worker = worker
        self._threads = ThreadPool(size, name="aiotaskq-process")  # one to talk to each process
        self._idle: deque[_Process] = deque()
        self._busy: set[_Process] = set()

    async def run(
        self,
        task: TaskDefinition,
        body: bytes,
        soft_timeout: float | None = None,
        *,
        keeps_result: bool = True,
    ) -> Raw:
        """Run the message of a task in a process and return the encoded result.

        Cancelling the call ends the process that runs the task.

        Args:
            task: The task.
            body: The encoded message.
            soft_timeout: Seconds after which `SoftTimeLimitExceeded` is raised in the function.
            keeps_result: Whether the result is encoded; if not, it is null.

        Raises:
            RemoteFailure: The task raised an exception.
            ProcessDied: The process ended before the task did.
        """
        fn = task.fn
        request = ProcessRequest(
            fn.__module__, fn.__qualname__, body, self._worker, soft_timeout, keeps_result
        )
        exchange = _Exchange(request)
        try:
            reply = await self._threads.run(self._talk, exchange)
        except BaseException:
            exchange.abort()
            raise
        if reply.value is None:
            verdict = reply.verdict and _understand(reply.verdict)
            raise RemoteFailure(
                Raw(reply.error or b"null"), reply.traceback, verdict, is_final=reply.is_final
            )
        return Raw(reply.value)

    def _talk(self, exchange: _Exchange) -> ProcessReply:
        """Do an exchange with a process; called in a thread.

        There are as many threads as processes, so a thread that gets here finds a process. Only
        this thread puts the process back or collects it, even if the call is cancelled.
        """
        process = self._take()
        try:
            reply = exchange.do(process)
        except BaseException:
            self._busy.discard(process)
            process.end()
            raise
        self._busy.discard(process)
        self._idle.append(process)
        return reply

    def _take(self) -> _Process:
        process = self._find_idle() or _Process(self._codec_settings)
        self._busy.add(process)
        return process

    def _find_idle(self) -> _Process | None:
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return None
            if process.alive():
                return process
            process.end()  # something killed it while it was idle

    async def close(self) -> None:
        """End all processes, at once if they are busy."""
        for process in list(self._busy):
            process.kill()
        await self._threads.run(self._stop)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_WAIT):
                await self._threads.drained()  # they collect the killed processes
        await self._threads.close()

    def _stop(self) -> None:
        while self._idle:
            self._idle.pop().end(_STOP_WAIT)


class _Exchange:
    """One request and its reply; a thread begins it, and the event loop may abort it."""

    def __init__(self, request: ProcessRequest) -> None:
        self._request = request
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._aborted = False

    def do(self, process: _Process) -> ProcessReply:
        with self._lock:
            if self._aborted:
                raise ProcessDied("it was cancelled before it began")
            self._process = process
        try:
            return process.ask(self._request)
        finally:
            with self._lock:
                self._process = None  # from now on the process may run another task

    def abort(self) -> None:
        """Kill the process that runs the request; if none does yet, prevent that."""
        with self._lock:
            self._aborted = True
            if self._process is not None:
                self._process.kill()


class _Process:
    """A process and the pipe to it."""

    def __init__(self, codec_settings: dict[str, Any]) -> None:
        # Spawned, not forked: the worker has threads and sockets, which a fork would share.
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=serve, args=(theirs, codec_settings), name="aiotaskq-pool", daemon=True
        )
        self._process.start()
        theirs.close()  # so that its death ends our reading

    def ask(self, request: ProcessRequest) -> ProcessReply:
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(request))
            # Not the pipe alone: a child of the process may have a copy of its other end.
            if self._pipe not in connection.wait([self._pipe, self._process.sentinel]):
                raise EOFError
            return msgspec.msgpack.decode(self._pipe.recv_bytes(), type=ProcessReply)
        except (EOFError, OSError):
            self._process.join(_STOP_WAIT)  # it is about to end, unless it closed the pipe itself
            how = _how(self._process.exitcode)
            raise ProcessDied(f"the process that ran it ended under it, {how}") from None

    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """Kill the process, from any thread; the thread that talks to it collects it."""
        with contextlib.suppress(ValueError):  # it was collected meanwhile
            self._process.kill()

    def end(self, wait: float = 0.0) -> None:
        """End and collect the process, after `wait` seconds to exit by itself."""
        self._pipe.close()  # an idle process exits when its pipe ends
        self._process.join(wait)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _how(exit_code: int | None) -> str:
    if exit_code is None:
        return "though it goes on without its pipe"
    if exit_code < 0:
        return f"by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return f"with exit status {exit_code}"


def serve(pipe: Connection, codec_settings: dict[str, Any]) -> None:
    """Run requests one after another until the pipe ends: the main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker handles Ctrl-C
    # The worker handles SIGTERM as well, which a service manager sends to all processes of a
    # service at once. Not SIG_IGN here: programs that the user's code starts would inherit it.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    codec = Codec(**codec_settings)
    while True:
        try:
            request = msgspec.msgpack.decode(pipe.recv_bytes(), type=ProcessRequest)
        except (EOFError, OSError):
            return
        pipe.send_bytes(msgspec.msgpack.encode(_run(request, codec)))


def _exit_with_parent() -> None:
    """Exit at once when the worker dies: another worker gets the task that runs here."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(request: ProcessRequest, codec: Codec) -> ProcessReply:
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
                value = asyncio.run(wait_for(value))
        if context.verdict is not None:
            raise context.verdict
        return _reply(task, value if request.keeps_result else None, codec)
    except BaseException as raised:  # SystemExit included: it ends the task only
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


def _understand(said: ProcessVerdict) -> Verdict:
    if said.kind == "retry":
        return RetryLater(said.delay, said.reason, max_attempts=said.most)
    if said.kind == "snooze":
        return Snooze(said.delay or 0.0, said.reason)
    return Reject(said.reason)


def _find(request: ProcessRequest) -> Task[Any, Any]:
    found: Any = importlib.import_module(request.module)
    for part in request.qualname.split("."):
        found = getattr(found, part)
    if not isinstance(found, Task):
        raise TypeError(
            f"{request.module}.{request.qualname} is no task there: a task that runs in a process"
            " must be bound to its own name"
        )
    return found
