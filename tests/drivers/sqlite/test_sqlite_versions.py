"""Files that earlier releases made: brought up to date when they are opened, nothing lost."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Dead, Done
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker, sql

PATIENCE = 120.0  # seconds until a test gives up; never part of one that passes

# The tables as the first release made them. Not by our own code: that may change.
VERSION_1 = """
CREATE TABLE aiotaskq_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE aiotaskq_messages (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, queue TEXT NOT NULL, priority INTEGER NOT NULL,
    due_at REAL, expires_at REAL, consumer INTEGER, token INTEGER,
    cancelled INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0, body BLOB NOT NULL
);
CREATE INDEX aiotaskq_messages_ready ON aiotaskq_messages (queue, priority DESC, seq)
    WHERE consumer IS NULL AND due_at IS NULL;
CREATE INDEX aiotaskq_messages_delayed ON aiotaskq_messages (due_at, seq, queue)
    WHERE due_at IS NOT NULL;
CREATE INDEX aiotaskq_messages_held ON aiotaskq_messages (consumer, cancelled, queue)
    WHERE consumer IS NOT NULL;
CREATE INDEX aiotaskq_messages_id ON aiotaskq_messages (id);
CREATE TABLE aiotaskq_consumers (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, name TEXT NOT NULL,
    queues TEXT NOT NULL, lease_until REAL NOT NULL, fenced INTEGER NOT NULL DEFAULT 0, process TEXT
);
CREATE TABLE aiotaskq_dead (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, queue TEXT NOT NULL,
    priority INTEGER NOT NULL, reason TEXT NOT NULL, crashes INTEGER NOT NULL,
    died_at REAL NOT NULL, body BLOB NOT NULL
);
CREATE INDEX aiotaskq_dead_queue ON aiotaskq_dead (queue, seq);
CREATE TABLE aiotaskq_recent (id TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX aiotaskq_recent_until ON aiotaskq_recent (until);
CREATE TABLE aiotaskq_calls (
    call_id TEXT PRIMARY KEY, until REAL NOT NULL, stored TEXT NOT NULL, refused TEXT NOT NULL
);
CREATE INDEX aiotaskq_calls_until ON aiotaskq_calls (until);
CREATE TABLE aiotaskq_wakeups (
    topic TEXT NOT NULL, network TEXT NOT NULL, port INTEGER NOT NULL, refreshed_at REAL NOT NULL,
    process TEXT, PRIMARY KEY (topic, network, port)
) WITHOUT ROWID;
CREATE TABLE aiotaskq_results (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
    result, date_done TEXT, traceback TEXT, children TEXT NOT NULL, name TEXT, args, kwargs,
    worker TEXT, retries INTEGER NOT NULL, queue TEXT, execution_time REAL, expires_at REAL
);
CREATE INDEX aiotaskq_results_expires ON aiotaskq_results (expires_at)
    WHERE expires_at IS NOT NULL;
INSERT INTO aiotaskq_meta VALUES ('schema', '1');
"""

# What a fleet of that release left: a worker that died, one whose lease runs, and their messages.
LEFT_BEHIND = """
INSERT INTO aiotaskq_consumers VALUES (1, 'w1.x', 'w1', '["q"]', 1.0, 0, NULL);
INSERT INTO aiotaskq_consumers VALUES (2, 'w2.x', 'w2', '["q"]', 9e9, 0, NULL);
INSERT INTO aiotaskq_messages VALUES (1, 'suspect', 'q', 0, NULL, NULL, NULL, NULL, 0, 2, x'01');
INSERT INTO aiotaskq_messages VALUES (2, 'plain', 'q', 0, NULL, 9e9, NULL, NULL, 0, 0, x'02');
INSERT INTO aiotaskq_messages VALUES (3, 'lapsed', 'q', 0, NULL, NULL, 1, 1, 0, 0, x'03');
INSERT INTO aiotaskq_messages VALUES (4, 'held', 'q', 0, NULL, NULL, 2, 1, 0, 0, x'04');
INSERT INTO aiotaskq_messages VALUES (5, 'delayed', 'q', 0, 8e9, NULL, NULL, NULL, 0, 0, x'05');
INSERT INTO aiotaskq_dead VALUES (7, 'bad', 'q', 0, 'unknown', 3, 8e9, x'06');
INSERT INTO aiotaskq_results (task_id, status, result, children, retries)
    VALUES ('ended', 'SUCCESS', '1', '[]', 0);
"""

OPEN = """
import asyncio, sys, time
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.contract.message import Envelope

async def main():
    broker = SQLiteBroker(sys.argv[1])
    print("ready", flush=True)
    at = float(sys.stdin.readline())
    time.sleep(max(0.0, at - time.time()))
    await broker.open()
    await broker.publish([Envelope(id="new", queue="other", body=b"")])
    await broker.close()
    print("stored", flush=True)

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file as an earlier release left it."""
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.executescript(VERSION_1 + LEFT_BEHIND)
    return path


async def test_messages_of_an_earlier_release_are_worked_off(path: Path) -> None:
    broker, backend = SQLiteBroker(f"sqlite:///{path}"), SQLiteBackend(f"sqlite:///{path}")
    await broker.open()
    await backend.open()
    assert await broker.depth() == {"q": Depth(ready=2, delayed=1, held=2, dead=1)}
    assert [one.id for one in await broker.consumers()] == ["w2.x"]
    [letter] = await broker.dead("q")
    assert (letter.key, letter.id, letter.crashes, letter.details) == ("7", "bad", 3, b"")
    assert (await backend.load(["ended"]))["ended"].history == ()
    assert (await broker.maintain()).reclaimed == 1
    consumer = broker.consumer(["q"], name="new", lease=60.0)
    await consumer.open()
    told: list[Delivery] = []
    while got := await consumer.fetch(10, 0):
        told += got
        assert not await consumer.settle([Done(one) for one in got])
    assert [(one.id, one.body, one.crashes, one.crash_note) for one in told] == [
        ("suspect", b"\x01", 2, ""),
        ("plain", b"\x02", 0, ""),
        ("lapsed", b"\x03", 1, "w1: its lease ran out"),
    ]
    assert not await broker.revive("q", [("7", Envelope(id="bad", queue="q", body=b""))])
    [revived] = await consumer.fetch(10, 0)
    assert not await consumer.settle([Dead(revived, "again", b"why")])
    assert await broker.depth() == {"q": Depth(delayed=1, held=1, dead=1)}
    await consumer.close()
    await backend.close()
    await broker.close()


async def test_an_upgraded_file_has_the_tables_of_a_new_one(path: Path, tmp_path: Path) -> None:
    for place in (path, tmp_path / "new.db"):
        for _ in range(2):  # the second time there is nothing to do
            broker = SQLiteBroker(f"sqlite:///{place}")
            await broker.open()
            await broker.close()
    assert _shape(path) == _shape(tmp_path / "new.db")


async def test_processes_that_open_it_at_once_change_it_once(path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, f"sqlite:///{path}?busy_timeout=60"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(4)
    ]
    try:
        async with asyncio.timeout(PATIENCE):
            for said in ("ready", "stored"):
                at = f"{time.time() + 0.2}\n"
                for process in processes:
                    assert process.stdin is not None
                    assert process.stdout is not None
                    line = await asyncio.to_thread(process.stdout.readline)
                    assert line.strip() == said
                if said == "ready":
                    for process in processes:
                        assert process.stdin is not None
                        process.stdin.write(at)
                        process.stdin.flush()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count = "SELECT count(*) FROM aiotaskq_messages WHERE queue = ?"
        assert connection.execute(count, ("other",)).fetchone() == (4,)
        assert connection.execute(count, ("q",)).fetchone() == (5,)
        version = "SELECT value FROM aiotaskq_meta WHERE key = 'schema'"
        assert connection.execute(version).fetchone() == (str(sql.VERSION),)


async def test_a_change_that_fails_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _shape(path)
    with monkeypatch.context() as broken:
        steps = (*sql.MIGRATIONS[1], "ALTER TABLE ~nowhere ADD COLUMN x")
        broken.setitem(sql.MIGRATIONS, 1, steps)
        with pytest.raises(Exception, match="nowhere"):
            await SQLiteBroker(f"sqlite:///{path}").open()
    assert _shape(path) == before
    broker = SQLiteBroker(f"sqlite:///{path}")
    await broker.open()
    assert (await broker.depth())["q"].ready == 2
    await broker.close()


def _shape(path: Path) -> set[str]:
    """Return what tables, columns and indexes there are, in whatever order."""

    def lines(connection: sqlite3.Connection) -> Iterator[str]:
        for kind, name, text in connection.execute("SELECT type, name, sql FROM sqlite_master"):
            # A table's text tells what was added later; its columns are compared below.
            text = re.sub(r'\s+|"', " ", text or "").split() if kind == "index" else ""
            yield f"{kind} {name} {text}"
            for _, *column in connection.execute(f"PRAGMA table_info({name})"):
                yield f"{name}: {column}"
        rows = "SELECT * FROM aiotaskq_meta WHERE key != 'secret'"
        yield str(connection.execute(rows).fetchall())

    with closing(sqlite3.connect(path)) as connection:
        return set(lines(connection))
