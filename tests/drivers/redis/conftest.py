"""An empty Redis with a driver of each kind, open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.drivers.redis.consumer import RedisConsumer


@pytest.fixture
def control(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisBroker]:
    broker = RedisBroker(redis_url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def consumer(broker: RedisBroker) -> AsyncIterator[RedisConsumer]:
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    yield consumer
    await consumer.close()


@pytest.fixture
async def backend(redis_url: str) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend(redis_url)
    await backend.open()
    yield backend
    await backend.close()
