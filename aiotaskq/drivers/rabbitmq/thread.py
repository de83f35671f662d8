"""An event loop in a thread, for a connection that has to go on while the worker's loop is blocked.

A task that blocks the worker's event loop for minutes must not cost it its connection, for with
that goes everything it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")


class LoopThread:
    """A thread with an event loop. It ends with `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="aiotaskq-rabbitmq", daemon=True)
        self._owner = asyncio.get_running_loop()
        self._ended = asyncio.Event()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    async def run(
        self, work: Coroutine[Any, Any, Value], interrupt: Callable[[], None] | None = None
    ) -> Value:
        """Run something there.

        Args:
            work: What to run. When this call is cancelled, it is left to come to its end.
            interrupt: Called there then, to have that end soon.
        """
        running = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            running.add_done_callback(_hear_out)
            if interrupt is not None:
                self._loop.call_soon_threadsafe(interrupt)
            raise

    async def stop(self) -> None:
        """End the thread, with all that runs in it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        await self._ended.wait()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            # Where a task of aiormq ends, others begin, to clear up behind it.
            while left := asyncio.all_tasks(self._loop):
                for task in left:
                    task.cancel()
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            # Not after what follows: it waits for name look-ups, which may hang.
            self._tell_end()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()
            self._tell_end()

    def _tell_end(self) -> None:
        with contextlib.suppress(RuntimeError):  # that loop is closed, without waiting for us
            self._owner.call_soon_threadsafe(self._ended.set)


def _hear_out(running: asyncio.Future[Any]) -> None:
    if not running.cancelled():
        running.exception()  # nobody else asks what became of it
