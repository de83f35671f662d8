"""Rows and tasks that are committed together, while workers are killed."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from aiotaskq import Call, TaskQueue
from aiotaskq.client.outbox import QUEUE
from aiotaskq.drivers.postgres import PostgresBroker
from tests.faults.ledger import Acknowledged, Attempted, Fault, Started
from tests.faults.scene import PATIENCE, Scene, scaled
from tests.servers import Watchdog

QUICK = "tests.faults.application.quick"
PAY = "tests.faults.paying.pay"
PAYING = "tests.faults.paying:app"
OFTEN = (0.2, 0.5)  # seconds


@pytest.fixture(params=["redis", "postgres"])
def broker(request: pytest.FixtureRequest, postgres_url: str) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    for one in (url, postgres_url):
        TaskQueue(broker=one).drivers()  # not in a test: importing a driver reads files
    return url


@pytest.fixture
async def rows(postgres_url: str) -> AsyncIterator[asyncpg.Pool]:
    """A table of the user, which accepts a key twice."""
    async with asyncpg.create_pool(postgres_url, min_size=0, max_size=2) as pool:
        await pool.execute("CREATE TABLE rows (key text)")
        yield pool


@pytest.fixture
async def scene(
    broker: str,
    rows: asyncpg.Pool,
    postgres_url: str,
    seed: int,
    tmp_path: Path,
    watchdog: Watchdog,
) -> AsyncIterator[Scene]:
    """A scene whose results are in PostgreSQL."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    scene = Scene(broker, backend=postgres_url, folder=folder, seed=seed, watchdog=watchdog)
    scene.set(worker_lease=1.5, worker_heartbeat=0.3, max_crashes=50)
    await scene.open()
    try:
        yield scene
    finally:
        await scene.close()


async def written(rows: asyncpg.Pool) -> Counter[str]:
    return Counter(row["key"] for row in await rows.fetch("SELECT key FROM rows"))


def note(scene: Scene, keys: Sequence[str], task: str) -> None:
    """Record acknowledged tasks, whose keys are also their ids."""
    name = task.rpartition(".")[2]
    scene.writer.write(*(Attempted(key=key, task=name, task_id=key) for key in keys))
    scene.writer.write(*(Acknowledged(key=key, task_id=key) for key in keys))


async def test_each_task_writes_once_whenever_its_worker_is_killed(
    scene: Scene, rows: asyncpg.Pool
) -> None:
    # Processes die between the commit of a task and its settlement.
    scene.fleet.more["AIOTASKQ_TESTS_FAULTS_DIE"] = f"succeeded:{scaled(2, 20)}"
    await scene.fleet.worker("-c", "8", processes=2, target=PAYING)
    chance = random.Random(scene.seed)
    keys = [f"pay-{number}" for number in range(scaled(60, 2000))]
    await scene.app.kiq_many(
        Call[Any](PAY, (key, chance.uniform(0, 0.2)), {}, {"task_id": key}) for key in keys
    )
    note(scene, keys, PAY)
    await scene.nemesis.run([scene.nemesis.kill_worker()], times=scaled(3, 40), every=OFTEN)
    await scene.drain()
    verdict = await scene.check()
    assert verdict.counts["second runs"] > 0
    assert {fault.kind for fault in scene.ledger.of(Fault)} >= {"kill", "dies at succeeded"}
    assert await written(rows) == Counter(keys)


@pytest.mark.parametrize("broker", ["redis"], indirect=True)
async def test_what_commits_runs_and_what_is_rolled_back_does_not_whenever_a_relay_is_killed(
    scene: Scene, rows: asyncpg.Pool, postgres_url: str
) -> None:
    scene.set(outbox_url=postgres_url)
    await scene.fleet.worker("-c", "20", processes=2)
    sender = TaskQueue("sender", broker=scene.broker, outbox_url=postgres_url)
    enough = asyncio.Event()
    sending = asyncio.create_task(commit_and_roll_back(scene, sender, rows, enough))
    await scene.nemesis.run([scene.nemesis.kill_worker()], times=scaled(4, 60), every=OFTEN)
    enough.set()
    rolled_back = await sending
    await sender.close()
    await passed_on(postgres_url)
    await scene.drain()
    await scene.check()
    committed = await written(rows)
    ran = {line.key for line in scene.ledger.of(Started)}
    assert ran == committed.keys()
    assert rolled_back
    assert not rolled_back & ran


async def commit_and_roll_back(
    scene: Scene, sender: TaskQueue, rows: asyncpg.Pool, enough: asyncio.Event
) -> set[str]:
    """Send tasks with a row each, some in each transaction; return the keys rolled back."""
    chance = random.Random(scene.seed)
    undone: set[str] = set()
    numbers = itertools.count()
    while not enough.is_set():
        number = next(numbers)
        keys = [f"row-{number}-{place}" for place in range(chance.randint(1, 4))]
        async with rows.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.executemany("INSERT INTO rows VALUES ($1)", [(key,) for key in keys])
            await sender.kiq_many(
                Call[Any](QUICK, (key,), {}, {"task_id": key, "connection": connection})
                for key in keys
            )
            await asyncio.sleep(chance.uniform(0, 0.03))
            if chance.random() < 0.3:
                await transaction.rollback()
                undone.update(keys)
                continue
            # Before the commit: the task may have run when it returns.
            note(scene, keys, QUICK)
            await transaction.commit()
    return undone


async def passed_on(url: str) -> None:
    """Wait until the outbox is empty."""
    store = PostgresBroker(url, prefix=f"aiotaskq_{QUEUE}")
    await store.open()
    async with asyncio.timeout(PATIENCE):
        while await store.depth():
            await asyncio.sleep(0.05)
    await store.close()
