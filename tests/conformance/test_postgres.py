from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker
from aiotaskq.drivers.postgres.permissions import ROLES
from aiotaskq.testing import BrokerConformance, ResultConformance, check_broker
from tests.faults.scene import scaled
from tests.servers import PostgresServer

# Emptied between two tests, which is faster than making them again.
TABLES = (
    *("messages", "consumers", "dead", "cancelled", "recent", "calls", "schedules", "results"),
)
# Tables with rows that stay for a time when all messages are gone: cancelled ids for a week, ids of
# calls for a minute, unique ids for a day.
PASSING = ("cancelled", "recent", "calls", "results")
LIMITED = "limited"  # the role of the drivers


class PostgresHarness:
    can_cut = True
    can_stall = True

    def __init__(self, server: PostgresServer, url: str, *, control: str | None = None) -> None:
        self._server = server
        self._url = url
        self._control_url = control or url
        self._made: list[PostgresBackend | PostgresBroker] = []
        self._control: asyncpg.Connection[asyncpg.Record] | None = None
        self._shift = 0.0

    async def broker(self) -> PostgresBroker:
        broker = PostgresBroker(self._url)
        await self._open(broker)
        return broker

    async def backend(self) -> PostgresBackend:
        backend = PostgresBackend(self._url)
        await self._open(backend)
        return backend

    async def _open(self, driver: PostgresBackend | PostgresBroker) -> None:
        driver._time_shift = self._shift
        self._made.append(driver)
        await driver.open()

    async def pass_time(self, seconds: float) -> None:
        self._shift += seconds
        for driver in self._made:
            driver._time_shift = self._shift

    async def now(self) -> float:
        control = await self.control()
        real = await control.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        return float(real + self._shift)

    async def cut(self) -> None:
        await asyncio.to_thread(self._server.stop)

    async def mend(self) -> None:
        await asyncio.to_thread(self._server.start)

    async def stall(self, seconds: float) -> None:
        await self.pass_time(seconds)
        control = await self.control()
        await control.execute(
            f"UPDATE aiotaskq_consumers SET beat = beat - {seconds};"
            f"UPDATE aiotaskq_silence SET spared = spared - {seconds}, seen = seen - {seconds}"
        )

    async def leaks(self) -> list[str]:
        control = await self.control()
        return [
            f"{table}: {row}"
            for table in TABLES
            if table not in PASSING
            for row in await control.fetch(f"SELECT * FROM aiotaskq_{table}")
        ]

    async def close(self) -> None:
        await self.mend()
        for driver in self._made:
            await driver.close()
        control = await self.control()
        rows = await control.fetch("SELECT relname FROM pg_class WHERE relkind = 'r'")
        there = {row["relname"] for row in rows}
        made = [name for name in (f"aiotaskq_{table}" for table in TABLES) if name in there]
        if made:
            await control.execute(f"TRUNCATE {', '.join(made)}")
        await control.close()

    async def control(self) -> asyncpg.Connection[asyncpg.Record]:
        """Return a connection beside those of the drivers, a new one after a restart."""
        if self._control is None or self._control.is_closed():
            self._control = await asyncpg.connect(self._control_url)
        return self._control


@pytest.fixture(scope="module")
def database(postgres_server: PostgresServer) -> Iterator[str]:
    """One database for all tests here: making one takes longer than most of them."""
    name = postgres_server.create_database()
    url = postgres_server.url(name)
    asyncio.run(_migrate(url))
    postgres_server.sql(
        f"CREATE ROLE {LIMITED} LOGIN", *ROLES["all"].grants(LIMITED), database=name
    )
    yield url
    postgres_server.start()
    postgres_server.drop_database(name)
    postgres_server.sql(f"DROP ROLE {LIMITED}")


async def _migrate(url: str) -> None:
    broker = PostgresBroker(url)
    await broker.migrate()
    await broker.backend().migrate()


def _harness(server: PostgresServer, database: str) -> PostgresHarness:
    """Return a harness whose drivers have no more rights than the documentation gives them."""
    limited = database.replace(f"//{server.user}@", f"//{LIMITED}@")
    return PostgresHarness(server, limited, control=database)


@pytest.fixture
async def harness(postgres_server: PostgresServer, database: str) -> AsyncIterator[PostgresHarness]:
    postgres_server.start()
    harness = _harness(postgres_server, database)
    yield harness
    await harness.close()


class TestPostgresBroker(BrokerConformance):
    impossible = ({"id": "\ud800"}, {"id": "a\0b"}, {"queue": "q\0"}, {"priority": 10**6})


class TestPostgresBackend(ResultConformance):
    pass


@pytest.mark.timeout(3600)  # histories are long, and the machine may be busy
def test_random_histories_agree_with_the_model(
    postgres_server: PostgresServer, database: str
) -> None:
    check_broker(lambda: _harness(postgres_server, database), examples=scaled(6, 100), steps=30)
