"""The thread of one consumer: an event loop that runs on while the worker's loop is blocked.

A task that blocks the worker's event loop for minutes must not cost the consumer its connection,
because every message that it holds is lost with the connection.

Theory of operation
-------------------
The thread runs from `start` to `stop`. Work is started in it by `run`; the caller waits in its own
event loop. A caller that is cancelled stops waiting, and the work goes on to its end: RabbitMQ
counts messages as lost when consuming is broken off in the middle. The caller may pass a function
that makes the work end early.

`stop` ends the loop with everything that runs in it: tasks are cancelled until none is left, as
aiormq's tasks start others to clean up. The end is reported before the executor of the loop is shut
down, since that waits for name lookups, which may take minutes. The event loop of the owner may be
closed at any moment; then the end is reported to nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aiotaskq.contract.message import Delivery

_Value = TypeVar("_Value")


@dataclass(slots=True, eq=False)
class FetchCall:
    """A call of `Consumer.fetch`, passed from the worker's event loop to the consumer's.

    Attributes:
        is_over: Whether it must end soon: its caller is gone.
        taken: Its result. If the caller is gone, these deliveries become available again.
    """

    limit: int
    wait: float
    order: Sequence[str]
    is_over: bool = False
    taken: Sequence[Delivery] = ()


class ConsumerThread:
    """A thread with an event loop. It ends with `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="aiotaskq-rabbitmq", daemon=True)
        self._owner = asyncio.get_running_loop()
        self._ended = asyncio.Event()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def run(
        self, work: Coroutine[Any, Any, _Value], interrupt: Callable[[], None] | None = None
    ) -> _Value:
        """Run a coroutine in the thread.

        Args:
            work: The coroutine. When this call is cancelled, it runs on to its end.
            interrupt: Called in the thread when this call is cancelled, to make it end soon.
        """
        running = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            running.add_done_callback(_read_error)
            if interrupt is not None:
                self._loop.call_soon_threadsafe(interrupt)
            raise

    async def stop(self) -> None:
        """End the thread and everything that runs in it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        await self._ended.wait()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            # When a task of aiormq ends, it starts others, to clean up.
            while left := asyncio.all_tasks(self._loop):
                for task in left:
                    task.cancel()
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            # Before the next line, which waits for name lookups: they may hang.
            self._report_end()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()
            self._report_end()

    def _report_end(self) -> None:
        with contextlib.suppress(RuntimeError):  # the owner's loop was closed without waiting
            self._owner.call_soon_threadsafe(self._ended.set)


def _read_error(running: asyncio.Future[Any]) -> None:
    if not running.cancelled():
        running.exception()  # or asyncio logs it: nobody else reads it
