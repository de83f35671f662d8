"""Bridge from synchronous code to asyncio: one event loop in one background thread.

The thread starts at the first call, and all threads and applications of the process share it. A
forked child starts its own: threads do not survive a fork, and the child must not use the sockets
of its parent.

States: no thread, running, stopped. `stop` is called at the exit of the process, by `atexit` or
earlier by a hook of `threading`; a call after that starts a new thread. A thread that waits for a
call may be interrupted by Ctrl-C at any point; the call is cancelled then.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 - see the hook at the end of this module
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from aiotaskq import forks

T = TypeVar("T")

_STOP_WAIT = 2.0  # seconds at exit for closing connections properly


class Bridge:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped: asyncio.Event
        self._calls: set[Future[Any]] = set()  # calls that a thread waits for

    def run(self, work: Coroutine[Any, Any, T], *, instead: str) -> T:
        """Run a coroutine in the background loop and return its value; the calling thread waits.

        Args:
            work: The coroutine. It is closed without running if this thread must not wait.
            instead: The code to use in async functions, for the error.

        Raises:
            RuntimeError: An event loop runs in this thread, and waiting would block it.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._wait(work)
        work.close()
        raise RuntimeError(
            f"an event loop is running in this thread, and this call would block it: use {instead}"
        )

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._running())
        except BaseException:
            work.close()
            raise
        self._calls.add(future)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits any more; no effect if it has ended
            raise
        finally:
            self._calls.discard(future)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                started: threading.Event = threading.Event()
                self._thread = threading.Thread(
                    target=self._main, args=(started,), name="aiotaskq-bridge", daemon=True
                )
                self._thread.start()
                started.wait()
            if self._loop is None:
                raise RuntimeError("no event loop could be started in the background; see stderr")
            return self._loop

    def _main(self, started: threading.Event) -> None:
        try:
            self._serve(started)
        finally:
            started.set()  # also if it could not start, for example without file descriptors

    def _serve(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._stopped = asyncio.Event()
            started.set()
            await self._stopped.wait()

        asyncio.run(serve())  # at its end it cancels all tasks, and they close their connections

    @property
    def busy(self) -> bool:
        """Return whether a thread waits for the result of a call."""
        return bool(self._calls)

    def stop(self) -> None:
        """End the thread, if there is one; connections are closed properly."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._stopped.set)
            thread.join(_STOP_WAIT)


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


def _stop_if_idle() -> None:
    # Threads of the program may still run and wait for calls. Then `stop` is called by `atexit`.
    if not _bridge.busy:
        _bridge.stop()


# When `atexit` runs, the executors of the standard library take no more work, and closing a
# connection may need one. So the bridge stops earlier, in the hook that the executors use.
# The hook that is registered last runs first: the import at the top registers theirs before ours.
with contextlib.suppress(AttributeError, RuntimeError):
    threading._register_atexit(_stop_if_idle)  # type: ignore[attr-defined]  # private; without it, only `atexit` is used


def run(work: Coroutine[Any, Any, T], *, instead: str) -> T:
    """Run a coroutine on the background loop of this process; see `Bridge.run`."""
    return _bridge.run(work, instead=instead)
