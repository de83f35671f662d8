from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis

from aiotaskq.drivers.redis.cluster import ClusterBackend, ClusterBroker
from aiotaskq.testing.brokers import BrokerConformance
from aiotaskq.testing.model import check_broker
from aiotaskq.testing.results import ResultConformance
from tests.servers import RedisCluster

# What the servers themselves forget comes nearer, too.
PASS_TIME = """
    for _, key in ipairs(redis.call('KEYS', '*')) do
      local left = redis.call('PTTL', key)
      if left >= 0 then
        redis.call('PEXPIRE', key, left - tonumber(ARGV[1]))
      end
    end
"""
PERMANENT = (":queues", ":wake", ":levels", ":cancelled")  # as on a single server


class ClusterHarness:
    can_cut = True
    can_stall = True

    def __init__(self, cluster: RedisCluster, options: str = "") -> None:
        self._cluster = cluster
        self._url = f"{cluster.url}{options}"
        self._controls = [redis.Redis(host=one.host, port=one.port) for one in cluster.masters]
        self._brokers: list[ClusterBroker] = []
        self._backends: list[ClusterBackend] = []
        self._shift = 0.0

    async def broker(self) -> ClusterBroker:
        broker = ClusterBroker(self._url)
        broker._time_shift = self._shift
        self._brokers.append(broker)
        await broker.open()
        return broker

    async def backend(self) -> ClusterBackend:
        backend = ClusterBackend(self._url)
        self._backends.append(backend)
        await backend.open()
        return backend

    async def pass_time(self, seconds: float) -> None:
        self._shift += seconds
        for broker in self._brokers:
            broker._time_shift = self._shift
        for control in self._controls:
            control.eval(PASS_TIME, 0, round(seconds * 1000))

    async def now(self) -> float:
        seconds, micros = self._controls[0].time()
        return float(seconds + micros / 1e6 + self._shift)

    async def cut(self) -> None:
        await asyncio.to_thread(self._cluster.stop)

    async def mend(self) -> None:
        await asyncio.to_thread(self._cluster.start)

    async def stall(self, seconds: float) -> None:
        await self.pass_time(seconds)
        for control in self._controls:
            for key in control.scan_iter("*:meta"):
                for field in ("beat", "granted", "seen"):
                    if control.hexists(key, field):
                        control.hincrbyfloat(key, field, -seconds)

    async def leaks(self) -> list[str]:
        return [
            key.decode()
            for control in self._controls
            for key in control.scan_iter("*")
            if control.ttl(key) < 0 and not key.decode().endswith(PERMANENT)
        ]

    async def close(self) -> None:
        for broker in self._brokers:
            await broker.close()
        for backend in self._backends:
            await backend.close()
        for control in self._controls:
            control.flushall()
            control.close()


@pytest.fixture
async def harness(
    redis_cluster: RedisCluster, redis_cluster_url: str
) -> AsyncIterator[ClusterHarness]:
    harness = ClusterHarness(redis_cluster)
    yield harness
    await harness.close()


class TestRedisClusterBroker(BrokerConformance):
    pass


class TestRedisClusterBackend(ResultConformance):
    pass


@pytest.mark.timeout(300)  # a machine may be busy, and a history is long
def test_random_histories_agree_with_the_model(
    redis_cluster: RedisCluster, redis_cluster_url: str
) -> None:
    def make() -> ClusterHarness:
        redis_cluster.flush()  # after a history that failed, and left what it had stored
        return ClusterHarness(redis_cluster)

    check_broker(make, examples=5, steps=30)
