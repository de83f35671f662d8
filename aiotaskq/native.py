"""Real threads and locks, also in a program that gevent or eventlet has patched.

These libraries replace the threads of Python by greenlets of the thread that starts them. An event
loop in such a "thread" would be one in the caller's own thread, where it blocks everything, and
asyncio takes every other greenlet there for code that the loop runs. So threads of ours that run
beside the caller are started here. They must not use what the libraries have replaced: a lock of
theirs belongs to the greenlets of one thread.

A program may be patched before or after the package is imported. Each call asks anew.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import sys
import threading
from _queue import SimpleQueue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "SimpleQueue",
    "Thread",
    "Threads",
    "is_patched",
    "make_future",
    "make_lock",
    "make_reentrant_lock",
]


def is_patched() -> bool:
    """Return whether greenlets take the place of threads, or wait where threads would."""
    gevent, eventlet = _libraries()
    return (
        gevent is not None
        and (gevent.is_module_patched("threading") or gevent.is_module_patched("socket"))
    ) or (
        eventlet is not None
        and (eventlet.is_monkey_patched("thread") or eventlet.is_monkey_patched("socket"))
    )


def _libraries() -> tuple[Any, Any]:
    """Return the modules that patch, if they are loaded: gevent's and eventlet's."""
    return sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")


def _original(name: str) -> Any:
    """Return a function of `_thread` as it was before it was patched."""
    gevent, eventlet = _libraries()
    if gevent is not None and gevent.is_module_patched("threading"):
        return gevent.get_original("_thread", name)
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return getattr(eventlet.original("_thread"), name)
    return getattr(_thread, name)


def make_lock() -> Any:
    """Return a lock of the system, for code between whose two ends nothing waits."""
    return _original("allocate_lock")()


def make_reentrant_lock() -> Any:
    """Return such a lock that its thread may take several times."""
    return _original("RLock")()


def make_future() -> Future[Any]:
    """Return a future that one thread sets and another one gets by a callback."""
    future: Future[Any] = Future()
    if is_patched():
        future._condition = threading.Condition(make_reentrant_lock())
    return future


class Thread:
    """A daemon thread of the system.

    Args:
        target: The function that it runs.
        name: Its name, where Python knows about the thread.
    """

    def __init__(self, target: Callable[[], object], *, name: str) -> None:
        self._target = target
        self._name = name
        self._ended = make_lock()

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: There can be no more threads, or the interpreter ends.
        """
        self._ended.acquire()
        try:
            if is_patched():
                _original("start_new_thread")(self._main, ())
            else:
                threading.Thread(target=self._main, name=self._name, daemon=True).start()
        except BaseException:
            self._ended.release()
            raise

    def _main(self) -> None:
        try:
            self._target()
        finally:
            self._ended.release()

    def join(self, timeout: float) -> None:
        """Wait for its end, for so many seconds at most; greenlets wait with it."""
        if self._ended.acquire(timeout=timeout):
            self._ended.release()


class Threads(ThreadPoolExecutor):
    """An executor for an event loop, of real threads, that works while the interpreter ends.

    An event loop looks names up in its executor, and closing a connection may need one. At that
    time Python starts no more threads, and its own executors take no more work. So one thread is
    there from the beginning. Others are started when it is busy.

    Args:
        size: The most threads.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._size = size
        self._started = 0
        self._waiting = 0  # jobs that no thread has ended yet
        self._counting = make_lock()
        self._start_another()

    def _start_another(self) -> None:
        Thread(self._main, name="aiotaskq-names").start()
        self._started += 1

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in a thread."""
        future: Future[T] = make_future()
        with self._counting:
            self._waiting += 1
            if self._started < min(self._waiting, self._size):
                with contextlib.suppress(RuntimeError):  # too late: one of the others does it
                    self._start_another()
        self._jobs.put(functools.partial(self._do, future, functools.partial(fn, *args, **kwargs)))
        return future

    def _do(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # for the caller that waits for it
                future.set_exception(error)

    def _main(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job
            with self._counting:
                self._waiting -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after the functions that were submitted; wait for none of them."""
        for _ in range(self._started):
            self._jobs.put(None)
        self._started = 0
