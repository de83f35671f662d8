"""SQLite when the clock jumps: consumers that are spared, and consumers that are given up."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from aiotaskq.contract.broker import Consumer
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import Depth, Maintained
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.drivers.sqlite.process_identity import this_process

pytestmark = pytest.mark.skipif(
    this_process() is None, reason="this system does not tell processes apart"
)

ROOT = Path(__file__).parents[3]
PATIENCE = 120.0  # seconds until a test gives up; never part of one that passes
LEASE = 600.0  # seconds
STEP = LEASE + 1.0

# Another process: it takes a message under a long lease and says so.
HOLDER = """
import asyncio, sys, time
from aiotaskq.drivers.sqlite import SQLiteBroker

async def main():
    broker = SQLiteBroker(sys.argv[1])
    await broker.open()
    consumer = broker.consumer(["q"], name="test", lease=3600.0)
    await consumer.open()
    print(len(await consumer.fetch(1, 0)), flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


class Fleet:
    """Two consumers that live and hold a message each, a third client, and the clock."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"
        self.broker = SQLiteBroker(self.url)
        self.consumers: list[Consumer] = []
        self.others: list[SQLiteBroker] = []
        self._ahead = 0.0
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + self._ahead)

    async def begin(self) -> None:
        await self.broker.open()
        for name in ("a", "b"):
            await self.publish(name)
            broker = SQLiteBroker(self.url)
            await broker.open()
            self.others.append(broker)
            consumer = broker.consumer(["q"], name="test", lease=LEASE)
            await consumer.open()
            assert [one.id for one in await consumer.fetch(1, 0)] == [name]
            self.consumers.append(consumer)

    async def end(self) -> None:
        for consumer in self.consumers:
            await consumer.close()
        for broker in (self.broker, *self.others):
            await broker.close()

    def step(self, seconds: float = STEP) -> None:
        """Set the clock on the wall forward."""
        self._ahead += seconds

    async def publish(self, name: str) -> None:
        await self.broker.publish([Envelope(id=name, queue="q", body=b"")])

    async def renew(self, number: int) -> bool:
        lease = self.broker.lease(self.consumers[number].grant)
        try:
            return await lease.renew()
        finally:
            await lease.close()

    def change(self, statement: str) -> None:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute(statement)


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path / "test.db", monkeypatch)
    await fleet.begin()
    yield fleet
    await fleet.end()


async def test_no_living_consumer_is_fenced_when_the_clock_is_set_forward(fleet: Fleet) -> None:
    for _ in range(3):
        fleet.step()
        assert await fleet.broker.maintain() == Maintained()
        assert await fleet.renew(0)
        assert await fleet.renew(1)
    assert (await fleet.broker.depth())["q"] == Depth(held=2)


async def test_a_silence_that_goes_on_while_somebody_looks_is_forgiven_once(fleet: Fleet) -> None:
    fleet.step()
    for _ in range(4):
        assert await fleet.broker.maintain() == Maintained()
        fleet.step(LEASE * 0.3)  # nobody gives a sign of life, and time passes as it should
    assert await fleet.broker.maintain() == Maintained(reclaimed=2)
    assert not await fleet.renew(0)
    assert not await fleet.renew(1)


async def test_another_silence_before_any_sign_of_life_is_forgiven_too(fleet: Fleet) -> None:
    for _ in range(3):
        fleet.step()
        assert await fleet.broker.maintain() == Maintained()
    assert await fleet.renew(0)
    assert await fleet.renew(1)


async def test_the_first_sign_of_life_after_a_silence_speaks_for_all(fleet: Fleet) -> None:
    fleet.step()
    assert await fleet.renew(0)
    assert await fleet.broker.maintain() == Maintained()
    assert await fleet.renew(1)


async def test_a_consumer_that_opens_after_a_silence_speaks_for_all(fleet: Fleet) -> None:
    fleet.step()
    fleet.consumers.append(fleet.broker.consumer(["q"], name="new", lease=LEASE))
    await fleet.consumers[-1].open()
    assert await fleet.broker.maintain() == Maintained()
    assert await fleet.renew(0)
    assert await fleet.renew(1)


async def test_a_consumer_that_is_silent_alone_is_fenced_though_its_process_lives(
    fleet: Fleet,
) -> None:
    for _ in range(3):
        fleet.step(LEASE * 0.4)
        assert await fleet.renew(0)
    assert await fleet.broker.maintain() == Maintained(reclaimed=1)
    assert not await fleet.renew(1)


async def test_a_consumer_whose_process_cannot_be_seen_is_not_spared(fleet: Fleet) -> None:
    fleet.change("UPDATE aiotaskq_consumers SET process = 'elsewhere/1/1/1' WHERE number = 2")
    fleet.step()
    assert await fleet.broker.maintain() == Maintained(reclaimed=1)
    assert await fleet.renew(0)
    assert not await fleet.renew(1)


@pytest.mark.parametrize("step", [0.0, STEP])
async def test_a_killed_process_is_taken_back_from_at_once_while_the_living_are_spared(
    fleet: Fleet, step: float
) -> None:
    await fleet.publish("c")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, fleet.url], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout is not None
        async with asyncio.timeout(PATIENCE):
            assert (await asyncio.to_thread(holder.stdout.readline)).strip() == "1"
    finally:
        holder.kill()
        holder.communicate()
    fleet.step(step)
    assert await fleet.broker.maintain() == Maintained(reclaimed=1)
    assert (await fleet.broker.depth())["q"] == Depth(ready=1, held=2)
    assert await fleet.renew(0)
    assert await fleet.renew(1)


async def test_a_write_that_waited_long_goes_by_the_time_of_the_write(
    fleet: Fleet,
) -> None:
    with closing(sqlite3.connect(fleet.path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        beat = asyncio.create_task(fleet.renew(0))
        await asyncio.sleep(0.2)  # time to come to wait; that it is enough is not relied on
        fleet.step()
        connection.execute("ROLLBACK")
    assert await beat
    assert await fleet.broker.maintain() == Maintained()
    assert await fleet.renew(1)


async def test_a_consumer_leaves_nothing_behind(fleet: Fleet) -> None:
    await fleet.consumers[0].close()
    fleet.step()
    for _ in range(5):
        await fleet.broker.maintain()
        fleet.step(LEASE * 0.3)
    assert not await fleet.renew(1)
    with closing(sqlite3.connect(fleet.path)) as connection:
        left = connection.execute("SELECT key FROM aiotaskq_meta").fetchall()
    assert sorted(left) == [("beat",), ("schema",), ("secret",), ("seen",), ("spared",)]
