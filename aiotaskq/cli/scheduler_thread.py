"""The scheduler beside a worker (``worker -B``), in a thread of its own.

Theory of operation. The thread has an event loop of its own, so that no task that blocks the
worker's event loop delays a run. A failure of the scheduler is logged and ends the thread; the
worker goes on without it.

`stop` is called from the worker's event loop, at any point of the thread's life, which the lock
divides into three parts:

- The thread has not made its scheduler yet: `_stopped` keeps it from making one.
- `_loop` is set: the scheduler runs, and is told to stop in its own event loop.
- `_loop` is None again: there is nothing to stop, and the event loop may be closed.
"""

from __future__ import annotations

import asyncio
import threading

from aiotaskq.app import TaskQueue
from aiotaskq.cli.scheduler import run_scheduler
from aiotaskq.errors import ConfigError, Unavailable
from aiotaskq.readable import get_logger
from aiotaskq.scheduling.scheduler import Scheduler

logger = get_logger("aiotaskq.scheduler")

_STOP_WAIT = 35.0  # seconds for runs that are being sent


class SchedulerThread:
    """A scheduler in a thread with an event loop of its own."""

    def __init__(self, app: TaskQueue) -> None:
        self._app = app
        self._thread = threading.Thread(target=self._main, name="aiotaskq-scheduler", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: Scheduler | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Stop, after runs that are being sent."""
        with self._lock:
            self._stopped = True
            if self._loop is not None and self._running is not None:
                self._loop.call_soon_threadsafe(self._running.stop)
        await asyncio.to_thread(self._thread.join, _STOP_WAIT)

    def _main(self) -> None:
        try:
            asyncio.run(self._work())
        except (ConfigError, Unavailable) as error:
            logger.error("the scheduler cannot run: %s", error)
        except Exception:  # the worker goes on without it, and the log says so
            logger.exception("the scheduler failed")

    async def _work(self) -> None:
        with self._lock:
            if self._stopped:
                return
            self._running = self._app.scheduler()
            self._loop = asyncio.get_running_loop()
        try:
            await run_scheduler(self._app, self._running)
        finally:
            with self._lock:
                self._loop = None
