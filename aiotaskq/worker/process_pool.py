"""A pool of processes for plain functions that keep the interpreter busy, such as parsing.

Each process runs one task at a time over a pipe of its own. So the death of a process (a
segmentation fault, the out-of-memory killer) fails the task that it ran and no other. Nothing is
pickled: a process gets the bytes of the message, decodes the arguments itself, and sends the
encoded result back. `aiotaskq.worker.pool_process` has the process itself.

::

    prepare: a process with the module ──▶ run: the function ──▶ idle
        │                                   │
        │                                   ├ the process dies: the task fails with `ProcessDied`
        │                                   └ the call is cancelled: the process is killed
        ├ no process, or no module: the same, and `run` tells it
        └ the call is cancelled: the process is killed

A task is prepared before its time limits begin: a process may take seconds to start, and to import
the modules of the user. The process is *reserved* from then on, for the asyncio task that has
prepared it, until `run` takes it or that asyncio task ends.

One thread of the worker does an exchange with a process: it sends a request and waits for the
reply. Only that thread puts the process back or collects it. An abort comes from the event loop, so
the two meet under a lock (`_Exchange`): a process that has already replied may be running another
task by then, and must not be killed. A reservation may be given up while a thread prepares its
process; they meet under a lock as well (`_Reservation`).

The event loop and the threads take processes and put them back under the lock of the pool. So a
process is either idle or busy: none is started while one is idle, and none is idle in a closed
pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from contextvars import ContextVar
from typing import Any

import msgspec
from msgspec import Raw

from aiotaskq.errors import AioTaskQError, Verdict
from aiotaskq.forks import keep_private
from aiotaskq.processes.operating_system import start_process, wait_for
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.worker.pool_process import ImportModule, PoolRequest, ProcessReply, RunTask, serve
from aiotaskq.worker.thread_pool import ThreadPool

_STOP_WAIT = 1.0  # seconds that an idle process gets to exit by itself
_IMPORT_LIMIT = 600.0  # seconds that a process may take to start and to import a module


class ProcessDied(AioTaskQError):
    """The process that ran a task ended before the task did."""


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
        size: The most processes. The callers see to it that no more tasks run at once.
        codec_settings: The keyword arguments of the application's `Codec`.
        worker: The name of the worker, for the context of tasks.
        end_orphans: Whether children that tasks have left behind end with their process.
    """

    def __init__(
        self, size: int, codec_settings: dict[str, Any], *, worker: str, end_orphans: bool = True
    ) -> None:
        self.size = size
        self._codec_settings = codec_settings
        self._worker = worker
        self._end_orphans = end_orphans
        self._threads = ThreadPool(size, name="aiotaskq-process")  # one to talk to each process
        self._lock = threading.Lock()  # held while these change
        self._idle: deque[_Process] = deque()
        self._busy: set[_Process] = set()
        self._closed = False

    async def prepare(self, task: TaskDefinition) -> None:
        """Reserve a process that has imported the module of a task, for the next `run` here.

        A failure is raised by `run`. Cancelling the call ends the process.
        """
        module = task.fn.__module__
        reservation = _Reservation()
        _reserved.set(reservation)
        exchange = _Exchange(ImportModule(module), within=_IMPORT_LIMIT)
        current = asyncio.current_task()
        assert current is not None
        current.add_done_callback(lambda _: self._give_back(reservation))
        ready = self._take_ready(module)
        if ready is not None:
            reservation.keep(ready)
            return
        try:
            prepared = self._threads.run(self._prepare, module, reservation, exchange)
        except RuntimeError as error:  # no thread can be started
            reservation.failure = error
            return
        try:
            await prepared
        except BaseException:
            exchange.abort()
            self._give_back(reservation)
            raise

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
            RemoteFailure: The task raised an exception, or its module cannot be imported.
            ProcessDied: The process ended before the task did.
            OSError: No process can be started.
            RuntimeError: No thread can be started to talk to it.
        """
        fn = task.fn
        request = RunTask(
            fn.__module__, fn.__qualname__, body, self._worker, soft_timeout, keeps_result
        )
        reservation = _reserved.get(None) or _Reservation()
        if reservation.failure is not None:
            raise reservation.failure
        exchange = _Exchange(request)
        try:
            reply = await self._threads.run(self._talk, reservation, exchange)
        except BaseException:
            exchange.abort()
            raise
        if reply.value is None:
            raise _failure(reply)
        return Raw(reply.value)

    def _prepare(self, module: str, reservation: _Reservation, exchange: _Exchange) -> None:
        """Find or start a process for a reservation and have it import a module; in a thread."""
        try:
            process = self._take(module)
        except OSError as error:
            reservation.failure = error
            return
        try:
            if module not in process.modules:
                reply = exchange.do(process)
                if reply.value is None:
                    reservation.failure = _failure(reply)
                else:
                    process.modules.add(module)
        except BaseException as error:
            self._end(process)
            if not isinstance(error, ProcessDied):
                raise
            reservation.failure = error
            return
        if reservation.failure is not None or not reservation.keep(process):
            self._put_back(process)

    def _talk(self, reservation: _Reservation, exchange: _Exchange) -> ProcessReply:
        """Do an exchange with the reserved process, or another one; called in a thread.

        There are as many threads as processes, so a thread that gets here finds a process. Only
        this thread puts the process back or collects it, even if the call is cancelled.
        """
        process = reservation.take() or self._take()
        try:
            reply = exchange.do(process)
        except BaseException:
            self._end(process)
            raise
        self._put_back(process)
        return reply

    def _take(self, module: str | None = None) -> _Process:
        """Return an idle process, best one with a module, or a new one; it counts as busy."""
        process = self._take_idle(module)
        if process is None:
            process = _Process(self._codec_settings, self._end_orphans)
            with self._lock:
                self._busy.add(process)
                if self._closed:
                    process.kill()
        return process

    def _take_ready(self, module: str) -> _Process | None:
        """Return the process that was idle last, if it needs no preparation."""
        if not self._lock.acquire(blocking=False):
            return None  # the loop does not wait: a thread finds one
        try:
            if self._idle and module in self._idle[-1].modules and self._idle[-1].alive():
                process = self._idle.pop()
                self._busy.add(process)
                return process
        finally:
            self._lock.release()
        return None

    def _take_idle(self, module: str | None) -> _Process | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                latest = self._idle[-1]
                best = (one for one in (latest, *self._idle) if module in one.modules)
                process = next(best, latest)
                self._idle.remove(process)
                self._busy.add(process)
            if process.alive():
                return process
            self._end(process)  # something killed it while it was idle

    def _put_back(self, process: _Process) -> None:
        with self._lock:
            if not self._closed:
                self._busy.discard(process)
                self._idle.append(process)
                return
        self._end(process)

    def _end(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
        process.end()

    def _give_back(self, reservation: _Reservation) -> None:
        """Put back the process of a reservation, if it still has one."""
        process = reservation.give_up()
        if process is not None:
            self._put_back(process)

    async def close(self) -> None:
        """End all processes, at once if they are busy."""
        with self._lock:
            self._closed = True
            busy, idle = list(self._busy), list(self._idle)
            self._idle.clear()
        for process in busy:
            process.kill()
        if idle:
            await self._threads.run(_stop, idle)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_WAIT):
                await self._threads.drained()  # they collect the killed processes
        await self._threads.close()


def _stop(processes: list[_Process]) -> None:
    for process in processes:
        process.end(_STOP_WAIT)


def _failure(reply: ProcessReply) -> RemoteFailure:
    verdict = None if reply.verdict is None else reply.verdict.understand()
    return RemoteFailure(
        Raw(reply.error or b"null"), reply.traceback, verdict, is_final=reply.is_final
    )


class _Reservation:
    """A process for one asyncio task, from `prepare` to `run`; given up at the latest at its end.

    Attributes:
        failure: The reason why there is no process; None: there is one, or `run` has had it.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._given_up = False

    def keep(self, process: _Process) -> bool:
        """Keep a process, unless the reservation was given up; return whether it did."""
        with self._lock:
            if not self._given_up:
                self._process = process
            return not self._given_up

    def take(self) -> _Process | None:
        """Return the process, which is the caller's from then on; None: there is none."""
        with self._lock:
            process, self._process = self._process, None
            return process

    def give_up(self) -> _Process | None:
        """Return the process, and keep none from now on."""
        with self._lock:
            self._given_up = True
            process, self._process = self._process, None
            return process


_reserved: ContextVar[_Reservation] = ContextVar("aiotaskq.process")


class _Exchange:
    """One request and its reply; a thread begins it, and the event loop may abort it."""

    def __init__(self, request: PoolRequest, within: float | None = None) -> None:
        self._request = request
        self._within = within
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._aborted = False

    def do(self, process: _Process) -> ProcessReply:
        with self._lock:
            if self._aborted:
                raise ProcessDied("it was cancelled before it began")
            self._process = process
        try:
            return process.ask(self._request, self._within)
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
    """A process and the pipe to it.

    Attributes:
        modules: The modules that it has imported for tasks.
    """

    def __init__(self, codec_settings: dict[str, Any], end_orphans: bool) -> None:
        self.modules: set[str] = set()
        self._end_orphans = end_orphans
        self._ended = False
        self._pipe, theirs = multiprocessing.Pipe()
        keep_private(self._pipe.fileno())
        try:
            # Spawned, not forked: the worker has threads, whose locks a fork would copy.
            self._child = start_process(
                serve,
                (theirs, codec_settings, end_orphans),
                name="aiotaskq-pool",
                ignore_stop_signals=True,  # until it handles them itself
                daemon=True,
                spawn=True,
            )
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()  # so that its death ends our reading

    def ask(self, request: PoolRequest, within: float | None) -> ProcessReply:
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(request))
            # Not the pipe alone: a child of the process may have a copy of its other end.
            wait_for([self._pipe], [self._child], within)
            if self._pipe.poll():
                return msgspec.msgpack.decode(self._pipe.recv_bytes(), type=ProcessReply)
        except (EOFError, OSError):
            pass  # told below
        else:
            if self._child.is_alive():
                raise ProcessDied(
                    f"the process that was to run it was not ready within {within:g} s"
                )
        self._child.join(_STOP_WAIT)  # it is about to end, unless it closed the pipe itself
        how = "though it goes on without its pipe" if self._child.is_alive() else None
        status = self.end()
        raise ProcessDied(f"the process that ran it ended under it, {how or _how(status)}")

    def alive(self) -> bool:
        return self._child.is_alive()

    def kill(self) -> None:
        """Kill the process, from any thread; the thread that talks to it collects it."""
        self._child.send_signal(signal.SIGKILL)
        if self._end_orphans:
            self._child.signal_group(signal.SIGKILL)

    def end(self, wait: float = 0.0) -> int | None:
        """End and collect the process, after `wait` seconds to exit by itself.

        Returns:
            Its exit status; None: it is not known.
        """
        if self._ended:
            return None
        self._ended = True
        self._pipe.close()  # an idle process exits when its pipe ends
        if self._end_orphans and wait:
            self._child.signal_group(signal.SIGTERM)
        self._child.join(wait)
        self.kill()
        return self._child.collect()


def _how(status: int | None) -> str:
    if status is None:
        return "with an exit status that other code has taken"
    if status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with exit status {status}"
