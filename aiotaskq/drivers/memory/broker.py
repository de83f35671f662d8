"""The broker: messages in a `MemoryStore`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.drivers.common.dead_letter_keys import number_before
from aiotaskq.drivers.memory.consumer import MemoryConsumer
from aiotaskq.drivers.memory.lease import MemoryLease
from aiotaskq.drivers.memory.results import MemoryBackend
from aiotaskq.drivers.memory.schedules import MemorySchedules
from aiotaskq.drivers.memory.store import MemoryStore
from aiotaskq.drivers.memory.url import find_store


class MemoryBroker:
    """A broker for the tasks of one process. Its messages end with the process.

    Args:
        url: ``memory://name`` names a store of the whole process, ``memory://`` a new store.
        prefix: Stores of the same name with different prefixes are different stores.
        store: The store to use instead of the one that the URL names.

    Raises:
        ConfigError: It is not such a URL.
    """

    traits: ClassVar[Traits] = Traits(durable=False, shared=False)

    def __init__(
        self,
        url: str = "memory://",
        *,
        prefix: str = "aiotaskq",
        store: MemoryStore | None = None,
    ) -> None:
        self._prefix = prefix
        self._url, self.store = find_store(url, prefix, store)

    @property
    def url(self) -> str:
        return self._url

    def clone(self) -> Self:
        return type(self)(self._url, prefix=self._prefix, store=self.store)

    def backend(self) -> MemoryBackend:
        return MemoryBackend(self._url, prefix=self._prefix, store=self.store)

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def close(self) -> None:
        """Do nothing. Held messages come back when their consumers are closed, or lapse."""

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        # One turn of the loop, as with any server: a caller that publishes in a loop must not keep
        # all other tasks from running.
        await asyncio.sleep(0)
        return self.store.publish(batch, call_id) if batch else []

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> MemoryConsumer:
        return MemoryConsumer(self.store, queues, name=name, lease=lease, about=about)

    def schedules(self) -> MemorySchedules:
        return MemorySchedules(self.store)

    def lease(self, grant: Grant) -> MemoryLease:
        return MemoryLease(self.store, grant.consumer)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        return self.store.consumers()

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        return self.store.cancel(ids, running=running)

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        return self.store.cancelled_among(ids)

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        return self.store.maintain(limits)

    async def depth(self) -> Mapping[str, Depth]:
        return self.store.depth()

    async def purge(self, queue: str) -> int:
        return self.store.purge(queue)

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        """Return dead letters of a queue, the newest first.

        Raises:
            ConfigError: `before` is not the key of a dead letter.
        """
        return self.store.dead(queue, limit, number_before(before))

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return self.store.revive(queue, letters)

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return self.store.discard(queue, keys)
