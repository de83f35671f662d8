"""The result backend whose outcomes rest in a `MemoryStore`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.memory.address import find
from aiotaskq.drivers.memory.outcomes import Bell, Ear
from aiotaskq.drivers.memory.store import MemoryStore


class MemoryBackend:
    """A result backend for the tasks of one process, gone with it.

    Args:
        url: ``memory://name`` names a store of the whole process, ``memory://`` makes one.
        prefix: Keeps the stores of one name apart.
        store: Used instead of what the URL names; a broker has one.
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
        self._url, self.memory = find(url, prefix, store)

    @property
    def url(self) -> str:
        return self._url

    def clone(self) -> Self:
        return type(self)(self._url, prefix=self._prefix, store=self.memory)

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def close(self) -> None:
        """Do nothing: there is nothing to let go of."""

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        return self.memory.store(batch, ttl)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return self.memory.load(ids)

    async def subscribe(self) -> AsyncIterator[Sequence[str]]:
        ear = Ear()
        self.memory.listen(ear, on=True)
        try:
            yield []
            while True:
                # A bell rings once. The new one hangs before the look, so that what arrives
                # after the look rings it.
                ear.bell = Bell()
                heard = self.memory.hear(ear)
                if heard is None:
                    await ear.bell.wait(None)
                else:
                    yield heard
        finally:
            self.memory.listen(ear, on=False)

    async def forget(self, ids: Collection[str]) -> int:
        return self.memory.forget(ids)
