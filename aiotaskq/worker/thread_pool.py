"""A pool of daemon threads for plain functions.

The standard library's pool is not used, for two reasons. Its threads keep the process from exiting
while a function never ends. And it wakes the event loop for each function that ends; here the
functions that end at about the same time wake it once, which makes a short function several times
cheaper.

A call that is cancelled raises an exception in its function (`ThreadCall`) and waits for it to end.
A function that does not end, because it runs C code or goes on all the same, is *given up*: another
thread takes the place of the one it occupies, and `CancelledError` is raised in it some more times,
which ``except Exception`` does not catch. All state is changed in the event loop only; threads
reach it through `_ended` and one wake-up (`_waking`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeAlias

from aiotaskq import forks
from aiotaskq.worker.thread_call import ThreadCall

Reason: TypeAlias = Callable[[], Callable[[], BaseException] | None]
"""Returns what makes the exception for a cancelled function, or None not to wait for its end."""

_PUSH_EVERY = 1.0  # seconds between two exceptions in a function that was given up
_PUSHES = 5
_START_PAUSE = 1.0  # seconds after which a thread that could not be started is tried again


class _Job:
    """A call that was handed to the threads, and its end."""

    __slots__ = ("call", "delivered", "error", "future", "value")

    def __init__(self, call: ThreadCall, future: asyncio.Future[Any]) -> None:
        self.call = call
        self.future = future  # another one takes its place where it was cancelled
        self.value: Any = None
        self.error: BaseException | None = None
        self.delivered = False


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
        self._work: SimpleQueue[_Job | None] = SimpleQueue()
        self._ended: deque[_Job] = deque()
        self._threads: list[threading.Thread] = []
        self._alive = 0  # threads that have not ended
        self._busy = 0  # functions that were handed to threads and are not delivered yet
        self._given_up: set[ThreadCall] = set()  # they run on
        self._waking = False
        self._adding: asyncio.TimerHandle | None = None  # of another attempt to start threads
        self._less = asyncio.Event()  # set when a function or a thread has ended

    @property
    def given_up(self) -> int:
        """The number of functions that run on after they were given up."""
        return len(self._given_up)

    async def call(self, call: ThreadCall, reason: Reason) -> Any:
        """Make a call in a thread, and return its value.

        Where this is cancelled, the exception of `reason` is raised in the function, and the value
        or the exception with which it ends is awaited, and is that of this call.

        Args:
            call: The call.
            reason: Asked at each cancellation. Where it returns None, the function is given up,
                and `asyncio.CancelledError` raised at once.

        Raises:
            RuntimeError: There is no thread, and none can be started.
        """
        job = self._hand_over(call)
        try:
            return await job.future
        except _Carried as carried:
            raise carried.error from None
        except asyncio.CancelledError:
            pass  # or the function has raised it
        try:
            return await self._end_cancelled(job, reason)
        except _Carried as carried:
            raise carried.error from None

    async def _end_cancelled(self, job: _Job, reason: Reason) -> Any:
        if not job.future.cancelled():  # the function has just ended, maybe with this
            return job.future.result()
        job.future = self._loop.create_future()
        if job.delivered:  # just before it was cancelled
            self._resolve(job)
        while (error := reason()) is not None:
            job.call.interrupt(error)
            with contextlib.suppress(asyncio.CancelledError):  # there is another reason now
                await asyncio.wait([job.future])
            if job.future.done():
                return job.future.result()
        self.give_up(job.call)
        job.future.cancel()
        raise asyncio.CancelledError

    def give_up(self, call: ThreadCall) -> None:
        """Have another thread take the place of the one that makes a call, if it has not ended."""
        if not call.over and call not in self._given_up:
            self._given_up.add(call)
            self._push(call, _PUSHES)

    def _push(self, call: ThreadCall, left: int) -> None:
        if call in self._given_up and left:
            call.interrupt(asyncio.CancelledError)
            self._loop.call_later(_PUSH_EVERY, self._push, call, left - 1)

    def run(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run a function in a thread, in a copy of the caller's context; nothing interrupts it.

        The future may be cancelled, and the function runs to its end all the same.

        Raises:
            RuntimeError: There is no thread, and none can be started.
        """
        return self._hand_over(ThreadCall(function, args, {})).future

    def _hand_over(self, call: ThreadCall) -> _Job:
        job = _Job(call, self._loop.create_future())
        if self._busy >= len(self._threads) < self.size + len(self._given_up):
            try:
                self._add_thread()
            except RuntimeError:
                # The threads of functions that were given up may never be free again.
                if len(self._threads) <= len(self._given_up):
                    raise
                self._add_later()  # meanwhile it waits for one of the others
        self._busy += 1
        self._work.put(job)
        return job

    def _add_later(self) -> None:
        if self._adding is None:
            self._adding = self._loop.call_later(_START_PAUSE, self._add_missing)

    def _add_missing(self) -> None:
        """Start the threads that could not be started when functions were handed over."""
        self._adding = None
        try:
            while len(self._threads) < min(self._busy, self.size + len(self._given_up)):
                self._add_thread()
        except RuntimeError:
            self._add_later()

    def _add_thread(self) -> None:
        number = len(self._threads) + 1
        thread = threading.Thread(target=self._main, name=f"{self._name}-{number}", daemon=True)
        thread.start()
        self._threads.append(thread)
        self._alive += 1

    def _main(self) -> None:
        while (job := self._work.get()) is not None:
            try:
                if job.future.cancelled():  # while it waited for a thread
                    raise asyncio.CancelledError
                job.value = job.call()
            except BaseException as raised:  # SystemExit included: it ends the task only
                job.error = raised
            forks.end_child(self._generation, job.error)
            self._ended.append(job)
            del job  # a waiting thread holds nothing alive
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
            job = self._ended.popleft()
            self._busy -= 1
            self._given_up.discard(job.call)
            job.delivered = True
            self._resolve(job)

    def _resolve(self, job: _Job) -> None:
        if job.future.done():
            return  # it was cancelled meanwhile
        if job.error is None:
            job.future.set_result(job.value)
        else:
            job.future.set_exception(_transferable(job.error))

    async def drained(self) -> None:
        """Wait until no function runs."""
        while self._busy:
            self._less.clear()
            await self._less.wait()

    async def close(self) -> None:
        """End the idle threads; those that still run a function are left behind."""
        if self._adding is not None:
            self._adding.cancel()
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


def _transferable(error: BaseException) -> BaseException:
    if isinstance(error, StopIteration):  # a future refuses it: it would end a coroutine
        stopped = ThreadStopped(f"the function raised {error!r}")
        stopped.__cause__ = error
        return stopped
    if isinstance(error, GeneratorExit):
        return _Carried(error)
    return error
