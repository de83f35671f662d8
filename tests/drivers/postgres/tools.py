"""Helpers that the tests of the PostgreSQL driver share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from msgspec import Raw

from aiotaskq.contract.message import Attempt, Delivery, Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker
from aiotaskq.drivers.postgres.consumer import PostgresConsumer
from aiotaskq.errors import BrokerUnavailable

PATIENCE = 120.0
Join = Callable[..., Awaitable[PostgresConsumer]]
Make = Callable[..., Awaitable[PostgresBackend]]

HISTORY = (
    Attempt(number=1, at=1.5, worker="w1", error="ValueError: grüße", traceback="Traceback\n"),
    Attempt(number=2, at=2.5, worker="w2", error="OSError: away"),
)


def envelope(name: str, **fields: Any) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"body", **fields})


def ids(got: Sequence[Delivery]) -> list[str]:
    return [one.id for one in got]


async def until(true: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await true():
            await asyncio.sleep(0.01)


async def waiting(database: asyncpg.Connection[asyncpg.Record], count: int) -> None:
    """Wait until so many consumers have said that they wait."""
    query = "SELECT count(*) FROM aiotaskq_consumers WHERE waiting"

    async def all_wait() -> bool:
        return bool(await database.fetchval(query) == count)

    await until(all_wait)
    await asyncio.sleep(0.05)  # each looks once more, and sleeps


def counted(broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every statement that the broker runs is added from now on."""
    pool, ran = broker._pool, list[str]()
    fetch = pool.fetch

    async def noting(template: str, *arguments: Any, repeat: bool = True) -> list[asyncpg.Record]:
        ran.append(template)
        return await fetch(template, *arguments, repeat=repeat)

    monkeypatch.setattr(pool, "fetch", noting)
    return ran


def losing(broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Let the answer to the next run of a statement be lost."""
    pool = broker._pool
    fetch = pool.fetch

    async def failing(template: str, *arguments: Any, repeat: bool = True) -> Any:
        rows = await fetch(template, *arguments, repeat=repeat)
        if template == lost:
            monkeypatch.setattr(pool, "fetch", fetch)
            raise BrokerUnavailable("the answer was lost")
        return rows

    monkeypatch.setattr(pool, "fetch", failing)


def losing_commit(broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the answer to the end of the next transaction be lost."""
    pool = broker._pool
    transact = pool.transact

    async def failing(work: Any, *, repeat: bool) -> Any:
        await transact(work, repeat=repeat)
        monkeypatch.setattr(pool, "transact", transact)
        raise BrokerUnavailable("the answer was lost")

    monkeypatch.setattr(pool, "transact", failing)


def outcome(task_id: str, result: bytes = b"1", **fields: Any) -> Outcome:
    fields = {"status": TaskStatus.SUCCESS, **fields}
    return Outcome(task_id=task_id, result=Raw(result), **fields)


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


@asynccontextmanager
async def heard(backend: PostgresBackend) -> AsyncIterator[set[str]]:
    """Collect ids that arrive; the empty string stands for an empty item after the first."""
    found: set[str] = set()
    ready = asyncio.Event()

    async def listen() -> None:
        async for ids in backend.subscribe():
            if ready.is_set():
                found.update(ids or [""])
            ready.set()

    task = asyncio.create_task(listen())
    await asyncio.wait_for(ready.wait(), PATIENCE)
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_heard(found: set[str], wanted: set[str]) -> None:
    async def all_there() -> bool:
        return wanted <= found

    await until(all_there)
