"""T36: schedulers that are killed one after another; each run is sent once."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from aiotaskq import TaskQueue
from tests.faults.fleet import LONG, Fleet, Program
from tests.faults.ledger import Ledger
from tests.faults.scene import LONG_PROFILE, choose_seed, scaled
from tests.servers import RedisServer, Watchdog

SECONDS = scaled(9, 120)
BETWEEN = scaled(2, 10)  # seconds between kills
APP = "tests.faults.clockwork:app"


@pytest.fixture(params=["sqlite", "redis"] if LONG_PROFILE else ["redis"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.db"
    server: RedisServer = request.getfixturevalue("redis_server")
    server.flush()
    return server.url(0)


@pytest.fixture
def fleet(tmp_path: Path, watchdog: Watchdog, broker: str) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, Ledger(tmp_path), watchdog)
    fleet.more = {"AIOTASKQ_TESTS_FAULTS_LEDGER": str(tmp_path), "AIOTASKQ_BROKER_URL": broker}
    yield fleet
    fleet.close()


async def says(program: Program, words: str) -> None:
    end = time.monotonic() + LONG
    while words not in program.output:
        assert program.running, program.output
        assert time.monotonic() < end, program.output
        await asyncio.sleep(0.02)


@pytest.fixture
def app(broker: str) -> TaskQueue:
    app = TaskQueue("clockwork", broker=broker)
    app.drivers()  # now, since loading a time zone reads files
    return app


@pytest.mark.timeout(600)
async def test_each_second_runs_once_though_schedulers_are_killed(
    fleet: Fleet, app: TaskQueue, tmp_path: Path
) -> None:
    chance = random.Random(choose_seed())
    workers = [fleet.start("worker", "aiotaskq", "worker", APP) for _ in range(2)]
    # The last scheduler, beside a worker, lives on.
    commands = [("scheduler", APP), ("beat", APP), ("worker", APP, "-B")]
    schedulers = [fleet.start("scheduler", "aiotaskq", *words) for words in commands]
    for program in (*workers, *schedulers):
        await says(program, "ready")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        await asyncio.sleep(BETWEEN)
        victim = chance.randrange(2)
        schedulers[victim].signal(signal.SIGKILL)
        await schedulers[victim].wait()
        schedulers[victim] = fleet.start("scheduler", "aiotaskq", *commands[victim])
    for program in schedulers:
        await says(program, "ready")
        program.signal(signal.SIGTERM)
    assert [await program.wait() for program in schedulers] == [0, 0, 0]
    async with app, asyncio.timeout(LONG):
        (info,) = await app.schedules.list()
        assert info.last_id is not None
        await app.handle(info.last_id).wait()
        while await (await app.broker()).depth():
            await asyncio.sleep(0.05)
    assert await fleet.stop(*workers) == [0, 0]

    ran = Counter((tmp_path / "ran").read_text().split())
    assert {name: count for name, count in ran.items() if count > 1} == {}
    times = sorted(datetime.fromisoformat(name.partition("@")[2]) for name in ran)
    whole = [times[0] + timedelta(seconds=n) for n in range(len(times))]
    assert times == whole
    assert len(times) >= SECONDS
    assert info.runs == len(times)
