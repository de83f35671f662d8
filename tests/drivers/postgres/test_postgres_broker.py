"""Behaviour of the PostgreSQL broker beyond its contract: races, tables, values."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Dead, Done
from aiotaskq.drivers.common.retention import CALLS_FOR
from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.drivers.postgres.consumer import PostgresConsumer
from aiotaskq.drivers.postgres.messages import insert
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.errors import BatchRefused, BrokerUnavailable, ConfigError, EncodeError, LeaseLost
from tests.drivers.postgres.tools import (
    PATIENCE,
    Join,
    envelope,
    ids,
    until,
)
from tests.servers import PostgresServer

# --- races --------------------------------------------------------------------------------------


async def test_a_consumer_that_is_fenced_during_a_fetch_loses_its_messages(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    lease = broker.lease(consumer.grant)
    transaction = database.transaction()
    await transaction.start()
    statement = broker._pool.names.render(messages_sql.TAKE)
    rows = await database.fetch(statement, 0.0, consumer._number, 1, ["q"], 5, True)
    assert [row["id"] for row in rows] == [None, "a"]
    assert await lease.renew(), "a sign of life waits for no fetch"
    ending = asyncio.create_task(lease.end("killed"))
    locks = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    await until(lambda: database.fetchval(locks))
    assert not ending.done()
    await transaction.commit()
    assert await ending == 1
    with pytest.raises(LeaseLost):
        await consumer.fetch(1, 0)
    [got] = await (await join()).fetch(1, 0)
    assert (got.id, got.crashes, got.crash_note) == ("a", 1, "killed")
    await lease.close()


async def test_a_message_cancelled_while_it_is_stored_is_not_handed_out(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    transaction = database.transaction()
    await transaction.start()
    await insert(database.fetch, broker._pool.names, [envelope("a"), envelope("b")])
    await broker.cancel(["a"])
    await transaction.commit()
    consumer = await join()
    assert ids(await consumer.fetch(5, 0)) == ["b"]
    assert await broker.depth() == {"q": Depth(held=1)}


async def test_cancelling_waits_for_a_fetch_that_is_under_way(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A message that is being taken meanwhile counts as held, and is left alone."""
    consumer = await join()
    await broker.publish([envelope("a")])
    transaction = database.transaction()
    await transaction.start()
    statement = broker._pool.names.render(messages_sql.TAKE)
    await database.fetch(statement, 0.0, consumer._number, 1, ["q"], 5, True)
    cancelling = asyncio.create_task(broker.cancel(["a"], running=False))
    locks = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    await until(lambda: database.fetchval(locks))
    await transaction.commit()
    assert list(await cancelling) == ["a"]
    assert not (await consumer.news()).cancelled


async def test_no_consumer_is_fenced_because_the_server_was_restarted(
    broker: PostgresBroker, join: Join, postgres_server: PostgresServer
) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    await consumer.fetch(1, 0)
    postgres_server.restart()
    broker._time_shift = 61.0
    newcomer = broker.consumer(["q"], name="w", lease=60)
    await _opened(newcomer)
    assert (await broker.maintain()).reclaimed == 0
    broker._time_shift = 122.0
    assert (await broker.maintain()).reclaimed == 1  # once only
    await newcomer.close()


async def _opened(consumer: PostgresConsumer) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await consumer.open()
            except BrokerUnavailable:
                await asyncio.sleep(0.05)


@pytest.mark.may_block("it stands still on purpose")
async def test_a_process_that_is_stopped_in_a_transaction_does_not_block_others_for_long(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    broker = PostgresBroker(postgres_url, timeout=1.0)
    await broker.open()
    pool, name = broker._pool, postgres_url.rpartition("/")[2]
    lock = "SELECT single FROM aiotaskq_silence FOR UPDATE"

    async def stand_still(connection: asyncpg.Connection[asyncpg.Record]) -> list[str]:
        await connection.fetch(lock)
        return postgres_server.sql(lock, database=name)  # blocks the event loop

    with pytest.raises(BrokerUnavailable):
        await pool.transact(stand_still, repeat=False)
    assert len(await pool.fetch(lock)) == 1
    await broker.close()


# --- the tables ---------------------------------------------------------------------------------


async def test_done_messages_leave_nothing_behind(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    """The tables stay as large as one round, if autovacuum does its work from time to time."""
    consumer = await join()
    sizes: list[int] = []
    for round_ in range(4):
        for start in range(0, 3000, 500):
            await broker.publish([envelope(f"{round_}.{start + n}") for n in range(500)])
        while got := await consumer.fetch(1000, 0):
            assert not await consumer.settle([Done(one) for one in got])
        for table in ("messages", "calls", "consumers"):
            await database.execute(f"VACUUM aiotaskq_{table}")
        size = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname ~ '^aiotaskq'"
        sizes.append(int(await database.fetchval(size)))
    # An index's empty pages are used again one cleaning later.
    assert sizes[-1] <= sizes[1] * 1.1, sizes


async def test_calls_and_ids_are_forgotten_when_their_time_is_over(
    broker: PostgresBroker, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    await broker.publish([envelope("a", unique=True)], call_id="call")
    await broker.cancel(["b"])
    left = (
        "SELECT (SELECT count(*) FROM aiotaskq_calls), (SELECT count(*) FROM aiotaskq_recent),"
        " (SELECT count(*) FROM aiotaskq_cancelled)"
    )
    for passed, expected in (
        (0.0, (1, 1, 1)),
        (CALLS_FOR - 20.0, (1, 1, 1)),
        (CALLS_FOR + 1.0, (0, 1, 1)),
        (86_500.0, (0, 0, 1)),
        (8 * 86_400.0, (0, 0, 0)),
    ):
        broker._time_shift = passed
        await broker.maintain()
        assert tuple(await database.fetchrow(left) or ()) == expected


@pytest.mark.usefixtures("broker")
async def test_autovacuum_is_set_up_for_rows_that_come_and_go(
    database: asyncpg.Connection[asyncpg.Record],
) -> None:
    query = "SELECT unnest(reloptions) FROM pg_class WHERE relname = 'aiotaskq_messages'"
    options = {row[0] for row in await database.fetch(query)}
    assert {"autovacuum_vacuum_scale_factor=0", "vacuum_truncate=false"} <= options


async def test_messages_are_readable_in_psql(
    broker: PostgresBroker, postgres_server: PostgresServer, postgres_url: str
) -> None:
    await broker.publish([envelope("a", body=b'{"task":"add"}', priority=3)])
    lines = postgres_server.sql(
        "SELECT id, queue, priority, convert_from(body, 'UTF8') FROM aiotaskq_messages",
        database=postgres_url.rpartition("/")[2],
    )
    assert lines == ['a|q|3|{"task":"add"}']


# --- values and keys ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
async def test_an_id_that_cannot_be_stored_is_refused_and_the_others_are_stored(
    broker: PostgresBroker, name: str
) -> None:
    with pytest.raises(BatchRefused) as refused:
        await broker.publish([envelope("a"), envelope(name), envelope("b")])
    assert list(refused.value.errors) == [1]
    assert isinstance(refused.value.errors[1], EncodeError)
    assert (await broker.depth())["q"].ready == 2


async def test_a_reason_may_hold_anything(broker: PostgresBroker, join: Join) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    [got] = await consumer.fetch(1, 0)
    assert not await consumer.settle([Dead(got, "a\0b\ud800")])
    [letter] = await broker.dead("q")
    assert letter.reason == "a\\x00b\\ud800"


async def test_a_key_that_the_broker_never_gives_is_refused(broker: PostgresBroker) -> None:
    with pytest.raises(ConfigError, match="not the key"):
        await broker.dead("q", before="x")


async def test_a_sign_of_life_after_a_silence_is_seen_only_when_all_leases_are_extended(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    first = await join()
    await join()
    silent = 0.9 * first.grant.seconds
    await database.execute(
        "UPDATE aiotaskq_consumers SET beat = beat - $1, lease_until = lease_until - 2 * $1", silent
    )
    lapsed = (
        "SELECT count(*) FROM aiotaskq_consumers WHERE lease_until <= extract(epoch FROM now())"
    )
    beats = "SELECT max(beat) FROM aiotaskq_consumers"
    before = await database.fetchval(beats)
    assert await database.fetchval(lapsed) == 2
    lease = broker.lease(first.grant)
    async with database.transaction():
        await database.execute("SELECT FROM aiotaskq_silence FOR UPDATE")  # somebody judges
        renewing = asyncio.create_task(lease.renew())

        async def waits() -> bool:
            return bool(await database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await until(waits)
        assert await database.fetchval(beats) == before
    assert await renewing
    assert await database.fetchval(beats) > before
    assert await database.fetchval(lapsed) == 0
    await lease.close()
