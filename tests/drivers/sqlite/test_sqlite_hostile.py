"""Values in the tables that no program of this package has written, and files that go and come."""

from __future__ import annotations

import asyncio
import gc
import socket
import sqlite3
import stat
import threading
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest

from aiotaskq import TaskQueue
from aiotaskq.contract.records import DeadLimits, StoredSchedule
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker
from aiotaskq.drivers.sqlite import connection as connections
from aiotaskq.drivers.sqlite.notify import SQLiteNotifier
from aiotaskq.errors import BatchRefused, BrokerUnavailable, ConfigError, EncodeError, LeaseLost
from aiotaskq.testing.conformance.result_listener import outcome
from tests.drivers.sqlite.tools import envelope, run, swept, taken

PATIENCE = 30.0
NOT_UTF8 = "CAST(x'ff61' AS TEXT)"


@pytest.fixture
async def broker(tmp_path: Path) -> Any:
    broker = SQLiteBroker(f"sqlite:///{tmp_path}/q.db")
    await broker.open()
    yield broker
    await broker.close()


def path_of(broker: SQLiteBroker) -> Path:
    return broker._connection.url.path


# --- refusals -----------------------------------------------------------------------------------


async def test_envelopes_that_cannot_be_stored_are_refused_and_the_others_stored(
    broker: SQLiteBroker,
) -> None:
    batch = [
        envelope("a"),
        envelope("\ud800"),
        envelope("b", unique=True),
        envelope("c", priority=2**70),
    ]
    for _ in range(2):
        with pytest.raises(BatchRefused) as refused:
            await broker.publish(batch, call_id="call")
        assert list(refused.value.errors) == [1, 3]
        assert all(isinstance(one, EncodeError) for one in refused.value.errors.values())
        assert not refused.value.answer
    assert (await broker.depth())["q"].ready == 2
    with pytest.raises(BatchRefused) as refused:
        await broker.publish([envelope("b", unique=True), envelope("\ud800")])
    assert list(refused.value.answer) == ["b"]


async def test_a_settlement_that_cannot_be_stored_is_refused_and_the_others_take_effect(
    broker: SQLiteBroker,
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    await broker.publish([envelope(name) for name in "abcd"])
    a, b, c, d = await consumer.fetch(4, 0)
    batch: list[Settlement] = [
        Done(a),
        Again(b, envelope("\ud800")),
        Dead(c, "a lone \ud800"),
        Release(d),
    ]
    with pytest.raises(BatchRefused) as refused:
        await consumer.settle(batch)
    assert list(refused.value.errors) == [1]
    depth = (await broker.depth())["q"]
    assert (depth.ready, depth.held, depth.dead) == (1, 1, 1)
    await consumer.close()


async def test_an_outcome_that_cannot_be_stored_is_refused_and_the_others_are_stored(
    tmp_path: Path,
) -> None:
    backend = SQLiteBackend(f"sqlite:///{tmp_path}/q.db")
    await backend.open()
    await backend.store([outcome("b")], None)
    with pytest.raises(BatchRefused) as refused:
        await backend.store([outcome("a"), outcome("\ud800"), outcome("b")], None)
    assert list(refused.value.errors) == [1]
    assert list(refused.value.answer) == ["b"]
    assert set(await backend.load(["a", "b"])) == {"a", "b"}
    await backend.close()


async def test_a_letter_that_cannot_go_back_stays_and_the_others_go(broker: SQLiteBroker) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    await broker.publish([envelope("a"), envelope("b")])
    await consumer.settle([Dead(one, "") for one in await consumer.fetch(2, 0)])
    second, first = await broker.dead("q")
    with pytest.raises(BatchRefused) as refused:
        await broker.revive("q", [(first.key, envelope("\ud800")), (second.key, envelope("b"))])
    assert list(refused.value.errors) == [0]
    depth = (await broker.depth())["q"]
    assert (depth.ready, depth.dead) == (1, 1)
    await consumer.close()


# --- rows ---------------------------------------------------------------------------------------

MESSAGE = (
    "INSERT INTO aiotaskq_messages (id, queue, priority, body, {}) VALUES ({}, 'q', 0, '', {})"
)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("due_at", "'abc'"),
        ("due_at", "x'ff'"),
        ("due_at", "-9e999"),
        ("expires_at", "'abc'"),
        ("crashes", "'abc'"),
        ("crashes", "-9223372036854775808"),
        ("crash_note", NOT_UTF8),
        ("crash_note", "x'ff'"),
        ("token", "'abc'"),
        ("consumer", "'abc'"),
        ("consumer", "99"),
        ("cancelled", "'abc'"),
        ("seq", "9223372036854775807"),
    ],
)
async def test_a_message_with_an_odd_column_is_delivered(
    broker: SQLiteBroker, column: str, value: str
) -> None:
    run(path_of(broker), MESSAGE.format(column, "'odd'", value))
    await broker.publish([envelope("good"), envelope("late", delay=0.01)])
    await swept(broker)
    got = await taken(broker, 3)
    assert {one.id for one in got} == {"odd", "good", "late"}
    assert all(isinstance(one.crash_note, str) and one.crashes < 2**31 for one in got)


async def test_a_count_of_crashes_stays_a_number(broker: SQLiteBroker) -> None:
    for number, crashes in enumerate(["9223372036854775807", "'abc'", "x'ff'", "1e999", "-5"]):
        run(path_of(broker), MESSAGE.format("crashes", f"'{number}'", crashes))
    for _ in range(5):
        consumer = broker.consumer(["q"], name="w", lease=60)
        await consumer.open()
        assert await consumer.fetch(10, 0)
        lease = broker.lease(consumer.grant)
        assert await lease.end("killed")
        await lease.close()
        await consumer.close()
    with closing(sqlite3.connect(path_of(broker))) as database:
        kinds = database.execute("SELECT DISTINCT typeof(crashes) FROM aiotaskq_messages")
        assert {"integer"} >= {kind for [kind] in kinds} - {"text", "blob", "real"}
    await taken(broker, 5)


async def test_text_that_is_not_utf_8_is_read_with_replacements(broker: SQLiteBroker) -> None:
    run(path_of(broker), MESSAGE.format("crash_note", NOT_UTF8, NOT_UTF8))
    await broker.publish([envelope("good")])
    assert {one.id for one in await taken(broker, 2)} == {"\ufffda", "good"}


async def test_odd_consumers_are_listed_and_maintained_like_others(broker: SQLiteBroker) -> None:
    insert = (
        "INSERT INTO aiotaskq_consumers (id, name, queues, lease_until, fenced, process, about)"
        " VALUES ({}, {}, {}, {}, {}, {}, {})"
    )
    deep = "'" + "[" * 100_000 + "'"
    for row in (
        (NOT_UTF8, NOT_UTF8, NOT_UTF8, "9e9", "0", "'a'", "'text'"),
        ("x'ff'", "5", deep, "9e9", "0", "'a/b/../../c'", deep),
        ("'x'", "x'ff'", "'{}'", "'abc'", "'abc'", "5", "x'ff'"),
        ("'y'", "''", "'[1]'", "-9e999", "-1", "x'ff'", "''"),
    ):
        run(path_of(broker), insert.format(*row))
    run(
        path_of(broker),
        "INSERT INTO aiotaskq_meta VALUES ('beat', 'abc'), ('lease:1', 'nan'), ('spared', 'abc')"
        " ON CONFLICT DO UPDATE SET value = excluded.value",
    )
    assert all(isinstance(one.about, bytes) for one in await broker.consumers())
    await broker.maintain()
    await broker.publish([envelope("good")])
    assert [one.id for one in await taken(broker, 1)] == ["good"]


async def test_spoilt_keys_are_replaced(broker: SQLiteBroker) -> None:
    most = 2**63 - 1
    run(
        path_of(broker),
        f"INSERT INTO aiotaskq_consumers (number, id, name, queues, lease_until)"
        f" VALUES ({most}, 'x', 'x', '[]', 0)",
        f"INSERT INTO aiotaskq_dead (seq, id, queue, priority, reason, crashes, died_at, body)"
        f" VALUES ({most}, 'x', 'q', 0, '', 0, 'abc', 5)",
        f"INSERT INTO aiotaskq_results (arrival, task_id, status, children, retries)"
        f" VALUES ({most}, 'x', 'SUCCESS', '[]', 0)",
    )
    backend = broker.backend()
    await backend.open()
    async with aclosing(backend.subscribe()) as arrivals:
        assert await anext(arrivals) == []
        await backend.store([outcome("a")], None)
        async with asyncio.timeout(PATIENCE):
            assert await anext(arrivals) == ["a"]
    await backend.close()
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    await broker.publish([envelope("good")])
    [got] = await consumer.fetch(1, 0)
    await consumer.settle([Dead(got, "")])
    assert [one.id for one in await broker.dead("q")] == ["good", "x"]
    assert (await broker.maintain(DeadLimits(most=1))).trimmed == 1
    await consumer.close()


async def test_ports_that_are_none_harm_no_sender(broker: SQLiteBroker) -> None:
    network = await asyncio.to_thread(lambda: SQLiteNotifier().network)
    for port in ("99999", "-1", "0", "'abc'", "x'ff'", "1.5", "9223372036854775807"):
        run(
            path_of(broker),
            "INSERT INTO aiotaskq_wakeups (topic, network, port, refreshed_at, process)"
            f" VALUES ('queue:q', '{network}', {port}, 9e9, 'a/b')",
        )
    assert not await broker.publish([envelope("good")])
    assert [one.id for one in await taken(broker, 1)] == ["good"]
    await swept(broker)


async def test_odd_schedules_are_due_and_hide_no_other(broker: SQLiteBroker) -> None:
    insert = "INSERT INTO aiotaskq_schedules (id, revision, due_at, body) VALUES ({}, {}, {}, {})"
    run(
        path_of(broker),
        insert.format("'text'", "''", "'abc'", "'text'"),
        insert.format("x'ff'", "x'ff'", "x'ff'", "5"),
        insert.format(NOT_UTF8, NOT_UTF8, "1", "x'ff'"),
        insert.format("'later'", "'r'", "9e9", "x''"),
    )
    found = await broker.schedules().due(10)
    assert {one.id for one in found.schedules} == {"text", "\ufffd", "\ufffda"}
    assert found.next_at == 9e9
    new = StoredSchedule(id="text", body=b"", due_at=None, revision="new")
    assert await broker.schedules().compare_and_swap("text", "", new)
    assert len(await broker.schedules().load()) == 4


@pytest.mark.parametrize("version", ["'abc'", "'0'", "'-1'", "''", "'99999999999999999999'"])
async def test_a_version_that_no_release_wrote_is_a_mistake(
    broker: SQLiteBroker, version: str
) -> None:
    run(path_of(broker), f"UPDATE aiotaskq_meta SET value = {version} WHERE key = 'schema'")
    with pytest.raises(ConfigError):
        await broker.clone().open()


# --- the file -----------------------------------------------------------------------------------


async def test_a_new_file_is_its_owners_alone(broker: SQLiteBroker, tmp_path: Path) -> None:
    await broker.publish([envelope("a")])
    made = list(tmp_path.glob("q.db*"))
    assert len(made) == 3
    assert {stat.S_IMODE(one.stat().st_mode) for one in made} == {0o600}


async def test_the_mode_of_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.db"
    path.touch()
    path.chmod(0o644)
    broker = SQLiteBroker(f"sqlite:///{path}")
    await broker.open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    await broker.close()


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_was_removed_or_replaced_is_followed(
    broker: SQLiteBroker, tmp_path: Path, replaced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    backend = broker.backend()
    await backend.open()
    async with aclosing(backend.subscribe()) as arrivals:
        assert await anext(arrivals) == []
        for one in tmp_path.glob("q.db*"):
            one.unlink()
        if replaced:
            other = SQLiteBroker(f"sqlite:///{tmp_path}/q.db")
            await other.open()
            await other.close()
        assert not await broker.publish([envelope("good")])
        with pytest.raises(LeaseLost):
            await consumer.fetch(1, 0)
        assert [one.id for one in await taken(broker, 1)] == ["good"]
        await backend.store([outcome("a")], None)
        async with asyncio.timeout(PATIENCE):
            while not await anext(arrivals):  # first, that something may have been missed
                if await backend.load(["a"]):
                    break
    await backend.close()
    await consumer.close()
    assert "was removed or replaced" in caplog.text


async def test_while_there_is_no_folder_the_file_is_unavailable(
    tmp_path: Path, broker: SQLiteBroker
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    other = SQLiteBroker(f"sqlite:///{folder}/q.db")
    await other.open()
    folder.rename(tmp_path / "away")
    with pytest.raises(BrokerUnavailable):
        await other.publish([envelope("a")])
    (tmp_path / "away").rename(folder)
    assert not await other.publish([envelope("a")])
    await other.close()


async def test_a_worker_goes_on_with_another_file(tmp_path: Path) -> None:
    app = TaskQueue("app", broker=f"sqlite:///{tmp_path}/q.db")

    @app.task
    async def double(x: int) -> int:
        return 2 * x

    async with app, app.worker():
        assert await (await double.kiq(1)).result(timeout=PATIENCE) == 2
        for one in tmp_path.glob("q.db*"):
            one.unlink()
        assert await (await double.kiq(2)).result(timeout=PATIENCE) == 4


async def test_datagrams_without_the_secret_wake_nobody(broker: SQLiteBroker) -> None:
    listener = broker._listener
    waiter = asyncio.Event()
    listener.add(waiter)
    await listener.listen(["queue:q"])
    assert listener._socket is not None
    port = listener._socket.getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for forged in (b"", b"x" * 32, b"x" * 1000):
            stranger.sendto(forged, ("127.0.0.1", port))
        stranger.sendto(listener._secret, ("127.0.0.1", port))
    listener._wake_all = waiter.set  # type: ignore[method-assign]  # counts below
    async with asyncio.timeout(PATIENCE):
        await waiter.wait()
    assert len(listener._secret) == 32
    listener.discard(waiter)


def test_a_loop_that_is_closed_without_a_word_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_LOOK_EVERY", 0.05)
    path = tmp_path / "q.db"

    def handles() -> int:
        links = [one for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
        return sum(str(path) in str(one.readlink()) for one in links)

    broker = SQLiteBroker(f"sqlite:///{path}")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(broker.open())
    loop.run_until_complete(broker.publish([envelope("a")]))
    assert handles()
    before = {one for one in threading.enumerate() if one.name == "aiotaskq-sqlite"}
    loop.close()
    for thread in before:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not handles()
    # The same object works on another loop.
    asyncio.run(_use(broker))
    gc.collect()


async def _use(broker: SQLiteBroker) -> None:
    await broker.open()
    assert (await broker.depth())["q"].ready == 1
    await broker.close()
