"""An event loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from aiotaskq.drivers.memory.store import MemoryStore

T = TypeVar("T")

BEGIN = 1_767_225_600.0  # 2026-01-01, in Unix time


class _Selector(selectors.DefaultSelector):
    """A selector that moves the clock to the next timer when nothing is ready."""

    passed = 0.0
    stands = False  # while a thread is waited for, which has the time of the world

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.stands:
            return super().select(0.001 if timeout is None else min(timeout, 0.001))
        ready = super().select(None if timeout is None else 0.0)
        if not ready and timeout is not None:
            self.passed += timeout
        return ready


class WarpLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._warp = _Selector()
        super().__init__(self._warp)
        self._clock_resolution = 1e-6  # the resolution of a float after years

    def time(self) -> float:
        return self._warp.passed

    def stand(self, still: bool) -> None:
        """Have the clock stand still, or go on."""
        self._warp.stands = still


@asynccontextmanager
async def entered(manager: AbstractAsyncContextManager[object]) -> AsyncIterator[None]:
    """Enter a context manager that waits for a thread; the clock stands still until then."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, WarpLoop)
    loop.stand(True)
    async with manager:
        loop.stand(False)
        yield


class WarpStore(MemoryStore):
    """A memory store with the clock of the running event loop."""

    def now(self) -> float:
        return BEGIN + asyncio.get_running_loop().time()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a `WarpLoop`."""
    with asyncio.Runner(loop_factory=WarpLoop) as runner:
        return runner.run(work)
