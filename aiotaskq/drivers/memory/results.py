"""The result backend: outcomes in a `MemoryStore`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.memory.notify import MemorySubscriber, MemoryWaiter
from aiotaskq.drivers.memory.store import MemoryStore
from aiotaskq.drivers.memory.url import find_store


class MemoryBackend:
    """A result backend for the tasks of one process. Its outcomes end with the process.

    Args:
        url: ``memory://name`` names a store of the whole process, ``memory://`` a new store.
        prefix: Stores of the same name with different prefixes are different stores.
        store: The store to use instead of the one that the URL names, such as a broker's.

    Raises:
        ConfigError: It is not such a URL.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(
        self,
        url: str = "memory://",
        *,
        prefix: str = "aiotaskq",
        store: MemoryStore | None = None,
    ) -> None:
        self._prefix = prefix
        self._url, self.memory = find_store(url, prefix, store)

    @property
    def url(self) -> str:
        return self._url

    def clone(self) -> Self:
        return type(self)(self._url, prefix=self._prefix, store=self.memory)

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        return self.memory.store(batch, ttl)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return self.memory.load(ids)

    async def subscribe(self) -> AsyncIterator[Sequence[str]]:
        subscriber = MemorySubscriber()
        self.memory.add_subscriber(subscriber)
        try:
            yield []
            while True:
                # A waiter is woken once. The new one is there before the look, so that an outcome
                # that arrives after the look wakes it.
                subscriber.waiter = MemoryWaiter()
                ids = self.memory.read(subscriber)
                if ids is None:
                    await subscriber.waiter.wait(None)
                else:
                    yield ids
        finally:
            self.memory.remove_subscriber(subscriber)

    async def forget(self, ids: Collection[str]) -> int:
        return self.memory.forget(ids)
