"""The loop monitor: reports blocks of the event loop of a worker, while they last.

The event loop ticks a few times a second, and a thread checks that it still does. The thread sleeps
until the next tick would be late, so that both together wake up less than four times a second.

::

    thread:  wait until the last tick is too old ──▶ blocked: report, wait for a tick ──┐
               ▲                                                                        │
               └──────────────── the loop runs again: report how long it took ◀─────────┘

The thread itself may be held up: C code that keeps the interpreter's lock stops all threads. A
block that ends before the thread could see it is therefore noted by the tick that follows it
(`_missed`), and reported without a stack.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from itertools import islice
from types import FrameType
from typing import Any

from aiotaskq import events
from aiotaskq.events import Observers
from aiotaskq.readable import Lines, get_logger

logger = get_logger("aiotaskq.worker")

_TICK = 0.4  # seconds between ticks, at the most
_TICK_SHARE = 0.4  # the same as a part of `warn_after`
_LATE = 0.2  # seconds: a thread that wakes up so much too late was held up itself
_FRAMES = 30  # the innermost calls of a stack that are shown
_HELD_UP = "; C code held the interpreter's lock, or the process was stopped"
_END_WAIT = 1.0  # seconds for the thread to end; an observer of the user's may hold it


class LoopMonitor:
    """Watches the event loop in which it is started.

    Every block of `warn_after` seconds or longer is reported once when it is found, with the stack
    of the loop's thread and the task that runs there, and once when it ends. While C code holds the
    interpreter's lock no thread runs; such a block is reported right afterwards.

    Args:
        warn_after: Seconds; None: nothing is watched.
        observers: Hear of `LoopBlocked`, in the thread.
        worker: The name of the worker.
        describe: Returns the name and id of the task that an asyncio task runs, or an empty
            string; called in the thread.
        blocked: Called in the thread each time that the loop is found blocked.
    """

    def __init__(
        self,
        warn_after: float | None,
        *,
        observers: Observers,
        worker: str,
        describe: Callable[[asyncio.Task[Any] | None], str],
        blocked: Callable[[], None] | None = None,
    ) -> None:
        self._warn_after = warn_after
        self._every = min(_TICK, (warn_after or _TICK) * _TICK_SHARE)
        self._observers = observers
        self._worker = worker
        self._describe = describe
        self._tell_blocked = blocked
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ident = 0  # of the loop's thread
        self._timer: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._ticked = 0.0
        self._worst = 0.0
        self._awaited = False  # whether the thread has seen a block and waits for its end
        self._missed = 0.0  # seconds of a block that ended before the thread could see it
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._ended = asyncio.Event()  # set when the thread has ended

    @property
    def lag(self) -> float:
        """Seconds by which the tick of the loop is late; 0 for a healthy loop."""
        if self._timer is None:
            return 0.0
        return max(0.0, time.monotonic() - self._ticked - self._every)

    def take_worst(self) -> float:
        """Return the longest lag since the last call, in seconds."""
        worst, self._worst = max(self._worst, self.lag), 0.0
        return worst

    def start(self) -> None:
        """Begin to watch the running event loop."""
        if self._warn_after is None:
            return
        self._loop = asyncio.get_running_loop()
        self._ident = threading.get_ident()
        self._ticked = time.monotonic()
        self._timer = self._loop.call_later(self._every, self._tick)
        self._thread = threading.Thread(
            target=self._live, args=(self._warn_after,), name="aiotaskq-loop-monitor", daemon=True
        )
        self._thread.start()

    async def stop(self) -> None:
        """Stop watching; called in the loop. Idempotent."""
        self._stopped.set()
        self._wake.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._thread is not None:
            self._thread = None
            with contextlib.suppress(TimeoutError):  # an observer of the user's holds it
                async with asyncio.timeout(_END_WAIT):
                    await self._ended.wait()

    def _tick(self) -> None:
        assert self._loop is not None  # started
        assert self._warn_after is not None
        self._worst = max(self._worst, self.lag)
        late, self._ticked = time.monotonic() - self._ticked, time.monotonic()
        if self._awaited:
            self._wake.set()
        elif late >= self._warn_after:  # the thread was held up as well, and the tick came first
            self._missed = late
            self._wake.set()
        self._timer = self._loop.call_later(self._every, self._tick)

    def _live(self, warn_after: float) -> None:
        try:
            self._watch(warn_after)
        finally:
            assert self._loop is not None  # started
            with contextlib.suppress(RuntimeError):  # it is closed: nobody waits
                self._loop.call_soon_threadsafe(self._ended.set)

    def _watch(self, warn_after: float) -> None:
        while not self._stopped.is_set():
            due = self._ticked + warn_after
            if self._wake.wait(max(0.0, due - time.monotonic())):
                self._wake.clear()  # or it is `stop`, which is seen before the next wait
            now, since = time.monotonic(), self._ticked
            missed, self._missed = self._missed, 0.0
            if self._stopped.is_set():
                return
            try:
                if now - since >= warn_after:
                    self._watch_block(now, since, held_up=now - due > _LATE)
                elif missed:
                    self._report(missed, "", _HELD_UP, "(what it was has ended)")
            except Exception:  # from `blocked`, or a fault in here: it must not end the watch
                logger.exception("the monitor of the event loop failed")

    def _watch_block(self, now: float, since: float, *, held_up: bool) -> None:
        self._awaited = True  # before looking: a tick from now on wakes this thread
        try:
            # Both without a pause, before anything that lets the thread of the loop go on.
            work = asyncio.current_task(self._loop)
            frames = self._frames()
            why = _HELD_UP if held_up else ""
            self._report(now - since, self._name(work), why, _format(frames))
            while self._ticked == since and not self._stopped.is_set():
                self._wake.wait()
        finally:
            self._awaited = False
            self._missed = 0.0
        if not self._stopped.is_set():
            took = self._ticked - since
            logger.warning("the event loop of %s runs again, after %.1f s", self._worker, took)

    def _report(self, seconds: float, task: str, why: str, stack: str) -> None:
        logger.warning(
            "the event loop of %s has not run for %.1f s%s%s. It is at:\n%s",
            self._worker,
            seconds,
            f", held by {task}" if task else "",
            why,
            Lines(stack),
        )
        if self._tell_blocked is not None:
            self._tell_blocked()
        if self._observers.heard(events.LoopBlocked):
            self._observers.emit(
                events.LoopBlocked(worker=self._worker, seconds=seconds, task=task, stack=stack)
            )

    def _name(self, work: asyncio.Task[Any] | None) -> str:
        try:
            return self._describe(work)
        except Exception:  # the loop goes on meanwhile, and its sets may change
            logger.exception("the task that blocks the event loop cannot be named")
            return ""

    def _frames(self) -> list[tuple[FrameType, int]]:
        """Return the stack of the loop's thread, the innermost call first, with line numbers."""
        frame = sys._current_frames().get(self._ident)
        return [] if frame is None else list(islice(traceback.walk_stack(frame), _FRAMES))


def _format(frames: list[tuple[FrameType, int]]) -> str:
    """Return a stack as text, the innermost call last."""
    summary = traceback.StackSummary.extract(iter(frames))
    summary.reverse()
    return "".join(summary.format()).rstrip()
