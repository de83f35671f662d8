"""PostgreSQL as the broker: faults of workers and of the server."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from aiotaskq import TaskQueue
from tests.faults.checker import Allowed
from tests.faults.ledger import Fault, Started
from tests.faults.nemesis import Action
from tests.faults.plays import kill_workers
from tests.faults.producer import Some
from tests.faults.scene import LEASE, PATIENCE, Scene, scaled
from tests.faults.servers import OFTEN, calls, healthy, kills, serves
from tests.servers import PostgresServer, Watchdog

LOAD = scaled(250, 5000)  # tasks
RATE = scaled(100, 120)  # a second
STRICT = Allowed(duplicates=0)


@pytest.fixture
def broker(postgres_url: str) -> str:
    TaskQueue(broker=postgres_url).drivers()  # not in a test: importing a driver reads files
    return postgres_url


@pytest.fixture
async def scene(
    broker: str,
    postgres_server: PostgresServer,
    seed: int,
    tmp_path: Path,
    watchdog: Watchdog,
) -> AsyncIterator[Scene]:
    folder = tmp_path / "ledger"
    folder.mkdir()
    scene = Scene(broker, folder=folder, seed=seed, watchdog=watchdog)
    await scene.open()
    try:
        yield scene
    finally:
        postgres_server.start()
        await scene.close()


async def begin(scene: Scene, load: int = LOAD, workers: int = 2) -> None:
    """Start the usual workers and a producer."""
    await scene.fleet.worker("-c", "20", processes=workers)
    scene.producer(*scene.mix(load), rate=RATE)


async def test_workers_are_killed_in_the_middle_of_tasks(scene: Scene) -> None:
    await kill_workers(scene)
    await scene.drain()
    verdict = await scene.check()
    assert verdict.counts["faults"] == scaled(4, 25)


async def test_a_worker_is_frozen_for_longer_than_its_lease(scene: Scene) -> None:
    scene.set(worker_lease=1.5, worker_heartbeat=0.3, max_crashes=50)
    await scene.fleet.worker("-c", "10", processes=2)
    scene.producer(*scene.mix(scaled(200, 4000)), rate=100)
    await scene.nemesis.run(
        [scene.nemesis.freeze_worker((2.5, 3.5))], times=scaled(1, 15), every=(0.4, 0.8)
    )
    await scene.drain()
    await scene.check()


async def test_poison_ends_among_the_dead_letters_and_takes_nobody_along(scene: Scene) -> None:
    poison = scaled(2, 5)
    await scene.fleet.worker("-c", "20", processes=3)
    scene.producer(*scene.mix(scaled(150, 2000)), Some("poison", poison), rate=100)
    await scene.drain(within=2 * PATIENCE)
    verdict = await scene.check(Allowed(drain=2 * PATIENCE))
    assert verdict.counts["dead"] == poison
    assert 3 <= len(scene.ledger.of(Fault)) <= 3 * poison


async def test_the_server_is_killed(scene: Scene, postgres_server: PostgresServer) -> None:
    await begin(scene)
    kill = kills(scene.nemesis, postgres_server)
    await scene.nemesis.run([kill], times=scaled(3, 25), every=OFTEN)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


async def test_all_connections_are_ended(scene: Scene, postgres_server: PostgresServer) -> None:
    await begin(scene)
    end = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    action = calls(scene.nemesis, "end connections", lambda: postgres_server.sql(end))
    await scene.nemesis.run([action], times=scaled(5, 100), every=(0.3, 0.5))
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


@pytest.mark.parametrize("gone", [False, True], ids=["stands still", "is gone"])
async def test_for_longer_than_a_lease_the_server(
    scene: Scene, postgres_server: PostgresServer, gone: bool
) -> None:
    # With few heartbeats, a worker is likely to look for lapsed leases before others are back.
    scene.set(worker_heartbeat=0.45 * LEASE)
    await begin(scene, LOAD // 2, workers=4)
    scene.producer(Some("quick", 40, {"seconds": 2.5 * LEASE}), rate=1000)
    await scene.ledger.count(Started, 40 + LOAD // 4, within=PATIENCE)
    action = away(scene, postgres_server) if gone else still(scene, postgres_server)
    await scene.nemesis.run([action], times=scaled(1, 20), every=OFTEN)
    await serves(scene)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


def away(scene: Scene, server: PostgresServer) -> Action:
    async def act(chosen: random.Random) -> bool:
        with scene.nemesis.lasting("gone"):
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(1.7 * LEASE)
            await asyncio.to_thread(server.start)
        return True

    return act


def still(scene: Scene, server: PostgresServer) -> Action:
    async def act(chosen: random.Random) -> bool:
        with scene.nemesis.lasting("frozen"), frozen(server):
            await asyncio.sleep(1.7 * LEASE)
        return True

    return act


@contextlib.contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """Freeze the server with each process that serves a connection."""
    stopped: list[psutil.Process] = []
    try:
        server.pause()  # first, so that it starts no more processes
        for process in psutil.Process(server.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                stopped.append(process)
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        server.resume()
