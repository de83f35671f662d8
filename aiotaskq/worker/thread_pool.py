"""A pool of daemon threads for plain functions.

The standard library's pool is not used, for two reasons. Its threads keep the process from exiting
while a function never ends. And it wakes the event loop for each function that ends; here the
functions that end at about the same time wake it once, which makes a short function several times
cheaper.

A function cannot be stopped. When its call is cancelled it is *given up*: it runs on, its result is
dropped, and another thread takes the place of the one it occupies. `_busy` and `_given_up` are
changed in the event loop only; threads reach it through `_ended` and one wake-up (`_waking`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeAlias

from aiotaskq import forks

_Work: TypeAlias = tuple["asyncio.Future[Any]", Callable[[], Any]]
_Ended: TypeAlias = tuple["asyncio.Future[Any]", Any, BaseException | None]


class ThreadPool:
    """Runs functions in up to `size` threads, which are started when needed.

    Threads of functions that were given up do not count. A pool belongs to the event loop in which
    it is made.
    """

    def __init__(self, size: int, *, name: str = "aiotaskq-thread") -> None:
        self.size = size
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._generation = forks.generation
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._ended: deque[_Ended] = deque()
        self._threads: list[threading.Thread] = []
        self._alive = 0  # threads that have not ended
        self._busy = 0  # functions that were handed to threads and are not delivered yet
        self._given_up: set[asyncio.Future[Any]] = set()  # cancelled calls whose functions run on
        self._waking = False
        self._less = asyncio.Event()  # set when a function or a thread has ended

    @property
    def given_up(self) -> int:
        """The number of functions that run on after their calls were cancelled."""
        return len(self._given_up)

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function in a thread, in a copy of the caller's context, and return its value.

        A thread cannot be stopped: where the call is cancelled, the function runs on.
        """
        future = self.run(function, *args, **kwargs)
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._given_up.add(future)
            raise
        except _Carried as carried:
            raise carried.error from None

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Run a function in a thread, in a copy of the caller's context.

        The future may be cancelled, and the function runs to its end all the same.
        """
        context = contextvars.copy_context()
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._busy >= len(self._threads) < self.size + len(self._given_up):
            self._add_thread()
        self._busy += 1
        self._work.put((future, lambda: context.run(function, *args, **kwargs)))
        return future

    def _add_thread(self) -> None:
        number = len(self._threads) + 1
        thread = threading.Thread(target=self._main, name=f"{self._name}-{number}", daemon=True)
        thread.start()
        self._threads.append(thread)
        self._alive += 1

    def _main(self) -> None:
        while (work := self._work.get()) is not None:
            future, call = work
            if future.cancelled():  # released or revoked while it waited for a thread
                call = _nothing
            value = error = None
            try:
                value = call()
            except BaseException as raised:  # SystemExit included: it ends the task only
                error = raised
            forks.end_child(self._generation, error)
            self._ended.append((future, value, error))
            del work, future, call, value, error  # a waiting thread holds nothing alive
            if not self._waking:
                self._waking = True
                self._tell(self._deliver)
        self._tell(self._thread_ended)

    def _tell(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(call)

    def _thread_ended(self) -> None:
        self._alive -= 1
        self._less.set()

    def _deliver(self) -> None:
        self._waking = False  # before looking: a function that ends from now on wakes the loop
        self._less.set()
        while self._ended:
            future, value, error = self._ended.popleft()
            self._busy -= 1
            self._given_up.discard(future)
            if future.done():
                continue  # cancelled meanwhile
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(_transferable(error))

    async def drained(self) -> None:
        """Wait until no function runs."""
        while self._busy:
            self._less.clear()
            await self._less.wait()

    async def close(self) -> None:
        """End the idle threads; those that still run a function are left behind."""
        for _ in self._threads:
            self._work.put(None)
        while self._alive > self._busy:
            self._less.clear()
            await self._less.wait()


class ThreadStopped(Exception):
    """A plain function raised an exception that a future cannot carry, such as StopIteration."""


class _Carried(Exception):
    """A `GeneratorExit` on its way through a future: bare, it would close all that await it."""

    def __init__(self, error: GeneratorExit) -> None:
        super().__init__()
        self.error = error


def _nothing() -> None:
    """Replace a function whose call was cancelled before it began."""


def _transferable(error: BaseException) -> BaseException:
    if isinstance(error, StopIteration):  # a future refuses it: it would end a coroutine
        stopped = ThreadStopped(f"the function raised {error!r}")
        stopped.__cause__ = error
        return stopped
    if isinstance(error, GeneratorExit):
        return _Carried(error)
    return error
