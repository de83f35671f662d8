"""Resources that are opened once, also when several tasks open them at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

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
