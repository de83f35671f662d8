"""Migrations of the tables of the PostgreSQL driver."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker
from aiotaskq.drivers.postgres.migrate import MIGRATIONS
from aiotaskq.errors import BrokerUnavailable, ConfigError
from tests.servers import PostgresServer

STEPS = [one.name for one in MIGRATIONS]


async def applied(database: asyncpg.Connection[asyncpg.Record]) -> list[str]:
    rows = await database.fetch("SELECT name FROM aiotaskq_migrations ORDER BY number")
    return [row["name"] for row in rows]


async def tables(database: asyncpg.Connection[asyncpg.Record]) -> set[str]:
    rows = await database.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return {row["tablename"] for row in rows}


def test_the_steps_are_numbered_without_a_gap() -> None:
    assert [one.number for one in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))
    assert {one.part for one in MIGRATIONS} == {"results", "broker"}


async def test_many_programs_that_start_at_once_make_the_tables_once(
    postgres_url: str, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    brokers = [PostgresBroker(postgres_url) for _ in range(8)]
    backends = [PostgresBackend(postgres_url) for _ in range(8)]
    await asyncio.gather(*(one.open() for one in brokers), *(one.open() for one in backends))
    assert await applied(database) == STEPS
    await asyncio.gather(*(one.publish([Envelope(id="a", queue="q", body=b"")]) for one in brokers))
    assert (await brokers[0].depth())["q"].ready == 8
    await asyncio.gather(*(one.close() for one in brokers), *(one.close() for one in backends))


async def test_a_program_that_only_stores_results_gets_no_other_tables(
    postgres_url: str, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = PostgresBackend(postgres_url)
    await backend.open()
    await backend.close()
    assert await tables(database) == {"aiotaskq_migrations", "aiotaskq_results"}


async def test_a_dry_run_changes_nothing_and_its_statements_are_enough(
    postgres_url: str, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    broker = PostgresBroker(postgres_url)
    missing = await broker.migrate(dry_run=True)
    assert [name for name, _ in missing] == ["002_broker"]
    assert await tables(database) == set()
    for _, statements in missing:
        await database.execute(statements)
    assert await broker.migrate() == []
    await broker.open()
    await broker.close()


async def test_a_step_that_fails_leaves_nothing_behind(
    postgres_url: str, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    await database.execute("CREATE TABLE aiotaskq_schedules (mine text)")
    with pytest.raises(ConfigError, match="aiotaskq_schedules"):
        await PostgresBroker(postgres_url).open()
    assert await tables(database) == {"aiotaskq_schedules"}


async def test_tables_of_a_later_release_are_refused(
    postgres_url: str, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    broker = PostgresBroker(postgres_url)
    await broker.migrate()
    await database.execute(
        "INSERT INTO aiotaskq_migrations (number, name) VALUES (999, '999_broker_faster')"
    )
    for call in (broker.open, broker.migrate):
        with pytest.raises(ConfigError, match=r"999_broker_faster.*upgrade"):
            await call()
    backend = PostgresBackend(postgres_url)  # that part is as it was
    await backend.open()
    await backend.close()


async def test_a_user_who_may_not_create_tables_is_told_to_migrate_and_then_works(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    broker = PostgresBroker(postgres_server.guarded_url(name))
    for call in (broker.open, broker.migrate):
        with pytest.raises(ConfigError, match="permission denied") as refused:
            await call()
        assert "migrate" in str(refused.value) or "--sql" in str(refused.value)
    await PostgresBroker(postgres_url).migrate()
    postgres_server.sql(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"
        f" TO {postgres_server.guarded_user}",
        database=name,
    )
    await broker.open()
    await broker.publish([Envelope(id="a", queue="q", body=b"", delay=0.001)])
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    [got] = await consumer.fetch(1, 10)
    assert got.id == "a"
    await consumer.close()
    await broker.close()


async def test_a_server_that_is_away_is_not_a_config_error(
    postgres_server: PostgresServer,
) -> None:
    broker = PostgresBroker(f"postgresql://127.0.0.1:{1}/x")
    for call in (broker.open, broker.migrate):
        with pytest.raises(BrokerUnavailable):
            await call()


@pytest.mark.parametrize("prefix", ["Own", 'a "b" -- {c}', "x" * 40])
async def test_any_prefix_names_a_set_of_tables_of_its_own(postgres_url: str, prefix: str) -> None:
    one, other = PostgresBroker(postgres_url, prefix=prefix), PostgresBroker(postgres_url)
    for broker in (one, other):
        await broker.open()
    await one.publish([Envelope(id="a", queue="q", body=b"")])
    consumer = one.consumer(["q"], name="w", lease=60)
    await consumer.open()
    assert [got.id for got in await consumer.fetch(1, 0)] == ["a"]
    waiting = asyncio.create_task(consumer.fetch(1, 60))
    await asyncio.sleep(0.1)
    await one.publish([Envelope(id="b", queue="q", body=b"")])
    assert [got.id for got in await waiting] == ["b"]
    assert await other.depth() == {}
    await consumer.close()
    for broker in (one, other):
        await broker.close()
