"""Redis behind Sentinel: the driver of one server, over another way to connect."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aiotaskq.testing import BrokerConformance, ResultConformance
from tests.conformance.redis_harness import RedisHarness
from tests.servers import SentinelSet


@pytest.fixture
async def harness(
    redis_sentinel: SentinelSet, redis_sentinel_url: str
) -> AsyncIterator[RedisHarness]:
    harness = RedisHarness(redis_sentinel, [redis_sentinel.master], redis_sentinel.limited_url)
    yield harness
    await harness.close()


class TestRedisSentinelBroker(BrokerConformance):
    pass


class TestRedisSentinelBackend(ResultConformance):
    pass
