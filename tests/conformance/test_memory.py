"""The memory drivers: the reference that the suites were written against."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker, MemoryStore
from aiotaskq.testing import BrokerConformance, ResultConformance, check_broker
from tests.faults.scene import scaled


class MemoryHarness:
    can_cut = False
    can_stall = False

    def __init__(self) -> None:
        self.store = MemoryStore()

    async def broker(self) -> MemoryBroker:
        broker = MemoryBroker(store=self.store)
        await broker.open()
        return broker

    async def backend(self) -> MemoryBackend:
        backend = MemoryBackend(store=self.store)
        await backend.open()
        return backend

    async def pass_time(self, seconds: float) -> None:
        self.store._time_shift += seconds

    async def now(self) -> float:
        return self.store.now()

    async def cut(self) -> None:
        raise NotImplementedError("memory is always within reach")

    async def mend(self) -> None:
        raise NotImplementedError("memory is always within reach")

    async def stall(self, seconds: float) -> None:
        raise NotImplementedError("there is no server that could stand still")

    async def leaks(self) -> list[str]:
        store = self.store
        return [str(one) for one in (*store._holders, *store._queues, *store._schedules)]

    async def close(self) -> None:
        """Do nothing: the drivers have nothing to close."""


@pytest.fixture
async def harness() -> AsyncIterator[MemoryHarness]:
    harness = MemoryHarness()
    yield harness
    await harness.close()


class TestMemoryBroker(BrokerConformance):
    pass


class TestMemoryBackend(ResultConformance):
    pass


@pytest.mark.timeout(3600)  # histories are long, and the machine may be busy
def test_random_histories_agree_with_the_model() -> None:
    check_broker(MemoryHarness, examples=scaled(40, 500), steps=40)
