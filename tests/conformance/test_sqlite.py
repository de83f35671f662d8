"""The SQLite drivers, on a file for each test."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker
from aiotaskq.testing import BrokerConformance, ResultConformance, check_broker
from tests.faults.scene import scaled

# A process that hangs while it repairs the file after a crash blocks all others: it holds the locks
# for writing and repairing (bytes 120 and 122 of the index file), and the header of the index (its
# first 96 bytes) is void, so that no process can read without these locks.
HANG = """
import fcntl, sys
with open(sys.argv[1], "r+b") as index:
    fcntl.lockf(index, fcntl.LOCK_EX, 3, 120)
    index.write(bytes(96))
    index.flush()
    print(flush=True)
    sys.stdin.read()
"""


class SQLiteHarness:
    can_cut = True
    can_stall = True

    def __init__(self, folder: Path) -> None:
        self._path = folder / "test.db"
        self._made: list[SQLiteBroker | SQLiteBackend] = []
        self._shift = 0.0
        self._hanging: subprocess.Popen[str] | None = None

    async def broker(self) -> SQLiteBroker:
        broker = SQLiteBroker(f"sqlite:///{self._path}?busy_timeout=5")
        await self._open(broker)
        return broker

    async def backend(self) -> SQLiteBackend:
        backend = SQLiteBackend(f"sqlite:///{self._path}?busy_timeout=5")
        await self._open(backend)
        return backend

    async def pass_time(self, seconds: float) -> None:
        self._shift += seconds
        for driver in self._made:
            driver._time_shift = self._shift

    async def now(self) -> float:
        return time.time() + self._shift

    async def cut(self) -> None:
        self._set_patience(0.1)  # each call would otherwise try for the whole busy_timeout
        self._hanging = subprocess.Popen(
            [sys.executable, "-c", HANG, f"{self._path}-shm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._hanging.stdout is not None
        await asyncio.to_thread(self._hanging.stdout.readline)
        # There is no server to notify clients: they look once a second.
        await asyncio.sleep(1.5)

    async def mend(self) -> None:
        if self._hanging is not None:
            await asyncio.to_thread(self._hanging.communicate)
            self._hanging = None
        self._set_patience(5.0)

    async def stall(self, seconds: float) -> None:
        await self.pass_time(seconds)
        with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
            connection.execute(
                "UPDATE aiotaskq_meta SET value = value - ?"
                " WHERE key IN ('beat', 'spared', 'seen')",
                (seconds,),
            )

    async def leaks(self) -> list[str]:
        with closing(sqlite3.connect(self._path)) as connection:
            return [
                f"{table}: {row}"
                for table in ("messages", "consumers", "dead", "schedules")
                for row in connection.execute(f"SELECT * FROM aiotaskq_{table}")
            ]

    async def close(self) -> None:
        await self.mend()
        for driver in self._made:
            await driver.close()

    async def _open(self, driver: SQLiteBroker | SQLiteBackend) -> None:
        driver._time_shift = self._shift
        self._made.append(driver)
        await driver.open()

    def _set_patience(self, seconds: float) -> None:
        for driver in self._made:
            connection = driver._connection
            connection.url = msgspec.structs.replace(connection.url, busy_timeout=seconds)
            connection._database._url = connection.url


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[SQLiteHarness]:
    harness = SQLiteHarness(tmp_path)
    yield harness
    await harness.close()


class TestSQLiteBroker(BrokerConformance):
    impossible = ({"id": "\ud800"}, {"queue": "\ud800"}, {"priority": 2**70})


class TestSQLiteBackend(ResultConformance):
    pass


@pytest.mark.timeout(3600)  # histories are long, and the machine may be busy
def test_random_histories_agree_with_the_model(tmp_path: Path) -> None:
    numbers = itertools.count()

    def harness() -> SQLiteHarness:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return SQLiteHarness(folder)

    check_broker(harness, examples=scaled(10, 200), steps=30)
