"""Notification inside one process: coroutines that wait, and subscribers to outcomes.

Theory of operation. The objects here are used by several threads, and every method but
`MemoryWaiter.wait` is called under the lock of the store. A *waiter* belongs to one event loop,
and is used once: it waits, it is woken, it is dropped.

*Invariant: a change is either found or notified.* A coroutine registers its waiter and looks into
the store in one step, under the lock. Every later change wakes the waiter, even before the
coroutine begins to wait. The event loop of a waiter may be closed at any time, with the waiter
still registered; waking it does nothing then.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

UNREAD_AT_MOST = 100_000
"""Ids that are kept for a subscriber that does not read them."""


class MemoryWaiter:
    """Wakes one waiting coroutine, once, from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = self._loop.create_future()
        self._is_woken = False  # known at once; the future only knows it in its own loop

    def wake(self) -> None:
        """Wake the coroutine; further calls do nothing."""
        if self._is_woken:
            return
        self._is_woken = True
        with suppress(RuntimeError):  # the loop is closed, so nothing waits in it
            self._loop.call_soon_threadsafe(self._woken.set_result, None)

    async def wait(self, seconds: float | None) -> None:
        """Return when it is woken, or after some seconds."""
        await asyncio.wait([self._woken], timeout=seconds)


class MemorySubscriber:
    """A subscriber to final outcomes, with the ids that it has not read yet.

    The ids are bounded in number. Beyond that they are dropped, and the subscriber is told that
    it has missed something.

    Attributes:
        waiter: The waiter that the next outcome wakes. The subscriber replaces it before each look.
    """

    def __init__(self) -> None:
        self.waiter = MemoryWaiter()
        self._unread: list[str] = []
        self._missed = False

    def tell(self, ids: list[str]) -> None:
        """Note the ids of new outcomes."""
        self._unread += ids
        if len(self._unread) > UNREAD_AT_MOST:
            self._unread.clear()
            self._missed = True
        self.waiter.wake()

    def read(self) -> list[str] | None:
        """Return new ids, [] if something was missed, None if there is nothing new."""
        unread, missed = self._unread, self._missed
        self._unread, self._missed = [], False
        if missed:
            # First the gap; the ids that came after it are returned the next time.
            self._unread = unread
            return []
        return unread or None
