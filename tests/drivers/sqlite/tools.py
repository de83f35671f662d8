"""Helpers that the tests of the SQLite driver share."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from aiotaskq.contract.broker import Consumer
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker
from aiotaskq.drivers.sqlite.database import SQLiteDatabase

ROOT = Path(__file__).parents[3]
PATIENCE = 120.0  # seconds until a test gives up; never part of a test that passes
NEVER = 3600.0  # seconds; a test that passes does not wait for the end of these

Process = subprocess.Popen[str]
Start = Callable[[str], Process]

# The beginning of a child process of a test; the lines of the test follow, indented.
PREAMBLE = """
import asyncio, os, random, sys, time
from aiotaskq.contract.message import *
from aiotaskq.contract.outcome import *
from aiotaskq.contract.settlement import *
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker
from aiotaskq.errors import *
from msgspec import Raw

URL = sys.argv[1]

def say(*words):
    print(*words, flush=True)

def envelope(name, **fields):
    return Envelope(**{"id": name, "queue": "q", "body": b"body", **fields})

async def told():
    return await asyncio.to_thread(sys.stdin.readline)

async def main():
    broker = SQLiteBroker(URL)
    await broker.open()
"""


def envelope(name: str, **fields: Any) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"body", **fields})


async def line(process: Process) -> str:
    """Wait for the next line that a process prints."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        return (await asyncio.to_thread(process.stdout.readline)).strip()


def tell(process: Process) -> None:
    """Let a process that awaits `told()` go on."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


async def opened(broker: SQLiteBroker, *queues: str, lease: float = NEVER) -> Consumer:
    consumer = broker.consumer(queues or ("q",), name="test", lease=lease)
    await consumer.open()
    return consumer


def names(batch: Any) -> list[str]:
    return [one.id for one in batch]


def pragma(driver: SQLiteBroker | SQLiteBackend, name: str) -> Any:
    return driver._connection.run(lambda database: database.rows(f"PRAGMA {name}")[0][0])


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Read the file as another program would."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def run(path: Path, *statements: str) -> None:
    """Run statements as another program does."""
    with closing(sqlite3.connect(path, timeout=10)) as database, database:
        for statement in statements:
            database.execute(statement)


async def swept(broker: SQLiteBroker) -> None:
    """Have the next sweep made now."""
    broker._maintenance.sweeper.timer.due_at = 0.0
    await broker.maintain()


async def taken(broker: SQLiteBroker, count: int) -> list[Any]:
    """Fetch and settle that many messages, whose fields may be of any type."""
    consumer = await opened(broker)
    got: list[Any] = []
    async with asyncio.timeout(PATIENCE):
        while len(got) < count:
            found = await consumer.fetch(10, 1.0)
            got += found
            assert not await consumer.settle([Done(one) for one in found])
    await consumer.close()
    return got


async def listening(broker: SQLiteBroker) -> None:
    """Wait until some listener's port is written down."""

    def listeners(database: SQLiteDatabase) -> int:
        return len(database.rows("SELECT 1 FROM ~wakeups"))

    async with asyncio.timeout(PATIENCE):
        while not await broker._connection.run(listeners):
            await asyncio.sleep(0.01)
