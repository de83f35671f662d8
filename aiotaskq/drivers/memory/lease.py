"""The lease of a consumer at a `MemoryStore`."""

from __future__ import annotations

from aiotaskq.drivers.memory.store import MemoryStore


class MemoryLease:
    """See `aiotaskq.contract.broker.Lease`; made by `MemoryBroker.lease`."""

    def __init__(self, store: MemoryStore, consumer: str) -> None:
        self._store = store
        self._consumer = consumer

    async def renew(self) -> bool:
        return self._store.renew(self._consumer)

    async def end(self, note: str) -> int:
        return self._store.give_up(self._consumer, note)

    async def close(self) -> None:
        """Do nothing: there is no connection."""
