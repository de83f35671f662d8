"""Fixtures that the tests of the PostgreSQL driver share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker
from aiotaskq.drivers.postgres.consumer import PostgresConsumer
from tests.drivers.postgres.tools import Join, Make


@pytest.fixture
async def broker(postgres_url: str) -> AsyncIterator[PostgresBroker]:
    broker = PostgresBroker(postgres_url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def join(broker: PostgresBroker) -> AsyncIterator[Join]:
    """Open consumers."""
    made: list[PostgresConsumer] = []

    async def join(*queues: str) -> PostgresConsumer:
        consumer = broker.consumer(queues or ["q"], name="w", lease=60)
        await consumer.open()
        made.append(consumer)
        return consumer

    yield join
    for consumer in made:
        await consumer.close()


@pytest.fixture
async def make(postgres_url: str) -> AsyncIterator[Make]:
    """Make open backends, on the database of the test unless another URL is given."""
    made: list[PostgresBackend] = []

    async def make(url: str = postgres_url, **settings: Any) -> PostgresBackend:
        backend = PostgresBackend(url, **settings)
        made.append(backend)
        await backend.open()
        return backend

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection beside the driver's own."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()
