"""Schedules in an SQLite file: the table, other processes, and a disk that is full."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import Depth, StoredSchedule
from aiotaskq.drivers.sqlite import SQLiteBroker, sql
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.errors import BrokerFull, BrokerUnavailable

PATIENCE = 120.0  # seconds until a test gives up; never part of one that passes
NEVER = 1e6

SWAP = """
import asyncio, sys
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import StoredSchedule

async def main():
    broker = SQLiteBroker(sys.argv[1])
    await broker.open()
    new = StoredSchedule(id="s", body=b"", due_at=1000.0, revision="1")
    batch = [Envelope(id="a", queue="q", body=b"")]
    print("ready", flush=True)
    sys.stdin.readline()
    assert await broker.schedules().compare_and_swap("s", None, new, batch)
    await broker.close()

asyncio.run(main())
"""


def schedule(revision: str, body: bytes = b"") -> StoredSchedule:
    return StoredSchedule(id="s", body=body, due_at=1000.0, revision=revision)


@pytest.mark.parametrize(
    ("statement", "parameters", "index"),
    [
        (sql.ALL_SCHEDULES, (), "schedules_1"),
        (sql.SCHEDULES_AMONG, ('["s"]',), "schedules_1 (id=?)"),
        (sql.DUE_SCHEDULES, {"now": 0.0, "limit": 9}, "schedules_due (due_at<?)"),
        (sql.DUE_SCHEDULES, {"now": 0.0, "limit": 9}, "schedules_due (due_at>?)"),
        (sql.REVISION_OF, ("s",), "schedules_1 (id=?)"),
        (sql.DROP_SCHEDULE, ("s",), "schedules_1 (id=?)"),
    ],
)
async def test_no_statement_sorts_or_reads_more_than_it_needs(
    broker: SQLiteBroker, statement: str, parameters: tuple[Any, ...], index: str
) -> None:
    def plan(database: SQLiteDatabase) -> list[str]:
        return [step for *_, step in database.rows(f"EXPLAIN QUERY PLAN {statement}", parameters)]

    steps = await broker._connection.run(plan)
    assert any(index in step for step in steps), steps
    assert not any("TEMP B-TREE" in step for step in steps), steps


async def test_a_file_of_the_release_before_gets_the_table(path: Path) -> None:
    old = SQLiteBroker(f"sqlite:///{path}")
    await old.open()
    await old.publish([Envelope(id="before", queue="q", body=b"")])
    await old.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE aiotaskq_schedules")
        connection.execute("UPDATE aiotaskq_meta SET value = '2' WHERE key = 'schema'")
        connection.commit()
    for _ in range(2):  # the second time there is nothing to do
        broker = SQLiteBroker(f"sqlite:///{path}")
        await broker.open()
        assert await broker.depth() == {"q": Depth(ready=1)}
        store = broker.schedules()
        assert await store.compare_and_swap("s", None, schedule("1"))
        assert await store.compare_and_swap("s", "1", None)
        await broker.close()


async def test_a_waiting_fetch_is_woken_by_a_swap_of_another_process(
    broker: SQLiteBroker, path: Path
) -> None:
    broker._listener.poll = NEVER
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    other = subprocess.Popen(
        [sys.executable, "-c", SWAP, f"sqlite:///{path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert await asyncio.to_thread(other.stdout.readline) == "ready\n"
        waiting = asyncio.create_task(consumer.fetch(1, NEVER))
        async with asyncio.timeout(PATIENCE):
            while not await broker._connection.run(
                lambda database: database.rows("SELECT 1 FROM ~wakeups")
            ):
                await asyncio.sleep(0)
        other.stdin.write("\n")
        other.stdin.flush()
        async with asyncio.timeout(PATIENCE):
            assert [one.id for one in await waiting] == ["a"]
    finally:
        other.kill()
        other.communicate()
    assert [one.revision for one in await broker.schedules().load()] == ["1"]
    await consumer.close()


async def test_a_full_disk_changes_nothing_and_stores_nothing(broker: SQLiteBroker) -> None:
    store = broker.schedules()
    assert await store.compare_and_swap("s", None, schedule("1"))

    def limit(database: SQLiteDatabase, pages: int) -> None:
        database._live.execute(f"PRAGMA max_page_count = {pages}")

    await broker._connection.run(lambda database: limit(database, 1))
    batch = [Envelope(id="a", queue="q", body=b"x" * 100_000)]
    with pytest.raises(BrokerFull):
        await store.compare_and_swap("s", "1", schedule("2"), batch)
    assert await store.load() == [schedule("1")]
    assert await broker.depth() == {}
    await broker._connection.run(lambda database: limit(database, 10_000))
    assert await store.compare_and_swap("s", "1", schedule("2"), batch)
    assert await broker.depth() == {"q": Depth(ready=1)}


async def test_a_store_that_is_not_open_says_so(path: Path) -> None:
    store = SQLiteBroker(f"sqlite:///{path}").schedules()
    for call in (store.load(), store.due(1), store.compare_and_swap("s", None, schedule("1"))):
        with pytest.raises(BrokerUnavailable, match="not open"):
            await call
