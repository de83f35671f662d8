from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aiotaskq.testing import BrokerConformance, ResultConformance, check_broker
from tests.conformance.redis_harness import RedisHarness
from tests.faults.scene import scaled
from tests.servers import RedisServer


@pytest.fixture
async def harness(redis_server: RedisServer, redis_url: str) -> AsyncIterator[RedisHarness]:
    harness = RedisHarness(
        redis_server, [redis_server], redis_server.url(account=redis_server.limited)
    )
    yield harness
    await harness.close()


class TestRedisBroker(BrokerConformance):
    impossible = ({"id": "\ud800"}, {"queue": "\ud800"})


class TestRedisBackend(ResultConformance):
    pass


@pytest.mark.timeout(3600)  # histories are long, and the machine may be busy
def test_random_histories_agree_with_the_model(redis_server: RedisServer, redis_url: str) -> None:
    def make() -> RedisHarness:
        redis_server.flush()  # a history that failed may have left its messages
        return RedisHarness(
            redis_server, [redis_server], redis_server.url(account=redis_server.limited)
        )

    check_broker(make, examples=scaled(8, 200), steps=30)
