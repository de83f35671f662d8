"""The sync door: one event loop in one background thread, for code that cannot await.

Made at the first use, shared by all threads and all apps of the process. A forked child makes
its own: the parent's thread is not there, and the parent's sockets are not touched.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 - see the end of this module
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_STOP_WAIT = 2.0  # seconds at exit for connections to be closed in order


class Bridge:
    """A loop in a daemon thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped: asyncio.Event
        self._calls: set[Future[Any]] = set()  # that a thread waits for

    def run(self, work: Coroutine[Any, Any, T], *, instead: str) -> T:
        """Run a coroutine there and return its value; the calling thread waits.

        Args:
            work: Closed unrun if this thread may not wait.
            instead: What async code should write, for the error.

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
            future.cancel()  # Ctrl-C: nobody waits any more; of no effect if it has ended
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
            started.set()  # though it could not start, such as for want of file descriptors

    def _serve(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._stopped = asyncio.Event()
            started.set()
            await self._stopped.wait()

        asyncio.run(serve())  # its end cancels what still runs, which closes the connections

    @property
    def busy(self) -> bool:
        """Whether a thread waits for it."""
        return bool(self._calls)

    def stop(self) -> None:
        """End the thread, if there is one, and let connections be closed in order."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._stopped.set)
            thread.join(_STOP_WAIT)


_bridge = Bridge()
_inherited: list[Bridge] = []


def _after_fork() -> None:
    global _bridge
    # Kept, not dropped: collecting the parent's loop here would unregister the parent's sockets
    # from the epoll instance that both processes share.
    _inherited.append(_bridge)
    _bridge = Bridge()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def stop() -> None:
    """Stop the background loop; the next use starts another."""
    _bridge.stop()


def _stop_if_idle() -> None:
    # Threads of the program may still go on, and wait for us: then `stop` comes later.
    if not _bridge.busy:
        _bridge.stop()


# By the time of `atexit`, the executors of the standard library take no more work, and closing a
# connection may need one. This hook is the one that they themselves use; the last one registered
# runs first, so that theirs is registered by now.
with contextlib.suppress(AttributeError, RuntimeError):
    threading._register_atexit(_stop_if_idle)  # type: ignore[attr-defined]  # private: the rest works without


def run(work: Coroutine[Any, Any, T], *, instead: str) -> T:
    """Run a coroutine on the background loop of this process; see `Bridge.run`."""
    return _bridge.run(work, instead=instead)
