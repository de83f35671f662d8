"""RabbitMQ as the broker, with results in Redis: lost workers, connections and servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiotaskq import TaskQueue
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq.delays import Hop
from tests.faults.ledger import Ended, Fault, Started
from tests.faults.plays import kill_workers
from tests.faults.producer import Some
from tests.faults.scene import PATIENCE, Scene, scaled
from tests.faults.servers import calls, healthy, kills, serves
from tests.servers import RabbitServer, Watchdog

pytestmark = pytest.mark.xdist_group(
    "rabbitmq"
)  # so that one process runs all these tests: a node is heavy

LOAD = scaled(150, 4000)  # tasks
RATE = scaled(100, 120)  # a second
DURABLE_AFTER = 4.0  # seconds until RabbitMQ 3.10 finds a new queue again after it was killed


@pytest.fixture(scope="module")
def durable_from(rabbit_server: RabbitServer) -> float:
    """The time from which the queues of these tests, made here, survive a kill of the server."""
    rabbit_server.start()

    async def make() -> None:
        broker = RabbitBroker(rabbit_server.url())
        await broker.open()
        consumer = broker.consumer(["default"], name="first", lease=60.0)
        await consumer.open()
        await broker.depth()
        # For each delay of up to four seconds.
        digits = [(position, digit) for position in range(3) for digit in range(1, 16)]
        hops = [Hop(position, digit, digit << 4 * position) for position, digit in digits]
        await broker._topology.ensure(paths=[hops])
        await consumer.close()
        await broker.close()

    asyncio.run(make())
    return time.monotonic() + DURABLE_AFTER


@pytest.fixture
def backend(redis_url: str) -> str:
    TaskQueue(broker=redis_url).drivers()  # not in a test: importing a driver reads files
    return redis_url


@pytest.fixture
async def scene(
    rabbit_server: RabbitServer,
    durable_from: float,
    backend: str,
    seed: int,
    tmp_path: Path,
    watchdog: Watchdog,
) -> AsyncIterator[Scene]:
    rabbit_server.start()
    folder = tmp_path / "ledger"
    folder.mkdir()
    scene = Scene(rabbit_server.url(), backend=backend, folder=folder, seed=seed, watchdog=watchdog)
    await scene.open()
    try:
        yield scene
    finally:
        rabbit_server.start()
        await scene.close()


async def test_workers_are_killed_in_the_middle_of_tasks(scene: Scene) -> None:
    await kill_workers(scene)
    await scene.drain()
    verdict = await scene.check()
    assert verdict.counts["faults"] == scaled(4, 25)


async def test_connections_are_closed_by_the_server(
    scene: Scene, rabbit_server: RabbitServer
) -> None:
    await scene.fleet.worker("-c", "20", processes=2)
    scene.producer(*scene.mix(LOAD), rate=RATE)
    close = calls(scene.nemesis, "close connections", rabbit_server.close_connections)
    await scene.nemesis.run([close], times=scaled(3, 60), every=(0.3, 0.6))
    await scene.drain()
    await healthy(scene)
    await scene.check()


async def test_the_server_is_killed(
    scene: Scene, rabbit_server: RabbitServer, durable_from: float
) -> None:
    await scene.fleet.worker("-c", "20", processes=2)
    await asyncio.sleep(max(0.0, durable_from - time.monotonic()))
    delayed = Some("quick", LOAD // 5, {}, {"countdown": 1.5})
    scene.producer(*scene.mix(LOAD), delayed, rate=RATE)
    await scene.ledger.count(Started, 30, within=PATIENCE)
    kill = kills(scene.nemesis, rabbit_server, away=0.0)
    await scene.nemesis.run([kill], times=scaled(1, 10), every=(0.1, 0.5))
    await serves(scene)
    await scene.drain()
    await healthy(scene)
    await scene.check()
    begun = min(fault.at for fault in scene.ledger.of(Fault))
    assert any(line.at < begun for line in scene.ledger.of(Ended)), "it was killed before any task"
