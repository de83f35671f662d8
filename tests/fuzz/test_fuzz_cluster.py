"""The fuzzer on a Redis cluster: attacks on the shard of a queue."""

from __future__ import annotations

import contextlib

import pytest
import redis

from aiotaskq.drivers.redis.cluster.broker import ClusterBroker
from aiotaskq.drivers.redis.cluster.placement import TAGS, ShardPlacement
from aiotaskq.testing.fuzz import body_attacks, fuzz
from tests.fuzz import attacks_redis
from tests.fuzz.test_fuzz import SECONDS, seed

__all__ = ["seed"]

pytestmark = [pytest.mark.may_block, pytest.mark.timeout(240 + 10 * SECONDS)]


async def test_hostile_entries_in_a_cluster_harm_nobody(redis_cluster_url: str, seed: int) -> None:
    broker = ClusterBroker(redis_cluster_url)
    await broker.open()
    [shard] = ShardPlacement({"": 1}).shards_of("default")
    first = redis_cluster_url.partition("://")[2].partition(",")[0].partition("/")[0]
    with contextlib.closing(redis.RedisCluster.from_url(f"redis://{first}")) as client:
        attacks = [
            *attacks_redis.attacks(client, seed, f"aiotaskq:{{{TAGS[shard]}}}"),
            *body_attacks(broker.publish, seed),
        ]
        assert await fuzz(redis_cluster_url, attacks, seconds=SECONDS, seed=seed)
    await broker.close()
