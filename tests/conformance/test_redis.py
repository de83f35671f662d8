from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis

from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.testing.brokers import BrokerConformance
from aiotaskq.testing.model import check_broker
from aiotaskq.testing.results import ResultConformance
from tests.servers import RedisServer

# What the server itself forgets comes nearer, too.
PASS_TIME = """
    for _, key in ipairs(redis.call('KEYS', '*')) do
      local left = redis.call('PTTL', key)
      if left >= 0 then
        redis.call('PEXPIRE', key, left - tonumber(ARGV[1]))
      end
    end
"""


# What stays when all messages are gone, and takes no more room the more there were; and ids that
# were cancelled, which a cancelling some days later drops.
PERMANENT = (":queues", ":wake", ":levels", ":cancelled")


class RedisHarness:
    can_cut = True
    can_stall = True

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._url = server.url(0)
        self._control = redis.Redis.from_url(self._url)
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
        self._control.eval(PASS_TIME, 0, round(seconds * 1000))

    async def now(self) -> float:
        seconds, micros = self._control.time()
        return float(seconds + micros / 1e6 + self._shift)

    async def cut(self) -> None:
        await asyncio.to_thread(self._server.stop)

    async def mend(self) -> None:
        await asyncio.to_thread(self._server.start)

    async def stall(self, seconds: float) -> None:
        await self.pass_time(seconds)
        for key in self._control.scan_iter("*:meta"):
            for field in ("beat", "granted", "seen"):
                if self._control.hexists(key, field):
                    self._control.hincrbyfloat(key, field, -seconds)

    async def leaks(self) -> list[str]:
        left = [key.decode() for key in self._control.scan_iter("*")]
        return [key for key in left if self._control.ttl(key) < 0 and not key.endswith(PERMANENT)]

    async def close(self) -> None:
        for broker in self._brokers:
            await broker.close()
        for backend in self._backends:
            await backend.close()
        self._control.flushall()
        self._control.close()


@pytest.fixture
async def harness(redis_server: RedisServer, redis_url: str) -> AsyncIterator[RedisHarness]:
    harness = RedisHarness(redis_server)
    yield harness
    await harness.close()


class TestRedisBroker(BrokerConformance):
    pass


class TestRedisBackend(ResultConformance):
    pass


@pytest.mark.timeout(300)  # a machine may be busy, and a history is long
def test_random_histories_agree_with_the_model(redis_server: RedisServer, redis_url: str) -> None:
    def make() -> RedisHarness:
        redis_server.flush()  # after a history that failed, and left what it had stored
        return RedisHarness(redis_server)

    check_broker(make, examples=30, steps=30)
