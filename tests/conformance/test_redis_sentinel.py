"""Redis behind Sentinel: the driver of one server, over another way to connect.

What has to do with connections, and what shows that all of it is there: the rest is the same code.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import redis

from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.testing.cancelling import CancelTests
from aiotaskq.testing.leases import SettlementTests
from aiotaskq.testing.publishing import PublishTests, UniqueTests
from aiotaskq.testing.results import ResultConformance
from aiotaskq.testing.schedules import ScheduleTests
from tests.servers import SentinelSet


class SentinelHarness:
    can_cut = False  # tests/drivers/redis/test_failover.py does more than that
    can_stall = False

    def __init__(self, servers: SentinelSet) -> None:
        self._url = servers.url
        master = servers.master
        self._control = redis.Redis(host=master.host, port=master.port)
        self._brokers: list[RedisBroker] = []
        self._backends: list[RedisBackend] = []
        self._shift = 0.0

    async def broker(self) -> RedisBroker:
        broker = RedisBroker(self._url)
        broker._time_shift = self._shift
        self._brokers.append(broker)
        await broker.open()
        return broker

    async def backend(self) -> RedisBackend:
        backend = RedisBackend(self._url)
        self._backends.append(backend)
        await backend.open()
        return backend

    async def pass_time(self, seconds: float) -> None:
        self._shift += seconds
        for broker in self._brokers:
            broker._time_shift = self._shift
        for key in self._control.scan_iter("*"):
            if (left := self._control.pttl(key)) >= 0:
                self._control.pexpire(key, left - round(seconds * 1000))

    async def now(self) -> float:
        seconds, micros = self._control.time()
        return float(seconds + micros / 1e6 + self._shift)

    async def cut(self) -> None:
        raise NotImplementedError

    async def mend(self) -> None:
        raise NotImplementedError

    async def stall(self, seconds: float) -> None:
        raise NotImplementedError

    async def leaks(self) -> list[str]:
        permanent = (":queues", ":wake", ":levels", ":cancelled")
        left = [key.decode() for key in self._control.scan_iter("*")]
        return [key for key in left if self._control.ttl(key) < 0 and not key.endswith(permanent)]

    async def close(self) -> None:
        for broker in self._brokers:
            await broker.close()
        for backend in self._backends:
            await backend.close()
        self._control.flushall()
        self._control.close()


@pytest.fixture
async def harness(
    redis_sentinel: SentinelSet, redis_sentinel_url: str
) -> AsyncIterator[SentinelHarness]:
    harness = SentinelHarness(redis_sentinel)
    yield harness
    await harness.close()


class TestRedisSentinelBroker(
    PublishTests, UniqueTests, SettlementTests, CancelTests, ScheduleTests
):
    pass


class TestRedisSentinelBackend(ResultConformance):
    pass
