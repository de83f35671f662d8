"""Waking of waiting consumers of the PostgreSQL broker."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.postgres import PostgresBroker, consumer
from aiotaskq.drivers.postgres.messages import insert, notify_on_commit
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from tests.drivers.postgres.tools import (
    PATIENCE,
    Join,
    counted,
    envelope,
    ids,
    until,
    waiting,
)


@pytest.fixture(autouse=True)
def nobody_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a lost notice a message that is never found, instead of one that is found late."""
    monkeypatch.setattr(consumer, "_LONGEST_PAUSE", 3600.0)


async def test_as_many_consumers_are_woken_as_there_are_messages(
    broker: PostgresBroker,
    join: Join,
    database: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle = [asyncio.create_task((await join()).fetch(1, 2 * PATIENCE)) for _ in range(10)]
    await waiting(database, 10)
    ran = counted(broker, monkeypatch)
    await broker.publish([envelope("a"), envelope("b")])
    async with asyncio.timeout(PATIENCE):
        while sum(task.done() for task in idle) < 2:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)  # and no more of them
    assert ran.count(messages_sql.TAKE) == 2
    done = [task.result() for task in idle if task.done()]
    assert sorted(ids([one for got in done for one in got])) == ["a", "b"]
    await broker.publish([envelope(f"{number}") for number in range(8)])
    assert len(await asyncio.gather(*idle)) == 10


async def test_no_notice_is_sent_while_no_consumer_waits(
    broker: PostgresBroker,
    join: Join,
    database: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = await join()
    heard: list[object] = []
    for channel in ("aiotaskq_wake", f"aiotaskq_{worker._number}"):
        await database.add_listener(channel, lambda *notice: heard.append(notice))
    for number in range(5):
        await broker.publish([envelope(f"{number}")])
        [got] = await worker.fetch(1, 0)
        await worker.settle([Done(got)])
    await database.execute("SELECT pg_notify('aiotaskq_wake', 'last')")
    await until(lambda: _true(heard))
    assert len(heard) == 1


async def _true(value: object) -> bool:
    return bool(value)


async def test_a_consumer_with_a_message_is_no_longer_marked_as_waiting(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A consumer with a delivery is not marked as waiting, so the next notice is for another."""
    for _ in range(10):
        first, second = await join(), await join()
        both = [asyncio.create_task(one.fetch(1, 2 * PATIENCE)) for one in (first, second)]
        await waiting(database, 2)
        await broker.publish([envelope("a")])
        await broker.publish([envelope("b")])
        got = await asyncio.gather(*both)
        assert sorted(ids([one for some in got for one in some])) == ["a", "b"]
        for one in (first, second):
            await one.close()
        await broker.purge("q")


async def test_a_lost_connection_for_notices_is_replaced(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    task = asyncio.create_task((await join()).fetch(1, 2 * PATIENCE))
    await waiting(database, 1)
    listening = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query ILIKE 'LISTEN%'"
    )
    assert await database.fetchval(listening) == 1
    await asyncio.sleep(0.2)
    await broker.publish([envelope("a")])
    assert ids(await task) == ["a"]


async def test_messages_stored_in_a_transaction_are_there_when_it_commits(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    task = asyncio.create_task((await join()).fetch(1, 2 * PATIENCE))
    await waiting(database, 1)
    names = broker._pool.names
    for commits in (False, True):
        transaction = database.transaction()
        await transaction.start()
        assert not await insert(database.fetch, names, [envelope("a", unique=True)])
        await notify_on_commit(database.fetch, names)
        await asyncio.sleep(0.05)
        assert not task.done()
        await (transaction.commit() if commits else transaction.rollback())
    async with asyncio.timeout(PATIENCE):
        assert ids(await task) == ["a"]
