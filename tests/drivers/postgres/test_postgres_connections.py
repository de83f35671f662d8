"""Connections of the PostgreSQL driver that end, go dead, or wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.drivers.postgres import connection, subscription
from aiotaskq.errors import BackendUnavailable
from tests.drivers.postgres.tools import (
    PATIENCE,
    Make,
    heard,
    outcome,
    until,
    until_heard,
)
from tests.servers import PostgresServer


class FreezableProxy:
    """A proxy whose connections can go dead without being closed, as a firewall does it."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        yield listener.sockets[0].getsockname()[1]
        listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def freeze(self) -> None:
        """Let nothing through on the connections that are there; new ones are fine."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._server.host, self._server.port)
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._pump(source, sink, self._flowing))
            self._tasks.add(task)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, flowing: asyncio.Event
    ) -> None:
        try:
            while data := await source.read(65_536):
                await flowing.wait()
                sink.write(data)
        except ConnectionError:
            pass  # the other side ended it, which ends this side too
        finally:
            sink.close()


@pytest.fixture
async def proxy(postgres_server: PostgresServer) -> AsyncIterator[tuple[FreezableProxy, int]]:
    proxy = FreezableProxy(postgres_server)
    async with proxy.open() as port:
        yield proxy, port


async def test_batches_that_share_ids_do_not_wait_for_each_other(make: Make) -> None:
    backends = [await make() for _ in range(4)]
    for round_ in range(10):
        ids = [f"{round_}.{n}" for n in range(200)]
        refused = await asyncio.gather(
            *(
                one.store([outcome(task_id) for task_id in ids[:: 1 if n % 2 else -1]], None)
                for n, one in enumerate(backends)
            )
        )
        assert sum(map(len, refused)) == 3 * len(ids)


async def test_a_restart_between_two_calls_goes_unnoticed(
    make: Make, postgres_server: PostgresServer
) -> None:
    backend = await make()
    await asyncio.gather(*(backend.store([outcome(f"{n}")], None) for n in range(10)))
    for restart in (postgres_server.restart, postgres_server.kill):
        # Blocks the loop, so that the driver cannot have seen its connections end.
        restart()
        postgres_server.start()
        assert len(await backend.load([f"{n}" for n in range(10)])) == 10


async def test_a_cancelled_call_frees_its_connection(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make(pool_size=1)
    await backend.store([outcome("a", status=TaskStatus.STARTED)], None)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    transaction = database.transaction()
    await transaction.start()
    await database.execute("SELECT FROM aiotaskq_results WHERE task_id = 'a' FOR UPDATE")
    store = asyncio.create_task(backend.store([outcome("a")], None))
    await until(lambda: database.fetchval(waiting))
    store.cancel()
    with pytest.raises(asyncio.CancelledError):
        await store
    assert set(await backend.load(["a"])) == {"a"}
    await transaction.rollback()


async def test_a_call_has_a_deadline(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make(timeout=0.5)
    await backend.store([outcome("a", status=TaskStatus.STARTED)], None)
    async with database.transaction():
        await database.execute("SELECT FROM aiotaskq_results WHERE task_id = 'a' FOR UPDATE")
        with pytest.raises(BackendUnavailable):
            await backend.store([outcome("a")], None)
    assert not await backend.store([outcome("b")], None)


async def test_a_subscriber_whose_connection_is_ended_subscribes_again(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make()
    end = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query ILIKE 'LISTEN%'"
    )
    async with heard(backend) as arrived:
        assert await database.fetchval(end) == 1
        await until_heard(arrived, {""})
        await backend.store([outcome("a")], None)
        await until_heard(arrived, {"a"})


async def test_a_connection_that_went_dead_is_noticed(
    make: Make,
    proxy: tuple[FreezableProxy, int],
    postgres_server: PostgresServer,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subscription, "PING_EVERY", 0.2)
    monkeypatch.setattr(connection, "_PING_TIMEOUT", 1.0)
    between, port = proxy
    backend = await make(postgres_url.replace(str(postgres_server.port), str(port)), timeout=1.0)
    other = await make()
    await backend.store([outcome("before")], None)
    async with heard(backend) as arrived:
        await other.store([outcome("first")], None)
        await until_heard(arrived, {"first"})
        between.freeze()
        with pytest.raises(BackendUnavailable):
            await backend.load(["before"])
        await until_heard(arrived, {""})
        await other.store([outcome("second")], None)
        await until_heard(arrived, {"second"})
    assert set(await backend.load(["before"])) == {"before"}


async def test_closing_does_not_wait_for_a_dead_connection(
    make: Make,
    proxy: tuple[FreezableProxy, int],
    postgres_server: PostgresServer,
    postgres_url: str,
) -> None:
    between, port = proxy
    backend = await make(postgres_url.replace(str(postgres_server.port), str(port)), timeout=280.0)
    await backend.store([outcome("a")], None)
    between.freeze()
    call = asyncio.create_task(backend.load(["a"]))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(PATIENCE):
        await backend.close()
        with pytest.raises(BackendUnavailable):
            await call
