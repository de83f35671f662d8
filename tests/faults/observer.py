"""The observer: samples outcomes during a scene, and collects all facts at its end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import sqlite3
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import msgspec
import redis

from aiotaskq import TaskQueue
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable
from tests.faults.checker import Final, Letter
from tests.faults.ledger import Acknowledged, Attempted, Ledger, Sampled, Started, Writer

_EVERY = 0.25  # seconds between samples
_LETTERS = 100_000

# Keys without a time to live: `{}` stands for the base of any queue.
_PERMANENT = (
    "queues",
    "cancelled",
    *(f"{{}}{name}" for name in ("meta", "dead", "letters", "wake")),
)
# Fields of `meta` that do not belong to one consumer.
_META = ("beat", "granted", "serial")
# Rows that may stay: dead letters, decisions, and waiting processes.
_ROWS = ("messages", "consumers")


class Observer:
    """A reader of outcomes, queues and stores, as any client can be.

    Args:
        app: The application whose drivers are used, of the running event loop.
        ledger: The history so far.
        writer: For the samples.
    """

    def __init__(self, app: TaskQueue, ledger: Ledger, writer: Writer) -> None:
        self._ledger = ledger
        self._writer = writer
        broker, backend = app.drivers()
        assert backend is not None
        self.broker, self.backend = broker, backend
        self._prints: dict[str, str] = {}

    async def open(self) -> None:
        await self.broker.open()
        await self.backend.open()

    async def close(self) -> None:
        await self.broker.close()
        await self.backend.close()

    def forget(self) -> None:
        """Forget the outcomes seen so far."""
        self._prints.clear()

    def ids(self) -> set[str]:
        """Return the ids of all tasks that were certainly sent."""
        found = set()
        for line in self._ledger.refresh():
            if isinstance(line, Acknowledged | Started | Attempted) and line.task_id:
                found.add(line.task_id)
        return found

    async def sample(self) -> Mapping[str, Outcome]:
        """Read all outcomes, and record those that are new or changed."""
        outcomes = {
            task_id: outcome
            for task_id, outcome in (await self.backend.load(self.ids())).items()
            if outcome.status.final
        }
        for task_id, outcome in outcomes.items():
            print_ = _print(outcome)
            if self._prints.get(task_id) != print_:
                self._prints[task_id] = print_
                self._writer.write(
                    Sampled(task_id=task_id, status=str(outcome.status), print=print_)
                )
        return outcomes

    async def watch(self) -> None:
        """Sample until cancelled, also while servers are unreachable."""
        while True:
            with contextlib.suppress(BackendUnavailable):
                await self.sample()
            await asyncio.sleep(_EVERY)

    async def letters(self) -> list[Letter]:
        """Return all dead letters."""
        found = []
        for queue, depth in (await self.broker.depth()).items():
            if depth.dead:
                found += [
                    Letter(letter.id, letter.reason)
                    for letter in await self.broker.dead(queue, _LETTERS)
                ]
        return found

    async def waiting(self) -> dict[str, int]:
        """Count the messages that are not settled, by queue and state."""
        return {
            f"{queue} {state}": number
            for queue, depth in (await self.broker.depth()).items()
            for state in ("ready", "delayed", "held")
            if (number := getattr(depth, state))
        }

    async def drained(self, wanted: Collection[str], within: float) -> float | None:
        """Wait until these tasks have ended and the queues are empty; return the time of that."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            with contextlib.suppress(BackendUnavailable, BrokerUnavailable):
                ended = {*(await self.sample()), *(one.task_id for one in await self.letters())}
                if ended.issuperset(wanted) and not await self.waiting():
                    return time.monotonic()
            await asyncio.sleep(0.1)
        return None

    async def finals(self, app: TaskQueue) -> dict[str, Final]:
        """Return the outcomes with their values."""
        found = {}
        for task_id, outcome in (await self.sample()).items():
            value = None
            if outcome.status is TaskStatus.SUCCESS:
                value = app.codec.decode_result(outcome.result)
            found[task_id] = Final(str(outcome.status), value)
        return found


def _print(outcome: Outcome) -> str:
    text = msgspec.json.encode(msgspec.structs.replace(outcome, children=[]))
    return f"{outcome.worker} {outcome.date_done} {hashlib.sha256(text).hexdigest()[:12]}"


def redis_leftovers(url: str, prefix: str = "aiotaskq") -> list[str]:
    """Return keys without a time to live, and fields of keys, that are not meant to stay."""
    found: list[str] = []
    for client in _masters(url):
        with client:
            keys = [str(key) for key in client.scan_iter(count=1000) if client.ttl(key) == -1]
            found += [key for key in keys if not _permanent(key, prefix)]
            for key in keys:
                if key.endswith(":meta"):
                    fields = [str(field) for field in client.hkeys(key)]
                    found += [f"{key} {field}" for field in fields if field not in _META]
    return found


def _masters(url: str) -> list[redis.Redis]:
    """Return clients of all servers that hold keys."""
    parts = urlsplit(url)
    places = [one.split(":") for one in parts.netloc.split(",")]
    if parts.scheme == "redis+sentinel":
        first = redis.Redis(host=places[0][0], port=int(places[0][1]))
        master = str(first.info("sentinel")["master0"]["address"])
        return [redis.Redis.from_url(f"redis://{master}", decode_responses=True)]
    if parts.scheme == "redis+cluster":
        clients = [
            redis.Redis(host=host, port=int(port), decode_responses=True) for host, port in places
        ]
        return [one for one in clients if one.role()[0] == "master"]
    return [redis.Redis.from_url(url, decode_responses=True)]


def _permanent(key: str, prefix: str) -> bool:
    rest = re.sub(
        r"^\{\d+\.\d+\}:", "", key.removeprefix(f"{prefix}:")
    )  # of the shard of a cluster
    if rest.startswith("{") and "}:" in rest:
        rest = "{}" + rest.partition("}:")[2]
    return rest in _PERMANENT


def sqlite_leftovers(path: Path, prefix: str = "aiotaskq") -> list[str]:
    """Return the errors of the file, and the rows that are not meant to stay."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        (sound,) = database.execute("PRAGMA integrity_check").fetchone()
        found = [] if sound == "ok" else [f"integrity_check: {sound}"]
        for table in _ROWS:
            (rows,) = database.execute(f"SELECT count(*) FROM {prefix}_{table}").fetchone()
            if rows:
                found.append(f"{rows} rows in {table}")
    return found


async def postgres_leftovers(url: str, prefix: str = "aiotaskq") -> list[str]:
    """Return the rows that are not meant to stay."""
    database = await asyncpg.connect(url)
    try:
        counts = {
            table: await database.fetchval(f"SELECT count(*) FROM {prefix}_{table}")
            for table in _ROWS
        }
    finally:
        await database.close()
    return [f"{rows} rows in {table}" for table, rows in counts.items() if rows]
