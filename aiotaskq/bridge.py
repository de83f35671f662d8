"""Bridge from synchronous code to asyncio: one event loop in one background thread.

The thread starts at the first call, and all threads and applications of the process share it. A
forked child starts its own: threads do not survive a fork, and the child must not use the sockets
of its parent.

States: no thread, running, stopped. `stop` is called by `atexit`, when all threads of the program
have ended, so that each of them can send to its end. Python may start no thread by then, and its
executors take no work: the loop has one of ours. A call after that starts a new thread. A thread
that waits for a call may be interrupted by Ctrl-C at any point; the call is cancelled then.

In a program that gevent or eventlet has patched, the thread is a real one all the same. Its loop is
uvloop, which waits in C and uses no module that is patched. A greenlet that waits for a call reads
from a socket, as the libraries let the others run meanwhile; it may be killed at any point, and the
call is cancelled then.
"""

from __future__ import annotations

import _socket
import asyncio
import atexit
import contextlib
import socket
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from aiotaskq import forks, native

T = TypeVar("T")

_STOP_WAIT = 2.0  # seconds at exit for closing connections properly
_LOOKUPS = 8  # the most names that are looked up at once
_ENDINGS = (SystemExit, KeyboardInterrupt)  # they leave an event loop; the call gets them as well


class Bridge:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._lock = native.make_lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: native.Thread | None = None
        self._patched = False  # when the thread was started
        self._stopped: asyncio.Event

    def run(self, work: Coroutine[Any, Any, T], *, instead: str) -> T:
        """Run a coroutine in the background loop and return its value; the calling thread waits.

        Args:
            work: The coroutine. It is closed without running if this thread must not wait.
            instead: The code to use in async functions, for the error.

        Raises:
            RuntimeError: An event loop runs in this thread, and waiting would block it.
        """
        patched = native.is_patched()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self._wait(work, patched=patched)
        if patched and asyncio.current_task(loop) is None:  # it is another greenlet's
            return self._wait(work, patched=True)
        work.close()
        raise RuntimeError(
            f"an event loop is running in this thread, and this call would block it: use {instead}"
        )

    def _wait(self, work: Coroutine[Any, Any, T], *, patched: bool) -> T:
        try:
            call = self._begin(work, patched=patched)
        except BaseException:
            work.close()
            raise
        try:
            return call.result()
        except BaseException:
            call.cancel()  # Ctrl-C: nobody waits any more; no effect if it has ended
            raise

    def _begin(self, work: Coroutine[Any, Any, T], *, patched: bool) -> _GreenCall[T] | _Call[T]:
        while True:
            loop = self._running(patched=patched)
            try:
                return _GreenCall(work, loop) if patched else _Call(work, loop)
            except RuntimeError:
                if not loop.is_closed():  # else it has ended meanwhile, and there is another now
                    raise

    def _running(self, *, patched: bool) -> asyncio.AbstractEventLoop:
        # Greenlets do not switch in here: the lock and the wait are those of the system.
        with self._lock:
            if patched is not self._patched:
                # The loop uses modules that were patched meanwhile. Its thread is left alone: as
                # it began before that, Python would complain of its end.
                self._loop = self._thread = None
                self._patched = patched
            if self._loop is None:
                started = native.make_lock()
                started.acquire()
                self._thread = native.Thread(lambda: self._main(started), name="aiotaskq-bridge")
                self._thread.start()
                started.acquire()
            if self._loop is None:
                raise RuntimeError("no event loop could be started in the background; see stderr")
            return self._loop

    def _main(self, started: Any) -> None:
        try:
            loop = _new_loop()
            try:
                with contextlib.suppress(*_ENDINGS):
                    loop.run_until_complete(self._serve(started))
            finally:
                _say(started)  # first: who waits for this has the lock
                self._forget(loop)
                _close(loop)
        finally:
            _say(started)  # it could not start, for example without file descriptors

    async def _serve(self, started: Any) -> None:
        loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._loop = loop
        started.release()
        await self._stopped.wait()

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._loop is loop:  # it was not stopped, and the next call starts another
                self._loop = self._thread = None

    def stop(self) -> None:
        """End the thread, if there is one; connections are closed properly."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            if loop is None or thread is None:
                return
            stopped = self._stopped
        with contextlib.suppress(RuntimeError):  # a call has ended it meanwhile
            loop.call_soon_threadsafe(stopped.set)
        thread.join(_STOP_WAIT)


def _say(started: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it was said before
        started.release()


def _new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that can look names up while the interpreter ends."""
    new = asyncio.new_event_loop
    if native.is_patched():
        with contextlib.suppress(ImportError):  # PyPy
            from uvloop import new_event_loop as new
    loop = new()
    try:
        loop.set_default_executor(native.Threads(_LOOKUPS))
    except BaseException:
        loop.close()
        raise
    return loop


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop: its tasks are cancelled, and close their connections.

    `asyncio.run` would then start a thread that waits for the executor of the loop, and Python
    starts none while it ends.
    """
    try:
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            with contextlib.suppress(*_ENDINGS):  # the other calls are to hear of their ends too
                loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


class _Call(Generic[T]):
    """A coroutine in the background loop, and a thread that waits for its end."""

    def __init__(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self._future = asyncio.run_coroutine_threadsafe(work, loop)

    def result(self) -> T:
        return self._future.result()

    def cancel(self) -> None:
        self._future.cancel()


class _GreenCall(Generic[T]):
    """The same, with a greenlet that waits.

    The loop's thread uses `_ended` only, which is a socket without Python's part of it: that part
    is patched, and belongs to the thread of the greenlets.
    """

    def __init__(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        waits, self._ended = _socket.socketpair()
        self._ended.setblocking(False)
        self._waits = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=waits.detach())
        try:
            # Else it would have the default timeout of the program's sockets.
            self._waits.settimeout(None)
            loop.call_soon_threadsafe(self._begin, work)
        except BaseException:
            self._waits.close()
            self._ended.close()
            raise

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        self._ended.close()  # ends the reading

    def result(self) -> T:
        try:
            self._waits.recv(1)
        finally:
            self._waits.close()
        assert self._task is not None  # it has ended
        return self._task.result()

    def cancel(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


_bridge = Bridge()
_inherited: list[Bridge] = []


def _begin_anew() -> None:
    global _bridge
    # Kept, not dropped: collecting the parent's loop here would unregister the parent's sockets
    # from the epoll instance that both processes share.
    _inherited.append(_bridge)
    _bridge = Bridge()


forks.register(in_child=_begin_anew)


@atexit.register
def stop() -> None:
    """Stop the background loop; the next use starts another."""
    _bridge.stop()


def run(work: Coroutine[Any, Any, T], *, instead: str) -> T:
    """Run a coroutine on the background loop of this process; see `Bridge.run`."""
    return _bridge.run(work, instead=instead)
