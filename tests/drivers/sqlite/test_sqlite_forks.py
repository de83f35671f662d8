"""Forks: uses after a fork that fail, files that are replaced meanwhile, waits that are ended."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker, database
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.url import SQLiteUrl
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable
from aiotaskq.testing.conformance.result_listener import outcome
from tests.drivers.sqlite.tools import PATIENCE, envelope


def fork() -> None:
    """Take the steps of the driver around a fork, without another process."""
    database._before_fork()
    database._after_fork()


def remove(path: Path) -> None:
    for one in path.parent.glob(f"{path.name}*"):
        one.unlink()


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


@contextmanager
def garbage(path: Path) -> Iterator[None]:
    remove(path)
    path.write_text("These are the voyages of the starship Enterprise. " * 100)
    yield
    remove(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("PRAGMA locking_mode = EXCLUSIVE")
        blocker.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def without_folder(path: Path) -> Iterator[None]:
    away = path.parent.with_name("away")
    path.parent.rename(away)
    yield
    away.rename(path.parent)


@pytest.mark.parametrize("spoil", [garbage, locked, without_folder])
async def test_uses_that_fail_after_a_fork_leave_no_connection_open(
    tmp_path: Path, spoil: Callable[[Path], Any]
) -> None:
    path = tmp_path / "folder" / "test.db"
    path.parent.mkdir()
    broker = SQLiteBroker(f"sqlite:///{path}?busy_timeout=0.01")
    await broker.open()
    fork()
    connections = len(database._connections)
    with spoil(path):
        # The first use may leave one: SQLite keeps it while this process has locks on the file.
        seen = []
        for _ in range(20):
            with pytest.raises(BrokerUnavailable):
                await broker.publish([envelope("a")])
            seen.append(open_files())
        assert seen == [seen[0]] * 20
        assert len(database._connections) == connections
    assert not await broker.publish([envelope("a")])
    assert (await broker.depth())["q"].ready == 1
    assert len(database._connections) == connections + 1
    await broker.close()
    assert len(database._connections) == connections


async def test_a_file_that_fails_to_open_anew_is_found_when_it_is_back(
    backend: SQLiteBackend, path: Path
) -> None:
    await backend.store([outcome("a")], None)
    connections = len(database._connections)
    with garbage(path):
        for _ in range(3):
            with pytest.raises(BackendUnavailable):
                await backend.load(["a"])
        assert len(database._connections) == connections - 1
    assert not await backend.load(["a"])
    await backend.store([outcome("b")], None)
    assert list(await backend.load(["a", "b"])) == ["b"]


async def test_a_file_that_was_replaced_after_a_fork_is_told_to_subscribers(
    backend: SQLiteBackend, path: Path
) -> None:
    async with aclosing(backend.subscribe()) as arrivals, asyncio.timeout(PATIENCE):
        assert await anext(arrivals) == []
        await backend.store([outcome(name) for name in "abc"], None)
        assert await anext(arrivals) == ["a", "b", "c"]
        fork()
        remove(path)
        await backend.store([outcome("d")], None)
        assert await anext(arrivals) == []  # something may have been missed
        assert list(await backend.load(["d"])) == ["d"]


class InterruptedLock:
    """A lock whose waiter is interrupted by Ctrl-C."""

    def __init__(self, lock: Any, *, waits: bool) -> None:
        self.lock = lock
        self.waits = waits
        self.release = lock.release

    def acquire(self) -> None:
        if not self.waits:
            self.lock.acquire()
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("waits", [True, False], ids=["while it waits", "when it has the lock"])
@pytest.mark.parametrize("which", ["database", "registry"])
def test_an_interrupted_wait_before_a_fork_leaves_nothing_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, waits: bool
) -> None:
    url = SQLiteUrl.parse(f"sqlite:///{tmp_path}/q.db")
    made = [SQLiteDatabase(url, "p") for _ in range(3)]
    monkeypatch.setattr(database, "_databases", made)  # in a known order
    for one in made:
        one.open()
    locks = [database._registering, *(one._use for one in made)]
    if which == "database":
        monkeypatch.setattr(made[1], "_use", InterruptedLock(made[1]._use, waits=waits))
    else:
        registering = InterruptedLock(database._registering, waits=waits)
        monkeypatch.setattr(database, "_registering", registering)
    with pytest.raises(KeyboardInterrupt):
        database._before_fork()
    monkeypatch.undo()
    assert not database._stopped
    free: list[bool] = []

    def look() -> None:
        for lock in locks:
            free.append(lock.acquire(blocking=False))
            if free[-1]:
                lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert free == [True] * 4
    for one in made:  # and the connections come back
        with one.in_use():
            one.follow()
            assert one.rows("SELECT count(*) FROM ~messages") == [(0,)]
        one.close()
