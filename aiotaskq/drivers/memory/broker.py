"""The broker whose messages wait in a `MemoryStore`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import (
    ConsumerInfo,
    DeadLetter,
    DeadLimits,
    Depth,
    Grant,
    Maintained,
    News,
)
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.memory.address import find
from aiotaskq.drivers.memory.outcomes import Bell
from aiotaskq.drivers.memory.queues import Holder
from aiotaskq.drivers.memory.results import MemoryBackend
from aiotaskq.drivers.memory.schedules import MemorySchedules
from aiotaskq.drivers.memory.store import MemoryStore


class MemoryBroker:
    """A broker for the tasks of one process, gone with it.

    Args:
        url: ``memory://name`` names a store of the whole process, ``memory://`` makes one.
        prefix: Keeps the stores of one name apart.
        store: Used instead of what the URL names.
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
        self._url, self.store = find(url, prefix, store)

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
        """Do nothing. What consumers hold comes back when they are closed, or lapse."""

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        # One turn of the loop, as with any server: a caller that publishes without end must not
        # keep everybody else from running.
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
            ConfigError: `before` is no key.
        """
        return self.store.dead(queue, limit, before)

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return self.store.revive(queue, letters)

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return self.store.discard(queue, keys)


class MemoryConsumer:
    """A consumer at a `MemoryStore`; made by `MemoryBroker.consumer`."""

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
        self._holder = Holder(Grant(self.id, tuple(queues), lease), name, about)

    @property
    def grant(self) -> Grant:
        return self._holder.grant

    async def open(self) -> None:
        self._store.enter(self._holder)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        await asyncio.sleep(0)  # one turn of the loop, for the reason given in `publish`
        while True:
            left = end - loop.time()
            bell = Bell() if left > 0 else None
            taken = self._store.take(self._holder, limit, bell, order)
            # Nothing is awaited from here to the return, so that nothing taken can be lost.
            if taken or bell is None:
                return taken
            try:
                due = self._store.next_due(self._holder)
                await bell.wait(left if due is None else min(left, due))
            finally:
                self._store.take_down(self._holder, bell)

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        return self._store.settle(self._holder, batch)

    async def news(self) -> News:
        return self._store.news(self._holder)

    async def close(self) -> None:
        self._store.leave(self._holder)


class MemoryLease:
    """The lease of a `MemoryConsumer`."""

    def __init__(self, store: MemoryStore, consumer: str) -> None:
        self._store = store
        self._consumer = consumer

    async def renew(self) -> bool:
        return self._store.renew(self._consumer)

    async def end(self, note: str) -> int:
        return self._store.end(self._consumer, note)

    async def close(self) -> None:
        """Do nothing: there is no connection."""
