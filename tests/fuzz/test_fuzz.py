"""The fuzzer on each driver: a few seconds each; `make fuzz` takes longer, with other seeds."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import uuid
from pathlib import Path

import asyncpg
import pytest
import redis

from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker
from aiotaskq.drivers.redis import RedisBroker
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.testing.fuzz import body_attacks, check_dead_commands, fuzz
from tests.fuzz import attacks_postgres, attacks_redis, attacks_sqlite

SECONDS = float(os.environ.get("AIOTASKQ_TESTS_FUZZ", "3"))
pytestmark = [pytest.mark.may_block, pytest.mark.timeout(120 + 10 * SECONDS)]


@pytest.fixture
def seed() -> int:
    """A seed, told with every failure: a new one in `make fuzz`, or that of AIOTASKQ_TESTS_SEED."""
    usual = random.randrange(2**32) if "AIOTASKQ_TESTS_FUZZ" in os.environ else 1
    seed = int(os.environ.get("AIOTASKQ_TESTS_SEED") or usual)
    sys.stderr.write(f"seed {seed}\n")
    return seed


async def test_hostile_entries_in_memory_harm_nobody(seed: int) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    broker = MemoryBroker(url)
    await broker.open()
    assert await fuzz(url, body_attacks(broker.publish, seed), seconds=SECONDS / 2, seed=seed)
    await broker.close()


async def test_hostile_entries_in_redis_harm_nobody(
    redis_url: str, seed: int, tmp_path: Path
) -> None:
    broker = RedisBroker(redis_url)
    await broker.open()
    with redis.Redis.from_url(redis_url) as client:
        attacks = [
            *attacks_redis.attacks(client, seed),
            *body_attacks(broker.publish, seed),
        ]
        assert await fuzz(redis_url, attacks, seconds=SECONDS, seed=seed)
    await broker.close()
    await asyncio.to_thread(check_dead_commands, redis_url, tmp_path)


async def test_hostile_rows_in_postgresql_harm_nobody(
    postgres_url: str, seed: int, tmp_path: Path
) -> None:
    broker, backend = PostgresBroker(postgres_url), PostgresBackend(postgres_url)
    await broker.open()
    await backend.open()
    await backend.close()
    connection = await asyncpg.connect(postgres_url)
    attacks = [
        *await attacks_postgres.attacks(connection),
        *body_attacks(broker.publish, seed),
    ]
    assert await fuzz(postgres_url, attacks, seconds=SECONDS, seed=seed)
    await connection.close()
    await broker.close()
    await asyncio.to_thread(check_dead_commands, postgres_url, tmp_path)


async def test_hostile_rows_in_sqlite_harm_nobody(seed: int, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fuzz.db"
    broker = SQLiteBroker(url)
    await broker.open()
    attacks = [
        *attacks_sqlite.attacks(tmp_path / "fuzz.db"),
        *body_attacks(broker.publish, seed),
    ]
    assert await fuzz(url, attacks, seconds=SECONDS, seed=seed)
    await broker.close()
    await asyncio.to_thread(check_dead_commands, url, tmp_path)
