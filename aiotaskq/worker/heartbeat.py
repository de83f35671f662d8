"""The heartbeat: a thread that renews the lease of a consumer.

It is a thread, because an event loop that a task blocks for a minute must not cost the worker its
lease. It has an event loop of its own, because drivers speak asyncio.

The lease has three states:

==========  ========================================================================
trusted     a renewal was asked for less than 85 % of the lease ago
in doubt    that time has passed: the process was frozen, or the broker is away
gone        the broker said that the lease was lost, or the heartbeat was stopped
==========  ========================================================================

Trust is counted from the moment at which a renewal was *asked for*, by this machine's monotonic
clock: the broker cannot have granted less. Only in the first state may anything be settled.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from aiotaskq.contract.broker import Lease
from aiotaskq.errors import BrokerUnavailable, LeaseLost, Unavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.worker")

_MARGIN = 0.15  # the part of the lease by which it is trusted for less than the broker grants


class Heartbeat:
    """Keeps one lease alive.

    Args:
        lease: The lease; used in the thread only.
        length: Seconds that a renewal lasts.
        beat: Seconds between renewals.
        lost: Called in the event loop that made this object, once, when the lease is lost.
    """

    def __init__(
        self, lease: Lease, *, length: float, beat: float, lost: Callable[[], None]
    ) -> None:
        self._lease = lease
        self._length = length
        self._beat = beat
        self._lost = lost
        self._owner = asyncio.get_running_loop()
        self._trusted_until = time.monotonic() + length * (1 - _MARGIN)
        self._gone = False
        self._thread = threading.Thread(target=self._main, name="aiotaskq-heartbeat", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beating: asyncio.Task[None] | None = None
        self._stopped = False
        self._ended = asyncio.Event()
        self._renewed = asyncio.Event()
        self._first: asyncio.Future[None] = self._owner.create_future()

    async def start(self) -> None:
        """Begin to beat, and wait for the first beat.

        It makes the connection of the lease. A worker without one must not take tasks: its lease
        would lapse while they run, and they would be given to others, for ever.

        Raises:
            Unavailable: The lease cannot be renewed now.
            LeaseLost: It is lost already.
        """
        try:
            self._thread.start()
        except RuntimeError as error:
            raise BrokerUnavailable(f"the lease cannot be renewed: {error}") from None
        await self._first

    @property
    def trusted(self) -> bool:
        """Return whether the lease is certainly alive, by this machine's monotonic clock."""
        return not self._gone and time.monotonic() < self._trusted_until

    async def alive(self) -> bool:
        """Tell whether the lease is alive, waiting for the next beat if that is in doubt.

        It is in doubt after this process was frozen, or while the broker is away.
        """
        while not self._gone and not self.trusted:
            self._renewed.clear()
            await self._renewed.wait()
        return not self._gone

    async def stop(self) -> None:
        """End the thread, without ending the lease."""
        self._stopped = self._gone = True
        self._renewed.set()
        if self._loop is not None and self._beating is not None:
            # Cancelled rather than asked: a renewal may hang at a broker that is away.
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._beating.cancel)
        if self._thread.ident is not None:  # it was started
            # Not joined in another thread: the loop's own may all be with functions of the
            # user's that never end.
            await self._ended.wait()

    def _main(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._live())
        except Exception:  # a process without free descriptors has no event loop, for instance
            logger.exception("the lease is not renewed any more")
        finally:
            if not self._gone:  # without renewals nothing may be trusted
                self._gone = True
                self._tell(self._lost)
            broken = BrokerUnavailable("the thread that renews the lease has ended; see the log")
            self._tell(lambda: self._note_first(broken))  # if it could not begin
            self._tell(self._ended.set)

    async def _live(self) -> None:
        self._beating = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        try:
            if not await self._begin():
                return
            while not self._stopped:
                await asyncio.sleep(self._beat)
                if not await self._renew():
                    self._gone = True
                    self._tell(self._lost)
                    break
                self._tell(self._renewed.set)
            self._tell(self._renewed.set)  # callers that wait in `alive` hear of the loss
        finally:
            await self._lease.close()
            # Not after the loop is shut down: that waits for name look-ups, which may hang.
            self._tell(self._ended.set)

    async def _begin(self) -> bool:
        """Beat for the first time; return whether there is a reason to go on."""
        asked = time.monotonic()
        error: Exception | None = None
        try:
            async with asyncio.timeout(self._length):
                if not await self._lease.renew():
                    error = LeaseLost("the lease was lost before its first renewal")
        except TimeoutError:
            error = BrokerUnavailable("the lease cannot be renewed: no answer in time")
        except Exception as failure:  # raised where the lease was to begin
            error = failure
        if error is None:
            self._trusted_until = asked + self._length * (1 - _MARGIN)
        else:
            self._gone = True
        self._tell(lambda: self._note_first(error))
        return error is None

    def _note_first(self, error: Exception | None) -> None:
        if self._first.done():  # nobody waits any more
            return
        if error is None:
            self._first.set_result(None)
        else:
            self._first.set_exception(error)

    async def _renew(self) -> bool:
        asked = time.monotonic()  # before the call: see the top of this module
        try:
            async with asyncio.timeout(self._length):
                if not await self._lease.renew():
                    return False
        except (Unavailable, TimeoutError):
            return True  # the lease runs on; the next beat asks again
        except Exception:  # a fault of the driver's own must not end the beating
            logger.exception("the lease cannot be renewed")
            return True
        self._trusted_until = asked + self._length * (1 - _MARGIN)
        return True

    def _tell(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # that loop is closed, without waiting for us
            self._owner.call_soon_threadsafe(call)
