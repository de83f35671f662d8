"""Files that cannot be opened, read or written, and the options of their URLs."""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path

import pytest

from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Dead, Done
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker
from aiotaskq.errors import BrokerFull, BrokerUnavailable, ConfigError
from tests.drivers.sqlite.tools import (
    envelope,
    names,
    opened,
    pragma,
)


@pytest.mark.parametrize("kind", [SQLiteBroker, SQLiteBackend])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "sqlite:///name.db"),
        ("sqlite:///", "sqlite:///name.db"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite://name.db", "sqlite:///name.db"),
        ("sqlite://host/name.db", "sqlite:///name.db"),
        ("redis:///name.db", "sqlite:///name.db"),
        ("sqlite:///name.db?mode=rw", "busy_timeout, synchronous"),
        ("sqlite://[", "sqlite:///name.db"),
        ("sqlite:///name.db?synchronous=off", "full or normal"),
        ("sqlite:///name.db?synchronous", "full or normal"),
        ("sqlite:///name.db?busy_timeout=soon", "seconds"),
        ("sqlite:///name.db?busy_timeout=-1", "seconds"),
        ("sqlite:///name.db?busy_timeout=inf", "seconds"),
    ],
)
def test_the_error_of_a_wrong_url_says_what_is_possible(
    kind: type[SQLiteBroker | SQLiteBackend], url: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        kind(url)


def test_the_error_of_a_wrong_url_shows_no_password() -> None:
    with pytest.raises(ConfigError) as caught:
        SQLiteBroker("sqlite://user:secret@host/name.db")
    assert "secret" not in str(caught.value)


async def test_a_relative_path_stays_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broker = SQLiteBroker("sqlite:///a%20file.db?synchronous=NORMAL&busy_timeout=1.5")
    await broker.open()
    await broker.publish([envelope("a")])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    clone = broker.clone()
    await clone.open()
    assert await clone.depth() == {"q": Depth(ready=1)}
    consumer = await opened(broker)
    lease = broker.lease(consumer.grant)
    assert await lease.renew()
    await lease.close()
    await consumer.close()
    await clone.close()
    await broker.close()
    assert (tmp_path / "a file.db").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is a folder"),
        ("missing/test.db", "there is no folder"),
        ("text.db", "is no SQLite database"),
        pytest.param(
            "/proc/test.db",
            "cannot be opened or created|is read-only for this user",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's"),
        ),
    ],
)
async def test_a_path_that_cannot_work_is_one_clear_error(
    tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / "text.db").write_text("These are the voyages of the starship Enterprise. " * 100)
    broker = SQLiteBroker(f"sqlite:///{tmp_path / name}")
    with pytest.raises(ConfigError, match=says):
        await broker.open()
    with pytest.raises(BrokerUnavailable, match="is not open"):
        await broker.depth()
    await broker.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("what", ["file", "folder"])
async def test_opening_fails_where_the_user_may_not_write(
    broker: SQLiteBroker, path: Path, what: str
) -> None:
    place = path if what == "file" else path.parent
    mode = place.stat().st_mode
    place.chmod(mode & 0o555)
    with pytest.raises(ConfigError, match="is read-only for this user"):
        await broker.clone().open()
    place.chmod(mode)


async def test_a_file_of_a_later_version_is_refused(broker: SQLiteBroker, path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE aiotaskq_meta SET value = '1000' WHERE key = 'schema'")
    connection.commit()
    connection.close()
    with pytest.raises(ConfigError, match="version 1000"):
        await broker.clone().open()


@pytest.mark.parametrize("prefix", ["other", 'o"dd name; --', "aiotaskq_messages"])
async def test_prefixes_keep_queues_apart_in_one_file(
    broker: SQLiteBroker, url: str, prefix: str
) -> None:
    other = SQLiteBroker(url, prefix=prefix)
    await other.open()
    await other.publish([envelope("theirs")])
    await broker.publish([envelope("ours")])
    clone = other.clone()
    await clone.open()
    consumer = await opened(clone)
    assert names(await consumer.fetch(10, 0)) == ["theirs"]
    await consumer.close()
    await clone.close()
    await other.close()


@pytest.mark.parametrize(("mode", "number"), [("full", 2), ("normal", 1)])
async def test_the_url_decides_how_accepted_messages_are_synchronised(
    url: str, mode: str, number: int
) -> None:
    broker = SQLiteBroker(f"{url}?synchronous={mode}")
    await broker.open()
    consumer = await opened(broker)
    await broker.publish([envelope("a")])
    assert await pragma(broker, "synchronous") == number
    [got] = await consumer.fetch(1, 0)
    assert await pragma(broker, "synchronous") == 1  # who holds what outlives no power cut
    await consumer.settle([Done(got)])
    assert await pragma(broker, "synchronous") == number
    assert await pragma(broker, "journal_mode") == "wal"
    await consumer.close()
    await broker.close()


async def test_a_full_disk_is_one_clear_error_and_loses_nothing(broker: SQLiteBroker) -> None:
    await broker.publish([envelope("before"), envelope("buried")])
    consumer = await opened(broker)
    before, buried = await consumer.fetch(2, 0)
    pages = await pragma(broker, "page_count")
    await pragma(broker, f"max_page_count = {pages + 2}")
    batch = [envelope("a"), envelope("b", body=bytes(100_000))]
    for _ in range(2):
        with pytest.raises(BrokerFull, match="the disk is full"):
            await broker.publish(batch, call_id="call")
    assert await broker.depth() == {"q": Depth(held=2)}
    # What was accepted goes on, as far as it takes no room.
    lease = broker.lease(consumer.grant)
    assert await lease.renew()
    assert not await consumer.settle([Done(before), Dead(buried, "bad")])
    assert await broker.depth() == {"q": Depth(dead=1)}
    await pragma(broker, "max_page_count = 1000000")
    assert not await broker.publish(batch, call_id="call")
    assert names(await consumer.fetch(10, 0)) == ["a", "b"]
    await lease.close()
    await consumer.close()


async def test_a_wait_for_other_writers_that_takes_too_long_is_told(url: str, path: Path) -> None:
    broker = SQLiteBroker(f"{url}?busy_timeout=0.05")
    await broker.open()
    await broker.publish([envelope("a")])
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(BrokerUnavailable, match=r"kept it locked for 0\.05 seconds"):
        await broker.publish([envelope("b")])
    assert await broker.depth() == {"q": Depth(ready=1)}  # reading goes on
    blocker.close()
    await broker.publish([envelope("b")])
    await broker.close()
