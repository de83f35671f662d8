"""A consumer at a `MemoryStore`.

Its state is a `MemoryHolder`, which the store changes under its lock; see there.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.memory.notify import MemoryWaiter
from aiotaskq.drivers.memory.queues import MemoryHolder
from aiotaskq.drivers.memory.store import MemoryStore


class MemoryConsumer:
    """See `aiotaskq.contract.broker.Consumer`; made by `MemoryBroker.consumer`."""

    def __init__(
        self,
        store: MemoryStore,
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
    ) -> None:
        self.id = f"{name}-{secrets.token_hex(8)}"
        self._store = store
        self._holder = MemoryHolder(Grant(self.id, tuple(queues), lease), name, about)

    @property
    def grant(self) -> Grant:
        return self._holder.grant

    async def open(self) -> None:
        self._store.begin_lease(self._holder)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        await asyncio.sleep(0)  # one turn of the loop, for the reason given in `publish`
        while True:
            left = end - loop.time()
            waiter = MemoryWaiter() if left > 0 else None
            taken = self._store.take(self._holder, limit, waiter, order)
            # Nothing is awaited from here to the return, so that no message taken can be lost.
            if taken or waiter is None:
                return taken
            try:
                due = self._store.next_due(self._holder)
                await waiter.wait(left if due is None else min(left, due))
            finally:
                self._store.stop_waiting(self._holder, waiter)

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        return self._store.settle(self._holder, batch)

    async def news(self) -> News:
        return self._store.news(self._holder)

    async def close(self) -> None:
        self._store.end_lease(self._holder)
