"""T39: foreign bytes in the queues; T40: one kind of task that keeps all workers busy."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import random
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from aiotaskq import Call, Retry, TaskHandle, TaskQueue
from tests.faults.checker import DEAD, Allowed
from tests.faults.ledger import Acknowledged, Attempted, Ended, Started
from tests.faults.producer import Some
from tests.faults.scene import Scene, scaled
from tests.faults.servers import PATIENCE, serves

QUICK = "tests.faults.application.quick"
FLAKY = "tests.faults.application.flaky"
MEGABYTE = 1024 * 1024


# --- T39 ----------------------------------------------------------------------------------------


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def message(**fields: Any) -> bytes:
    """Return a message in JSON that is correct except for some fields."""
    return json.dumps({"id": "hostile", "task": QUICK, "args": ["hostile"], **fields}).encode()


def nested(levels: int) -> bytes:
    right = message(args=["here"])
    return right.replace(b'"here"', b"[" * levels + b"]" * levels)


def bodies(chance: random.Random, trap: Path, huge: int) -> list[bytes]:
    """Return bodies that are no message, or a message that must not run."""
    noise = [chance.randbytes(2 ** chance.randrange(14)) for _ in range(50)]
    right = message()
    mutilated = []
    for _ in range(100):
        text = bytearray(right)
        for _ in range(chance.randint(1, 4)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        mutilated.append(bytes(text))
    cut = [right[: chance.randrange(len(right))] for _ in range(20)]
    odd = [{}, [], None, 0, "", True, [1, 2], {"id": 1}, {"task": QUICK}]
    fields: list[dict[str, Any]] = [
        {"task": "nobody.knows.it"},
        {"task": "os.system", "args": [f"touch {trap}"]},
        {"task": ""},
        {"task": "x" * 100_000},
        {"task": "\x00\n\r\x1b[2J"},
        {"id": ""},
        {"id": "\n" * 10},
        {"id": "x" * 100_000},
        {"id": "\ud800"},
        {"args": ["\ud800"]},
        {"args": [float("nan"), float("inf")]},
        {"args": [], "kwargs": {}},
        {"args": ["a", 1.0, 2, 3]},
        {"args": ["a"], "kwargs": {"key": "b"}},
        {"args": {"key": "a"}},
        {"args": [{"$pickle": base64.b64encode(pickle.dumps(Trap(trap))).decode()}]},
        {"pickled": base64.b64encode(pickle.dumps(Trap(trap))).decode()},
        {"kwargs": {"seconds": "nan"}},
        {"kwargs": {"seconds": -1e308}},
        {"kwargs": {"__class__": 1, "self": 2}},
        {"args": [10**4000]},
        {"attempt": -(2**63)},
        {"attempt": 2**70},
        {"attempt": "1"},
        {"priority": 10**9},
        {"timeout": -1.0},
        {"timeout": 1e308},
        {"timeout": "soon"},
        {"soft_timeout": 1e-300},
        {"expires_at": -1e308},
        {"expires_at": 1e308},
        {"sent_at": 1e308},
        {"queue": "another"},
        {"queue": "x" * 10_000 + "}{"},
        {"retry": {"max_attempts": 10**30}},
        {"retry": {"max_attempts": 3, "delay": -1.0, "backoff": "evil", "max_delay": -1.0}},
        {"headers": {"a": ["b"]}},
        {"headers": {"x" * 1000: "y" * 100_000}},
        {"history": [{"number": 1, "at": 1e308, "worker": "x", "error": "y" * 100_000}] * 50},
        {"unknown_for": -1e308},
        {"unknown_since": 1e308},
    ]
    return [
        b"",
        b"\x00" * 100,
        *noise,
        *mutilated,
        *cut,
        *(json.dumps(one).encode() for one in odd),
        *(message(**given) for given in fields),
        *(msgspec.msgpack.encode(json.loads(message(**given))) for given in ({}, {"task": "no"})),
        msgspec.msgpack.encode(["no", "map"]),
        nested(900),
        nested(10_000),
        b"[" * 100_000,
        b"\x91" * 100_000,
        b'{"id":"a","id":"b","task":"c"}',
        b"x" * huge,
        message(args=["y" * huge]),
        message(kwargs={str(n): n for n in range(50_000)}),
    ]


def heads(chance: random.Random) -> list[bytes]:
    """Return wrong prefixes of a body in Redis."""
    return [
        b"",
        b"\n",
        b"0 0 - ",
        b"0 0 -\n",
        b"0 0 - \xff\xfe\n",
        b"0 0 - %zz%0A%\n",
        b"0 0 - " + b"x" * MEGABYTE + b"\n",
        b"-1 -1 - a\n",
        b"a b c d\n",
        b"1e9 0 - a\n",
        b"99999999999999999999999 0 - a\n",
        b"2 0 - suspect\n",
        b"2:%zz%00 0 - suspect\n",
        b"0 99 - a\n",
        b"0 0 nan a\n",
        b"0 0 inf a\n",
        b"0 0 1e400 a\n",
        b"0 0 +1 a\n",
        b"0 0 -1 a\n",
        *(chance.randbytes(2 ** chance.randrange(8)) for _ in range(50)),
    ]


def push_to_redis(url: str, given: Iterable[bytes], chance: random.Random) -> None:
    """Add items at all places from which items are taken."""
    base = "aiotaskq:{default}:"
    with redis.Redis.from_url(url) as client:
        for number, body in enumerate(given):
            client.rpush(f"{base}ready", b"0 0 - hostile-%d\n%b" % (number, body))
        for head in heads(chance):
            client.rpush(f"{base}ready", head, head + message())
            client.rpush(f"{base}ready:7", head + message())
            client.sadd(f"{base}levels", "7")
            client.zadd(f"{base}delayed", {head + message(): 1.0, b"x " + head + b"y": 2.0})


def insert_into_sqlite(url: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Insert rows of id, priority, time of expiry, number of crashes, and body."""
    insert = (
        "INSERT INTO aiotaskq_messages (id, queue, priority, expires_at, crashes, body)"
        " VALUES (?, 'default', ?, ?, ?, ?)"
    )
    path = url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE)) as database, database:
        database.executemany(insert, rows)


ODD_ROWS: list[tuple[Any, ...]] = [
    (b"\xff\x00", 0, None, 0, message()),
    (17, 0, None, 0, message()),
    ("", 0, None, 0, message()),
    ("x" * MEGABYTE, 0, None, 0, message()),
    ("priority", -5, None, 0, message()),
    ("priority", "high", None, 0, message()),
    ("expires", 0, -1e308, 0, message()),
    ("crashes", 0, None, -5, message()),
    ("crashes", 0, None, 2, message()),
    ("crashes", 0, None, 2**62, message()),
]
# SQLite takes a value of any type into any column.
ROWS_OF_OTHER_TYPES: list[tuple[Any, ...]] = [
    ("text", 0, None, 0, message().decode()),
    ("number", 0, None, 0, 17),
    ("real", 0, None, 0, 1.5),
    ("expires", 0, "never", 0, message()),
    ("crashes", 0, None, "many", message()),
    ("crashes", 0, None, b"\xff", message()),
]


async def test_t39_what_cannot_be_read_ends_and_harms_nobody(
    scene: Scene, chance: random.Random, tmp_path: Path
) -> None:
    scene.set(unknown_task_ttl=0.1)
    program = await scene.fleet.worker("-c", "20", processes=2)
    workers = {worker.pid: worker for worker in scene.fleet.workers(program)}
    await serves(scene)
    memory = sum(worker.memory_info().rss for worker in workers.values())
    trap = tmp_path / "trapped"
    given = bodies(chance, trap, scaled(10, 50) * MEGABYTE)
    if scene.broker.startswith("redis"):
        push_to_redis(scene.broker, given, chance)
    else:
        rows = [(f"hostile-{number}", 0, None, 0, body) for number, body in enumerate(given)]
        insert_into_sqlite(scene.broker, [*rows, *ODD_ROWS])
    await serves(scene)
    assert await scene.observer.drained((), PATIENCE), await scene.observer.waiting()
    assert not trap.exists()
    assert {worker.pid for worker in scene.fleet.workers(program)} == set(workers)
    grown = sum(worker.memory_info().rss for worker in workers.values()) - memory
    assert grown < scaled(400, 1500) * MEGABYTE
    verdict = await scene.verdict(
        Allowed(errors=[r"aiotaskq\.errors\.\w+", r"asyncio\S+", "OverflowError"])
    )
    # Foreign messages have ended as well; some could be run, even several times.
    wrong = [one for one in verdict.problems if not one.startswith(("U2", "U3", "U4", "U8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
async def test_t39_columns_of_another_type_harm_nobody(scene: Scene) -> None:
    program = await scene.fleet.worker("-c", "20")
    (worker,) = scene.fleet.workers(program)
    insert_into_sqlite(scene.broker, ROWS_OF_OTHER_TYPES)
    await serves(scene)
    assert await scene.observer.drained((), PATIENCE), await scene.observer.waiting()
    assert scene.fleet.workers(program) == [worker]


# --- T40 ----------------------------------------------------------------------------------------


async def test_t40_a_storm_of_retries_starves_nobody(scene: Scene) -> None:
    await scene.fleet.worker("-c", "10", processes=2)
    app = TaskQueue("client", broker=scene.broker)
    retry = Retry(max_attempts=scaled(40, 200), delay=0.2, backoff="constant", jitter=False)
    keys = [f"storm-{number}" for number in range(scaled(50, 500))]
    scene.writer.write(*(Attempted(key=key, task="flaky") for key in keys))
    handles: list[TaskHandle[str]] = await app.kiq_many(
        [Call(FLAKY, (key, 10**6), {}, {"retry": retry}) for key in keys]
    )
    scene.writer.write(
        *(Acknowledged(key=key, task_id=one.id) for key, one in zip(keys, handles, strict=True))
    )
    await app.close()
    await scene.ledger.count(
        Started, 2 * len(keys), within=PATIENCE
    )  # the storm of retries has begun
    for _ in range(3):
        await serves(scene)
    attempts = [line.attempt for line in scene.ledger.of(Started) if line.key in keys]
    assert max(attempts) < retry.max_attempts, "the storm was over before"
    scene.producer(Some("quick", 200), rate=200)
    await scene.drain()
    runs = [line for line in scene.ledger.of(Ended) if line.key in keys]
    assert len(runs) == len(keys) * retry.max_attempts
    await scene.check(Allowed(duplicates=0, endings={"flaky": frozenset({DEAD})}))
