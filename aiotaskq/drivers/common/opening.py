"""Resources that are opened once, and attempts that are made once, for several tasks at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

Resource = TypeVar("Resource")


class OpenOnce(Generic[Resource]):
    """A connection, a pool, or another resource of a driver that is opened and closed.

    Theory of operation. It is closed, being opened, or open. A task that opens it while another
    task does so waits for that task. If that one fails or is cancelled, the next task tries.

    - Invariant: `make` runs in one task at a time, and never while there is a resource. So no
      second resource has to be closed.
    - Nothing is awaited between the end of `make` and the assignment of the resource: a task that
      is cancelled has either no resource or the one that `release` returns.
    - Closing does not wait for a task that opens: the resource that this task makes stays.
    - The event belongs to one opening, and so to the event loop of that opening. Once closed, the
      object can be opened in another event loop.

    Args:
        not_open: Returns the error to raise while it is not open.

    Attributes:
        resource: The resource; None while it is not open.
    """

    __slots__ = ("_not_open", "_opened", "resource")

    def __init__(self, not_open: Callable[[], Exception]) -> None:
        self.resource: Resource | None = None
        self._not_open = not_open
        self._opened: asyncio.Event | None = None  # set at the end of the opening under way

    async def open(self, make: Callable[[], Awaitable[Resource]]) -> None:
        """Make the resource. Does nothing if it is open.

        Args:
            make: Returns the resource. If it fails or is cancelled, it leaves nothing open.
        """
        while self.resource is None:
            if self._opened is not None:
                await self._opened.wait()
                continue
            self._opened = opened = asyncio.Event()
            try:
                self.resource = await make()
            finally:
                self._opened = None
                opened.set()

    def get(self) -> Resource:
        """Return the resource, or raise the error that says that it is not open."""
        if self.resource is None:
            raise self._not_open()
        return self.resource

    def release(self) -> Resource | None:
        """Return the resource for the caller to close, and forget it; None: it is not open."""
        resource, self.resource = self.resource, None
        return resource


class SharedAttempt(Generic[Resource]):
    """An attempt to connect, made in a task of its own for all callers that need it meanwhile.

    A caller that is cancelled does not stop the attempt of the others. The next caller after the
    end of the attempt begins another one. `cancel` ends it for all callers.

    Args:
        cancelled: Returns the error for callers whose attempt was ended by `cancel`.
    """

    __slots__ = ("_cancelled", "_task")

    def __init__(self, cancelled: Callable[[], Exception]) -> None:
        self._cancelled = cancelled
        self._task: asyncio.Task[Resource] | None = None

    async def result(self, attempt: Callable[[], Coroutine[Any, Any, Resource]]) -> Resource:
        """Return the result of the attempt under way, or of a new one.

        Args:
            attempt: Makes the attempt, if none is under way.
        """
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(attempt())
            self._task.add_done_callback(self._ended)
        task = self._task
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `cancel`, while this caller was not cancelled
                raise self._cancelled() from None
            raise

    def _ended(self, task: asyncio.Task[Resource]) -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # else asyncio complains if all callers were cancelled

    async def cancel(self) -> None:
        """End the attempt under way, if there is one, and wait for its end."""
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
