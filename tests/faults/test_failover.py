"""Failover of Redis under load: masters die and replicas are promoted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from aiotaskq import TaskQueue
from tests.faults.checker import Allowed
from tests.faults.ledger import Acknowledged
from tests.faults.nemesis import Action
from tests.faults.scene import Scene, scaled
from tests.faults.servers import healthy
from tests.servers import RedisCluster, SentinelSet, Watchdog

LOAD = scaled(300, 5000)  # tasks
RATE = scaled(100, 120)  # a second
TIMES = scaled(1, 8)
EVERY = (2.0, 3.0)  # seconds between faults

pytestmark = pytest.mark.timeout(scaled(600, 1200))


@pytest.fixture(params=["sentinel", "cluster"])
def servers(
    request: pytest.FixtureRequest, watchdog: Watchdog
) -> Iterator[SentinelSet | RedisCluster]:
    servers = SentinelSet(watchdog) if request.param == "sentinel" else RedisCluster(watchdog)
    try:
        servers.start()
        yield servers
    finally:
        servers.close()


@pytest.fixture
def broker(servers: SentinelSet | RedisCluster) -> str:
    """A broker whose tasks count as sent when a replica has them."""
    if isinstance(servers, SentinelSet):
        url = f"{servers.url}&wait_replicas=1"
    else:
        url = f"{servers.url}?wait_replicas=1&shards=3"
    TaskQueue(broker=url).drivers()  # not in a test: importing a driver reads files
    return url


def fails_over(scene: Scene, servers: SentinelSet | RedisCluster) -> Action:
    """Kill a master, wait for the promotion of another, and start it as its replica."""

    async def act(chosen: random.Random) -> bool:
        with scene.nemesis.lasting("kill a master"):
            await asyncio.to_thread(servers.fail_over)
            await asyncio.to_thread(servers.start)
        return True

    return act


async def test_t31_a_master_dies_and_all_that_a_replica_has_is_run(
    scene: Scene, servers: SentinelSet | RedisCluster
) -> None:
    await scene.fleet.worker("-c", "20", processes=2)
    scene.producer(*scene.mix(LOAD), rate=RATE)
    await scene.ledger.count(Acknowledged, LOAD // 10, within=120.0)
    await scene.nemesis.run([fails_over(scene, servers)], times=TIMES, every=EVERY)
    await scene.drain()
    await healthy(scene)
    # The replica may not know the last deliveries of the dead master, and delivers them again.
    await scene.check(Allowed(errors=[r"aiotaskq\.\S*Unavailable"]))
