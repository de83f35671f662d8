"""Faults of servers under load: Redis dies, loses data, is full or hangs; PostgreSQL dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from aiotaskq import Call, TaskHandle, TaskQueue
from aiotaskq.errors import BrokerFull
from tests.faults.checker import Allowed
from tests.faults.fleet import Program
from tests.faults.ledger import Acknowledged, Ended, Fault, Said, Started
from tests.faults.producer import Some
from tests.faults.scene import LEASE, Scene, scaled
from tests.faults.servers import (
    OFTEN,
    PATIENCE,
    TunedRedis,
    commands,
    healthy,
    is_red,
    kills,
    serves,
    stalls,
)
from tests.servers import PostgresServer, Watchdog

LOAD = scaled(250, 5000)  # tasks
RATE = scaled(100, 120)  # a second
STRICT = Allowed(duplicates=0)
MEGABYTE = 1024 * 1024
BULKY = "tests.faults.bulky.bulky"

StartServer: TypeAlias = Callable[..., TunedRedis]


@pytest.fixture
def start_redis(watchdog: Watchdog) -> Iterator[StartServer]:
    """Start Redis servers, with settings of their own."""
    servers: list[TunedRedis] = []

    def start(*, durable: bool = True, **settings: str) -> TunedRedis:
        server = TunedRedis(watchdog, durable=durable, **settings)
        servers.append(server)
        server.start()
        TaskQueue(broker=server.url()).drivers()  # not in a test: importing it reads files
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(start_redis: StartServer) -> TunedRedis:
    """A Redis server that loses no acknowledged write."""
    return start_redis()


@pytest.fixture
def broker(server: TunedRedis) -> str:
    """The broker of the scene."""
    return server.url()


async def begin(scene: Scene, load: int = LOAD, workers: int = 2) -> None:
    """Start the usual workers and a producer."""
    await scene.fleet.worker("-c", "20", processes=workers)
    scene.producer(*scene.mix(load), rate=RATE)


async def acknowledged(scene: Scene, count: int) -> None:
    """Wait until that many tasks are acknowledged."""
    await scene.ledger.count(Acknowledged, count, within=120.0)


# --- T17 ----------------------------------------------------------------------------------------


async def test_t17_redis_is_killed_and_has_written_all(scene: Scene, server: TunedRedis) -> None:
    await begin(scene)
    times = scaled(3, 25)
    await scene.nemesis.run([kills(scene.nemesis, server)], times=times, every=OFTEN)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


class TestWithAnAofThatIsSyncedEachSecond:
    @pytest.fixture
    def server(self, start_redis: StartServer) -> TunedRedis:
        return start_redis(appendfsync="everysec")

    async def test_t17b_redis_is_killed(self, scene: Scene, server: TunedRedis) -> None:
        await begin(scene)
        times = scaled(2, 20)
        await scene.nemesis.run([kills(scene.nemesis, server)], times=times, every=OFTEN)
        await scene.sent()
        scene.drained = await scene.observer.drained((), PATIENCE)
        await healthy(scene)
        verdict = await scene.check(Allowed(lost=True))
        # During a sync a write is delayed, by two seconds at most.
        kinds = scene.ledger.of(Fault)
        doubtful = [
            line
            for line in scene.ledger.of(Acknowledged)
            if any(fault.at - 2.5 <= line.at <= fault.at + 0.1 for fault in kinds)
        ]
        assert verdict.counts["lost"] <= len(doubtful)


class TestWithoutPersistence:
    @pytest.fixture
    def server(self, start_redis: StartServer) -> TunedRedis:
        return start_redis(durable=False)

    async def test_t17c_redis_is_killed_and_forgets_all(
        self, scene: Scene, server: TunedRedis
    ) -> None:
        await begin(scene)
        times = scaled(2, 20)
        await scene.nemesis.run([kills(scene.nemesis, server)], times=times, every=OFTEN)
        await scene.sent()
        await serves(scene)
        scene.drained = await scene.observer.drained((), PATIENCE)
        await healthy(scene)
        await scene.check(Allowed(lost=True))

    async def test_t19_all_is_flushed(self, scene: Scene, server: TunedRedis) -> None:
        await begin(scene)
        flush = commands(scene.nemesis, server, "FLUSHALL")
        await scene.nemesis.run([flush], times=scaled(2, 20), every=OFTEN)
        await scene.sent()
        await serves(scene)
        scene.drained = await scene.observer.drained((), PATIENCE)
        await healthy(scene)
        await scene.check(Allowed(lost=True))


# --- T18 ----------------------------------------------------------------------------------------


async def test_t18_redis_is_loading(scene: Scene, server: TunedRedis) -> None:
    program = await scene.fleet.worker("-c", "20", processes=2)
    scene.producer(*scene.mix(LOAD), rate=RATE)
    await acknowledged(scene, 20)
    await asyncio.to_thread(server.kill)
    make_it_load(server.folder, scaled(30, 300))
    before = len(complaints(program))
    with scene.nemesis.lasting("loading"):
        begun = time.monotonic()
        await asyncio.to_thread(server.start)
        took = time.monotonic() - begun
    said = complaints(program)[before:]
    # Two processes with a few connections each: none of them may log again and again.
    assert len(said) < 40 + took, "\n".join(said)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


def complaints(program: Program) -> list[str]:
    """Return the log lines of a program that should not be there."""
    return [line for line in program.output.splitlines() if "WARNING" in line or "ERROR" in line]


def make_it_load(folder: Path, megabytes: int) -> None:
    """Give a stopped server much data to load when it starts."""
    (aof,) = (folder / "appendonlydir").glob("*.incr.aof")
    select = b"*2\r\n$6\r\nSELECT\r\n$2\r\n63\r\n"  # not the database of the scene
    one = b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\nb\r\n"
    with aof.open("ab") as file:
        file.write(select)
        for _ in range(megabytes):
            file.write(one * (1024 * 1024 // len(one)))


# --- T20 ----------------------------------------------------------------------------------------


async def fills_up(scene: Scene, server: TunedRedis) -> None:
    """Fill the memory of the server, so that senders are refused."""
    await asyncio.to_thread(server.command, "CONFIG SET maxmemory 1mb")
    app = TaskQueue("client", broker=server.url())
    for _ in range(5):
        with pytest.raises(BrokerFull):
            await app.send("tests.faults.application.quick", ["it never runs"])
    await app.close()


async def test_t20_a_queue_drains_without_memory(scene: Scene, server: TunedRedis) -> None:
    await scene.fleet.worker("-c", "20", processes=2)
    scene.producer(Some("quick", 150, {"seconds": [0.0, 0.5]}), Some("flaky", 20), rate=1000)
    await scene.sent()
    with scene.nemesis.lasting("no memory"):
        await fills_up(scene, server)
        wanted = {line.task_id for line in scene.ledger.of(Acknowledged)}
        assert await scene.observer.drained(wanted, PATIENCE), "it does not drain"
        await fills_up(scene, server)
        await asyncio.to_thread(server.command, "CONFIG SET maxmemory 0")
    await serves(scene)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


# --- T21 to T23 ---------------------------------------------------------------------------------


async def test_t21_scripts_are_flushed(scene: Scene, server: TunedRedis) -> None:
    await begin(scene)
    flush = commands(scene.nemesis, server, "SCRIPT FLUSH")
    await scene.nemesis.run([flush], times=scaled(12, 300), every=(0.2, 0.2))
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


async def test_t22_connections_are_killed(scene: Scene, server: TunedRedis) -> None:
    await begin(scene)
    kill = commands(scene.nemesis, server, "CLIENT KILL TYPE normal")
    await scene.nemesis.run([kill], times=scaled(6, 120), every=(0.5, 0.5))
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


async def test_t22_clients_are_paused_for_longer_than_they_wait(
    scene: Scene, server: TunedRedis
) -> None:
    impatient = f"{server.url()}?socket_timeout=1"
    await scene.fleet.worker("-c", "20", processes=2, AIOTASKQ_BROKER_URL=impatient)
    scene.producer(*scene.mix(LOAD), rate=RATE)
    await acknowledged(scene, 20)
    seconds = 1.5 * LEASE
    pause = commands(
        scene.nemesis, server, f"CLIENT PAUSE {int(seconds * 1000)} ALL", seconds=seconds
    )
    await scene.nemesis.run([pause], times=scaled(1, 20), every=OFTEN)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


async def test_t23_redis_stands_still_for_longer_than_a_lease(
    scene: Scene, server: TunedRedis
) -> None:
    await begin_with_long_ones(scene)
    stall = stalls(scene.nemesis, server, 1.7 * LEASE)
    await scene.nemesis.run([stall], times=scaled(1, 20), every=OFTEN)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


async def test_t23_redis_is_gone_for_longer_than_a_lease(scene: Scene, server: TunedRedis) -> None:
    await begin_with_long_ones(scene)
    for _ in range(scaled(1, 20)):
        with scene.nemesis.lasting("gone"):
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(1.7 * LEASE)
            await asyncio.to_thread(server.start)
        await serves(scene)
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


async def begin_with_long_ones(scene: Scene) -> None:
    """Start many workers, and keep tasks running.

    With few heartbeats, a worker is likely to look for lapsed leases before others are back.
    """
    scene.set(worker_heartbeat=0.45 * LEASE)
    await begin(scene, LOAD // 2, workers=5)
    scene.producer(Some("quick", 40, {"seconds": 2.5 * LEASE}), rate=1000)
    await scene.ledger.count(Started, 40 + LOAD // 4, within=PATIENCE)


# --- T29 ----------------------------------------------------------------------------------------


class TestWithResultsInPostgres:
    @pytest.fixture
    async def scene(
        self, server: TunedRedis, postgres_url: str, seed: int, tmp_path: Path, watchdog: Watchdog
    ) -> AsyncIterator[Scene]:
        async with play(server.url(), postgres_url, seed, tmp_path, watchdog) as scene:
            yield scene

    async def test_t29_postgres_is_killed(
        self, scene: Scene, postgres_server: PostgresServer
    ) -> None:
        await begin(scene)
        await acknowledged(scene, 20)
        nemesis = scene.nemesis
        await nemesis.run([kills(nemesis, postgres_server)], times=scaled(2, 20), every=OFTEN)
        await scene.drain()
        await healthy(scene)
        # Once for long enough to make workers unhealthy.
        scene.producer(*scene.mix(LOAD // 2), rate=RATE)
        with nemesis.lasting("no postgres"):
            await asyncio.to_thread(postgres_server.kill)
            await scene.ledger.count(Said, 1, within=PATIENCE, where=is_red)
            await asyncio.to_thread(postgres_server.start)
        await scene.drain()
        await healthy(scene)
        await scene.check(STRICT)

    async def test_t29_what_waits_for_postgres_is_bounded(
        self, scene: Scene, postgres_server: PostgresServer
    ) -> None:
        program = await scene.fleet.worker("-c", "10", target="tests.faults.bulky:app")
        (worker,) = scene.fleet.workers(program)
        app = TaskQueue("client", broker=scene.broker)
        memory = worker.memory_info().rss
        with scene.nemesis.lasting("no postgres"):
            await asyncio.to_thread(postgres_server.kill)
            handles: list[TaskHandle[str]] = await app.kiq_many(
                [Call(BULKY, (f"bulky-{n}", 900_000), {}, {}) for n in range(110)]
            )
            # 64 MB of results may wait, and those of running tasks are added to them.
            await scene.ledger.count(Ended, 60, within=PATIENCE)
            await asyncio.sleep(1.0)  # without a bound all tasks would have run by then
            assert len(scene.ledger.of(Started)) < 100
            assert worker.memory_info().rss - memory < 250 * MEGABYTE
            await asyncio.to_thread(postgres_server.start)
        ids = {handle.id for handle in handles}
        assert await scene.observer.drained(ids, PATIENCE)
        assert len(scene.ledger.of(Started)) == len(ids)
        await app.close()


@asynccontextmanager
async def play(
    broker: str, backend: str, seed: int, tmp_path: Path, watchdog: Watchdog, **settings: str
) -> AsyncIterator[Scene]:
    """A scene whose results are in PostgreSQL."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    TaskQueue(broker=broker, backend=backend).drivers()
    scene = Scene(
        broker,
        backend=backend,
        folder=folder,
        seed=seed,
        watchdog=watchdog,
        settings={f"AIOTASKQ_{name.upper()}": value for name, value in settings.items()},
    )
    await scene.open()
    try:
        yield scene
    finally:
        await scene.close()
