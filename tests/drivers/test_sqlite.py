"""What only the SQLite driver has: a file, processes that share it, wake-ups between them."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from aiotaskq.contract.broker import Consumer
from aiotaskq.contract.message import SUSPECT, Attempt, Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Dead, Done, Release
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker, sql, wakeups
from aiotaskq.drivers.sqlite.database import Database
from aiotaskq.drivers.sqlite.process import is_alive, is_gone, this_process
from aiotaskq.errors import BrokerFull, BrokerUnavailable, ConfigError

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0  # seconds until a test gives up; never part of one that passes
NEVER = 3600.0  # seconds; what waits for this long is not what lets a test pass

Process = subprocess.Popen[str]
Start = Callable[[str], Process]

# What a child process of a test begins with; the lines of the test follow, indented.
PREAMBLE = """
import asyncio, os, random, sys, time
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker
from aiotaskq.errors import *
from aiotaskq.message import *
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
async def broker(url: str) -> AsyncIterator[SQLiteBroker]:
    broker = SQLiteBroker(url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def backend(url: str) -> AsyncIterator[SQLiteBackend]:
    backend = SQLiteBackend(url)
    await backend.open()
    yield backend
    await backend.close()


@pytest.fixture
def start(url: str) -> Iterator[Start]:
    """Start processes that run lines of code with an open `broker` on the same file."""
    started: list[Process] = []

    def go(lines: str) -> Process:
        code = PREAMBLE + textwrap.indent(textwrap.dedent(lines), "    ") + "\nasyncio.run(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()


def envelope(name: str, **fields: Any) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"body", **fields})


async def line(process: Process) -> str:
    """Wait for the next line that a process says."""
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
    return driver._link.run(lambda db: db.rows(f"PRAGMA {name}")[0][0])


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Read the file as another program would."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


# --- the address ---


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
        ("sqlite:///name.db?mode=rw", r"synchronous \(.*busy_timeout \("),
        ("sqlite:///name.db?synchronous=off", "full or normal"),
        ("sqlite:///name.db?synchronous", "full or normal"),
        ("sqlite:///name.db?busy_timeout=soon", "seconds"),
        ("sqlite:///name.db?busy_timeout=-1", "seconds"),
        ("sqlite:///name.db?busy_timeout=inf", "seconds"),
    ],
)
def test_a_url_that_cannot_work_says_what_there_is(
    kind: type[SQLiteBroker | SQLiteBackend], url: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        kind(url)


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
async def test_what_must_not_be_written_is_told_when_opening(
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
async def test_what_was_accepted_is_synchronised_as_the_url_says(
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


# --- what is on the disk ---


@pytest.mark.parametrize(
    ("statement", "parameters", "index"),
    [
        (sql.NEXT_READY, ("q", 100), "ready (queue=?)"),
        (sql.NEXT_SUSPECT, ("q",), "suspects (queue=?)"),
        (sql.ANY_READY, ("q",), "ready (queue=?)"),
        (sql.ANY_SUSPECT, ("q",), "suspects (queue=?)"),
        (sql.OUTLOOK, (), "suspects"),
        (sql.OUTLOOK, (), "delayed"),
        (sql.ALL_DUE, (0.0, 1000), "delayed (due_at<?)"),
        (sql.PROMOTE, (1,), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.HOLD, (1, 1, 1), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.FORGET, (1, 1, 1), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.GIVE_BACK, (1, 1, 1), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.GIVE_BACK_ALL, (1,), "held (consumer=?)"),
        (sql.HELD_BY, (1, 1000), "held (consumer=?)"),
        (sql.CANCELLED_OF, (1,), "held (consumer=? AND cancelled=?)"),
        (sql.CANCEL_WAITING, ('["a"]',), "messages_id (id=?)"),
        (sql.CANCEL_HELD, ('["a"]',), "messages_id (id=?)"),
        (sql.SWEEPS[0], (0.0, 1000), "until (until<?)"),
        (sql.SWEEPS[1], (0.0, 1000), "until (until<?)"),
        (sql.SWEEPS[2], (0.0, 1000), "until (until<?)"),
        (sql.SWEEPS[3], (0.0, 1000), "expires (expires_at<?)"),
        (sql.PURGES[0], ("q", 1000), "ready (queue=?)"),
        (sql.PURGES[1], ("q", 1000), "suspects (queue=?)"),
        (sql.NEWEST_DEAD, ("q", 9, 100), "dead_queue (queue=? AND seq<?)"),
        (sql.TAKE_DEAD, (1, "q"), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.DISCARD, ("[1]", "q"), "(queue=? AND seq=? AND rowid=?)"),
        (sql.DEAD_OUTLOOK, (0.0,), "dead_died (died_at<?)"),
        (sql.TRIM_OLD, (0.0, 1000), "dead_died (died_at<?)"),
        (sql.TRIM_QUEUE, ("q", 1000), "dead_queue (queue=?)"),
        (sql.COUNT_DEAD, (1000,), "COVERING INDEX aiotaskq_dead_queue"),
        (sql.READ_CALL, {"call": "c", "now": 0.0}, "calls_1 (call_id=?)"),
        (sql.CANCELLED_AMONG, ('["a"]',), "cancelled USING PRIMARY KEY (id=?)"),
        (sql.MAY_FOLLOW, ("a", "a", 1, 1, 1), "cancelled USING PRIMARY KEY (id=?)"),
        (sql.NUMBER_OF, ("c",), "consumers_id (id=?)"),
        (sql.HELD_AMONG, ('["a"]',), "messages_id (id=?)"),
        (sql.WHO_LISTENS, ("t", "n", 0.0), "PRIMARY KEY (topic=? AND network=?)"),
        (sql.LOAD, ('["a"]', 0.0), "results_1 (task_id=?)"),
        (sql.ARRIVED_SINCE, (1, 1000), "INTEGER PRIMARY KEY (rowid>?)"),
    ],
    ids=lambda value: " ".join(value.split())[:30] if isinstance(value, str) else "",
)
async def test_no_statement_sorts_or_reads_more_than_it_needs(
    broker: SQLiteBroker, statement: str, parameters: tuple[Any, ...], index: str
) -> None:
    def plan(db: Database) -> list[str]:
        found = db.rows(f"EXPLAIN QUERY PLAN {statement}", parameters)
        cheap = ("json_each", "CONSTANT ROW")
        return [step for *_, step in found if not any(one in step for one in cheap)]

    steps = await broker._link.run(plan)
    assert any(index in step for step in steps), steps
    assert not any("TEMP B-TREE" in step for step in steps), steps
    # A scan of an index that is read in order up to a LIMIT is fine, one of a table is not.
    assert not any(step.startswith("SCAN") and "USING" not in step for step in steps), steps


async def test_results_are_text_for_who_reads_the_table(backend: SQLiteBackend, path: Path) -> None:
    outcome = Outcome(
        task_id="a",
        status=TaskStatus.SUCCESS,
        result=Raw('{"x":"ü"}'.encode()),
        name="tasks.add",
        args=Raw(b"[2,8]"),
        kwargs=Raw(b"{}"),
        retries=1,
        history=(Attempt(number=1, at=1.5, worker="w", error="ValueError: \udc80"),),
    )
    packed = Outcome(task_id="b", status=TaskStatus.SUCCESS, result=Raw(b"\x81\xa1x\xc3"))
    await backend.store([outcome, packed], 60.0)
    columns = "task_id, status, result, name, args, kwargs, retries, typeof(result)"
    assert rows(path, f"SELECT {columns} FROM aiotaskq_results ORDER BY task_id") == [
        ("a", "SUCCESS", '{"x":"ü"}', "tasks.add", "[2,8]", "{}", 1, "text"),
        ("b", "SUCCESS", b"\x81\xa1x\xc3", None, None, None, 0, "blob"),
    ]
    assert rows(path, "SELECT json_extract(result, '$.x') FROM aiotaskq_results LIMIT 1") == [
        ("ü",)
    ]
    assert rows(path, "SELECT json_extract(history, '$[0].worker') FROM aiotaskq_results") == [
        ("w",),
        (None,),
    ]
    loaded = await backend.load(["a", "b"])
    assert (loaded["a"].history, loaded["b"].history) == (outcome.history, ())
    assert (bytes(loaded["a"].result), bytes(loaded["b"].result)) == (
        bytes(outcome.result),
        bytes(packed.result),
    )


async def test_what_is_over_leaves_the_file(
    broker: SQLiteBroker, backend: SQLiteBackend, path: Path
) -> None:
    await backend.store([Outcome(task_id="a", status=TaskStatus.SUCCESS, result=Raw(b"1"))], 60.0)
    batch = [envelope(f"{n}", unique=True) for n in range(2500)]
    await broker.publish(batch, call_id="call")
    await broker.cancel([f"other {n}" for n in range(2500)])
    broker._time_shift = 8 * 86_400.0
    for _ in range(4):
        await broker.maintain()
    for table in ("recent", "calls", "results", "cancelled"):
        assert rows(path, f"SELECT count(*) FROM aiotaskq_{table}") == [(0,)], table
    assert rows(path, "SELECT count(*) FROM aiotaskq_messages") == [(2500,)]


async def test_a_full_disk_is_told_and_costs_nothing(broker: SQLiteBroker) -> None:
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


async def test_who_waits_too_long_for_others_is_told(url: str, path: Path) -> None:
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


async def test_what_is_no_key_of_a_dead_letter_is_refused(broker: SQLiteBroker) -> None:
    for key in ("a", "", "-1", "9" * 5000):
        with pytest.raises(ConfigError, match="take one of those listed"):
            await broker.dead("q", before=key)
        assert await broker.discard("q", [key]) == 0
    assert not await broker.dead("q", before="9" * 19)


# --- several processes ---


async def test_many_processes_open_a_new_file_at_once(start: Start, path: Path) -> None:
    path.unlink(missing_ok=True)
    lines = """
        await broker.close()
        say("ready")
        at = float(await told())
        time.sleep(max(0.0, at - time.time()))
        await broker.open()
        await broker.publish([envelope("a")])
        say("stored")
        await broker.close()
    """
    # The file that `main` makes is not the one of the race.
    processes = [start(lines) for _ in range(4)]
    assert [await line(one) for one in processes] == ["ready"] * 4
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    at = time.time() + 0.2
    for one in processes:
        assert one.stdin is not None
        one.stdin.write(f"{at}\n")
        one.stdin.flush()
    assert [await line(one) for one in processes] == ["stored"] * 4
    assert rows(path, "SELECT count(*) FROM aiotaskq_messages") == [(4,)]


@pytest.mark.slow
async def test_processes_that_work_at_once_lose_and_double_nothing(
    broker: SQLiteBroker, start: Start, path: Path
) -> None:
    lines = """
        name, chance, taken = await told(), random.Random(), []
        consumer = broker.consumer(["q", "r"], name="test", lease=3600.0)
        await consumer.open()

        async def publish():
            left = [f"{name.strip()}.{n}" for n in range(700)]
            while left:
                size = chance.choice([1, 5, 50])
                queue = chance.choice("qr")
                batch = [envelope(one, queue=queue, priority=len(left) % 3) for one in left[:size]]
                await broker.publish(batch, call_id=f"{left[0]}")
                await broker.publish(batch, call_id=f"{left[0]}")
                left = left[size:]

        async def work():
            while True:
                got = await consumer.fetch(chance.choice([1, 10, 100]), 60.0)
                batch, kept = [], []
                for one in got:
                    how = chance.random()
                    if how < 0.1:
                        batch.append(Release(one))
                    elif how < 0.2:
                        batch.append(Again(one, envelope(one.id)))
                    else:
                        batch.append(Done(one))
                        kept.append(one.id)
                assert not await consumer.settle(batch)
                taken.extend(kept)
                if chance.random() < 0.1:
                    await broker.maintain()

        working = asyncio.create_task(work())
        await publish()
        say("published")
        await told()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        say(*taken)
        await consumer.close()
        await broker.close()
    """
    processes = [start(lines) for _ in range(3)]
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
    assert [await line(one) for one in processes] == ["published"] * 3
    async with asyncio.timeout(PATIENCE):
        while await broker.depth() != {}:
            await asyncio.sleep(0.05)
    done: list[str] = []
    for process in processes:
        tell(process)
        done += (await line(process)).split()
    assert sorted(done) == sorted(f"{name}.{n}" for name in range(3) for n in range(700))
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.skipif(this_process() is None, reason="this system does not tell processes apart")
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
async def test_what_a_killed_process_held_comes_back_before_its_lease_ends(
    broker: SQLiteBroker, start: Start, path: Path, reaped: bool
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(100)])
    holder = start(
        """
        consumer = broker.consumer(["q"], name="test", lease=3600.0)
        await consumer.open()
        say(len(await consumer.fetch(100, 0)))
        await asyncio.sleep(3600)
        """
    )
    assert await line(holder) == "100"
    assert (await broker.maintain()).reclaimed == 0
    consumer = await opened(broker)
    waiting = asyncio.create_task(consumer.fetch(100, NEVER))
    holder.kill()
    if reaped:
        holder.wait()
    reclaimed = 0
    async with asyncio.timeout(PATIENCE):
        while not reclaimed:  # a killed process needs a moment to be dead
            reclaimed = (await broker.maintain()).reclaimed
            await asyncio.sleep(0.01)
        got = await waiting
    assert reclaimed == 100
    assert names(got) == [f"{n}" for n in range(100)]
    assert {(one.crashes, one.crash_note) for one in got} == {(1, "test: its process is gone")}
    assert not await consumer.settle([Done(one) for one in got])
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    await consumer.close()


@pytest.mark.slow
async def test_what_a_killed_process_was_told_is_stored_is_there(
    broker: SQLiteBroker, start: Start, path: Path
) -> None:
    accepted: list[str] = []
    for attempt in range(3):
        publisher = start(
            f"""
            for n in range(1_000_000):
                await broker.publish([envelope(f"{attempt}.{{n}}.{{m}}") for m in range(50)])
                say(f"{attempt}.{{n}}")
            """
        )
        told = [await line(publisher) for _ in range(20 * attempt + 5)]
        publisher.kill()
        publisher.wait()
        assert publisher.stdout is not None
        told += publisher.stdout.read().split()  # what it said before it died counts as well
        accepted += [f"{batch}.{m}" for batch in told for m in range(50)]
    stored = [row[0] for row in rows(path, "SELECT id FROM aiotaskq_messages ORDER BY seq")]
    assert len(set(stored)) == len(stored)
    assert set(accepted) <= set(stored)
    assert len(stored) - len(accepted) in range(0, 151, 50)  # whole batches, the last one of each
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


async def test_after_a_fork_the_child_needs_a_clone(start: Start, broker: SQLiteBroker) -> None:
    process = start(
        """
        import warnings
        warnings.simplefilter("ignore")  # later Pythons warn of every fork beside threads
        child = os.fork()
        if child == 0:
            try:
                await broker.publish([envelope("lost")])
            except ConfigError as error:
                say("refused:", "clone()" in str(error))
            await broker.close()
            clone = broker.clone()

            async def use():
                await clone.open()
                await clone.publish([envelope("child")])
                await clone.close()

            import threading  # its own loop: the parent's selector is shared with the parent
            thread = threading.Thread(target=asyncio.run, args=(use(),))
            thread.start()
            thread.join()
            os._exit(0)
        os.waitpid(child, 0)
        await broker.publish([envelope("parent")])
        say("over")
        await broker.close()
        """
    )
    assert await line(process) == "refused: True"
    assert await line(process) == "over"
    consumer = await opened(broker)
    assert names(await consumer.fetch(10, 0)) == ["child", "parent"]
    await consumer.close()


# --- who is alive ---


@pytest.mark.skipif(this_process() is None, reason="this system does not tell processes apart")
def test_only_a_process_that_is_surely_dead_is_called_so() -> None:
    ours = this_process()
    assert ours is not None
    where, pid, started = ours.rsplit("/", 2)
    boot, namespace = where.split("/")
    assert pid == str(os.getpid())
    assert is_alive(ours)
    assert not is_gone(ours)
    again = f"{where}/{pid}/{int(started) - 1}"  # the number was used again
    assert is_gone(again)
    assert not is_alive(again)
    container = f"{boot}/{int(namespace) + 1}/{pid}/1"
    machine = f"another-boot/{namespace}/{pid}/1"
    for unknown in (None, container, machine):
        assert not is_gone(unknown)
        assert not is_alive(unknown)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
    try:
        assert not is_gone(f"{where}/{child.pid}/{_started(child.pid)}")
        dead = f"{where}/{child.pid}/{_started(child.pid)}"
    finally:
        child.communicate()
    assert is_gone(dead)
    assert not is_alive(dead)


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


# --- wake-ups ---


async def test_a_waiting_fetch_is_woken_by_another_process(
    broker: SQLiteBroker, start: Start
) -> None:
    broker._bell.poll = NEVER
    consumer = await opened(broker)
    publisher = start(
        """
        for n in range(3):
            await told()
            await broker.publish([envelope(f"{n}")])
        await broker.close()
        """
    )
    for number in range(3):
        waiting = asyncio.create_task(consumer.fetch(1, NEVER))
        await _listening(broker)
        tell(publisher)
        async with asyncio.timeout(PATIENCE):
            assert names(await waiting) == [f"{number}"]
    await consumer.close()


async def test_a_subscriber_is_woken_by_another_process(
    backend: SQLiteBackend, start: Start
) -> None:
    backend._bell.poll = NEVER
    arrivals = backend.subscribe()
    assert await anext(arrivals) == []
    storer = start(
        """
        backend = SQLiteBackend(URL)
        await backend.open()
        await told()
        done = Outcome(task_id="a", status=TaskStatus.SUCCESS, result=Raw(b"1"))
        await backend.store([done], None)
        await backend.close()
        await broker.close()
        """
    )
    waiting = asyncio.ensure_future(anext(arrivals))
    tell(storer)
    async with asyncio.timeout(PATIENCE):
        assert await waiting == ["a"]
    await arrivals.aclose()


async def test_a_waiting_fetch_wakes_by_itself_when_a_delayed_one_falls_due(
    broker: SQLiteBroker,
) -> None:
    broker._bell.poll = NEVER
    consumer = await opened(broker)
    waiting = asyncio.create_task(consumer.fetch(1, NEVER))
    await _listening(broker)
    due = time.time() + 0.3
    await broker.publish([envelope("a", not_before=due)])
    async with asyncio.timeout(PATIENCE):
        assert names(await waiting) == ["a"]
    assert time.time() >= due
    await consumer.close()


async def test_who_holds_nothing_any_more_is_woken_for_what_is_handed_out_alone(
    broker: SQLiteBroker,
) -> None:
    broker._bell.poll = NEVER
    await broker.publish([envelope("s")])
    for _ in range(SUSPECT):
        dying = await opened(broker)
        assert names(await dying.fetch(1, 0)) == ["s"]
        lease = broker.lease(dying.grant)
        assert await lease.end("killed") == 1
        await lease.close()
    consumer, other = await opened(broker), await opened(broker)
    [alone] = await other.fetch(1, 0)
    await broker.publish([envelope("plain")])
    [plain] = await consumer.fetch(1, 0)
    waiting = asyncio.create_task(consumer.fetch(10, NEVER))
    await _listening(broker)
    assert not await other.settle([Release(alone)])
    await other.close()
    assert (await consumer.news()).suspects
    assert not waiting.done()
    assert not await consumer.settle([Done(plain)])
    async with asyncio.timeout(PATIENCE):
        [got] = await waiting
    assert (got.id, got.crashes, got.crash_note) == ("s", SUSPECT, "killed")
    await consumer.close()


async def test_where_no_port_can_be_had_it_looks_more_often(
    broker: SQLiteBroker, backend: SQLiteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PermissionError

    monkeypatch.setattr(wakeups, "bind", refuse)
    for driver in (broker, backend):
        driver._bell.poll = NEVER
    consumer = await opened(broker)
    arrivals = backend.subscribe()
    assert await anext(arrivals) == []
    waiting = asyncio.create_task(consumer.fetch(1, NEVER))
    arriving = asyncio.ensure_future(anext(arrivals))
    await asyncio.sleep(0.05)
    await broker.publish([envelope("a")])
    await backend.store([Outcome(task_id="b", status=TaskStatus.SUCCESS, result=Raw(b"1"))], None)
    async with asyncio.timeout(PATIENCE):
        assert names(await waiting) == ["a"]
        assert await arriving == ["b"]
    await arrivals.aclose()
    await consumer.close()


async def test_ports_are_given_up_on_closing_and_dropped_when_stale(
    broker: SQLiteBroker, start: Start, path: Path
) -> None:
    count = "SELECT count(*) FROM aiotaskq_wakeups"
    clone = broker.clone()
    await clone.open()
    consumer = await opened(clone, "q", "p")
    assert not await consumer.fetch(1, 0.01)
    assert rows(path, count) == [(2,)]
    await consumer.close()
    await clone.close()
    assert rows(path, count) == [(0,)]
    listener = start(
        """
        consumer = broker.consumer(["q"], name="test", lease=3600.0)
        await consumer.open()
        await consumer.fetch(1, 0.01)
        say("listening")
        await consumer.fetch(1, 3600.0)
        """
    )
    assert await line(listener) == "listening"
    listener.kill()
    listener.wait()
    await broker.publish([envelope("a")])  # nobody hears it, which harms nobody
    broker._sweep_at = 0.0
    await broker.maintain()
    assert rows(path, count) == [(0,)]


async def _listening(broker: SQLiteBroker) -> None:
    """Wait until somebody's port is written down."""

    def listeners(db: Database) -> int:
        return len(db.rows("SELECT 1 FROM ~wakeups"))

    async with asyncio.timeout(PATIENCE):
        while not await broker._link.run(listeners):
            await asyncio.sleep(0.01)


# --- cancelled calls ---


async def test_a_cancelled_call_is_finished_by_the_thread(broker: SQLiteBroker) -> None:
    for number in range(50):
        task = asyncio.create_task(broker.publish([envelope(f"{number}.{n}") for n in range(20)]))
        await asyncio.sleep(0.0001 * number)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    consumer = await opened(broker)
    stored = names(await consumer.fetch(10_000, 0))
    assert len(stored) % 20 == 0  # whole transactions only
    assert len(set(stored)) == len(stored)
    await consumer.close()


async def test_what_a_cancelled_fetch_took_goes_to_others_too(broker: SQLiteBroker) -> None:
    broker._bell.poll = NEVER
    clone = broker.clone()
    await clone.open()
    other = await opened(clone)
    waiting = asyncio.create_task(other.fetch(1, NEVER))
    await _listening(broker)
    consumer = await opened(broker)
    await broker.publish([envelope("a")])
    async with asyncio.timeout(PATIENCE):
        [first] = await waiting
        assert not await other.settle([Done(first)])
        for number in range(30):
            await broker.publish([envelope(f"{number}")])
            task = asyncio.create_task(consumer.fetch(1, 0))
            await asyncio.sleep(0)
            task.cancel()  # the thread is about to take it, or has done so
            await asyncio.gather(task, return_exceptions=True)
            [got] = await other.fetch(1, NEVER)
            assert got.id == f"{number}"
            assert not await other.settle([Done(got)])
    await other.close()
    await consumer.close()
    await clone.close()


FORKING = """
import os
import threading

from aiotaskq import TaskQueue

app = TaskQueue("forking", broker="sqlite:///forking.db")


@app.task
async def add(x: int, y: int) -> int:
    return x + y


def send(enough: threading.Event) -> None:
    while not enough.is_set():
        add.delay(1, 1)


enough = threading.Event()
threads = [threading.Thread(target=send, args=(enough,)) for _ in range(4)]
for thread in threads:
    thread.start()
children = []
for number in range(10):  # the first ones while the driver is imported, opened, used
    child = os.fork()
    if not child:
        for _ in range(5):
            add.delay(number, 1)
        os._exit(7)
    children.append(child)
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
enough.set()
for thread in threads:
    thread.join()
print(add.delay(3, 4).status)
"""


def test_a_process_may_fork_while_its_threads_use_the_file(tmp_path: Path) -> None:
    """Neither side waits for a lock of the other's, and both go on."""
    (tmp_path / "forking.py").write_text(FORKING, encoding="utf-8")
    for _ in range(5):
        done = subprocess.run(
            # Python 3.12 and later warn of any fork of a process with threads.
            [sys.executable, "-W", "ignore::DeprecationWarning", "forking.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout.split() == ["7"] * 10 + ["PENDING"], done.stderr
        assert not done.stderr
