from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aiotaskq.testing import BrokerConformance, ResultConformance, check_broker
from tests.conformance.redis_harness import RedisHarness
from tests.faults.scene import scaled
from tests.servers import RedisCluster


@pytest.fixture
async def harness(
    redis_cluster: RedisCluster, redis_cluster_url: str
) -> AsyncIterator[RedisHarness]:
    harness = RedisHarness(redis_cluster, redis_cluster.masters, redis_cluster.limited_url)
    yield harness
    await harness.close()


class TestRedisClusterBroker(BrokerConformance):
    impossible = ({"id": "\ud800"}, {"queue": "\ud800"})


class TestRedisClusterBackend(ResultConformance):
    pass


@pytest.mark.timeout(3600)  # histories are long, and the machine may be busy
def test_random_histories_agree_with_the_model(
    redis_cluster: RedisCluster, redis_cluster_url: str
) -> None:
    def make() -> RedisHarness:
        redis_cluster.flush()  # a history that failed may have left its messages
        return RedisHarness(redis_cluster, redis_cluster.masters, redis_cluster.limited_url)

    check_broker(make, examples=scaled(3, 50), steps=30)
