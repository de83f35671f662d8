"""The PostgreSQL driver behind PgBouncer, in transaction mode and in session mode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from msgspec import Raw

from aiotaskq import TaskQueue
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker, notify
from aiotaskq.drivers.postgres import consumer as consumers
from aiotaskq.errors import ConfigError
from aiotaskq.testing.conformance.cancel import CancelTests
from aiotaskq.testing.conformance.publish import UniqueTests
from aiotaskq.testing.conformance.settle import SettlementTests
from tests.conformance.test_postgres import PostgresHarness
from tests.servers import PgBouncer, PostgresServer, Watchdog

PATIENCE = 120.0


@pytest.fixture
def pooled_url(pgbouncer: PgBouncer, postgres_server: PostgresServer, postgres_url: str) -> str:
    """The database of the test through the pooler, with notices from the server itself."""
    url = pgbouncer.url(postgres_url.rpartition("/")[2])
    return f"{url}&listen={postgres_server.host}:{postgres_server.port}"


@pytest.fixture(scope="module")
def in_session_mode(watchdog: Watchdog, postgres_server: PostgresServer) -> Iterator[PgBouncer]:
    pooler = PgBouncer(watchdog, postgres_server, mode="session")
    try:
        pooler.start()
        yield pooler
    finally:
        pooler.close()


@pytest.fixture
def session_url(in_session_mode: PgBouncer, postgres_url: str) -> str:
    """The database of the test through a pooler that gives each client a session."""
    return in_session_mode.url(postgres_url.rpartition("/")[2])


class TestThroughPgBouncer(SettlementTests, CancelTests, UniqueTests):
    """Parts of the suite, which all statements together take part in."""

    @pytest.fixture
    async def harness(
        self, postgres_server: PostgresServer, pooled_url: str, postgres_url: str
    ) -> AsyncIterator[PostgresHarness]:
        harness = PostgresHarness(postgres_server, pooled_url, control=postgres_url)
        yield harness
        await harness.close()


async def test_many_clients_share_few_connections(pooled_url: str) -> None:
    brokers = [PostgresBroker(pooled_url) for _ in range(6)]
    await asyncio.gather(*(one.open() for one in brokers))
    consumers = [one.consumer(["q"], name="w", lease=60) for one in brokers]
    await asyncio.gather(*(one.open() for one in consumers))
    ids = [f"{number}" for number in range(120)]
    done: list[str] = []

    async def produce(broker: PostgresBroker, share: list[str]) -> None:
        for name in share:
            await broker.publish([Envelope(id=name, queue="q", body=b"x", unique=True)])

    async def work(number: int) -> None:
        while len(done) < len(ids):
            got = await consumers[number].fetch(10, 0.2)
            assert not await consumers[number].settle([Done(one) for one in got])
            done.extend(one.id for one in got)
            await brokers[number].maintain()

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(
            *(produce(one, ids[number::6]) for number, one in enumerate(brokers)),
            *map(work, range(6)),
        )
    assert sorted(done) == sorted(ids)
    for consumer in consumers:
        await consumer.close()
    assert await brokers[0].depth() == {}
    for broker in brokers:
        await broker.close()


async def test_every_kind_of_settlement_in_one_transaction(pooled_url: str) -> None:
    broker = PostgresBroker(pooled_url)
    await broker.open()
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    await broker.publish([Envelope(id=one, queue="q", body=b"") for one in "abcd"])
    a, b, c, d = await consumer.fetch(4, 0)
    again = Envelope(id="b", queue="q", body=b"", delay=3600.0)
    assert not await consumer.settle([Done(a), Again(b, again), Dead(c, "bad"), Release(d)])
    assert await broker.depth() == {"q": Depth(ready=1, delayed=1, dead=1)}
    await consumer.close()
    await broker.close()


async def test_notices_come_from_the_server_itself(
    pooled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _use_notices(pooled_url, monkeypatch)


async def _use_notices(pooled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "_LONGEST_PAUSE", 3600.0)  # it does not look by itself
    broker, backend = PostgresBroker(pooled_url), PostgresBackend(pooled_url)
    await broker.open()
    await backend.open()
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    arrivals = backend.subscribe()
    assert list(await anext(arrivals)) == []
    for number in range(5):
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await asyncio.sleep(0.1)
        await broker.publish([Envelope(id=f"{number}", queue="q", body=b"")])
        async with asyncio.timeout(PATIENCE):
            got = await waiting
        assert not await consumer.settle([Done(one) for one in got])
    await backend.store([Outcome(task_id="a", status=TaskStatus.SUCCESS, result=_NULL)], 60)
    async with asyncio.timeout(PATIENCE):
        assert list(await anext(arrivals)) == ["a"]
    await arrivals.aclose()  # type: ignore[attr-defined]  # an async generator
    await consumer.close()
    await broker.close()
    await backend.close()


class TestThroughPgBouncerInSessionMode(UniqueTests):
    """A part of the suite, and with it the statements of consumers and of publishing."""

    @pytest.fixture
    async def harness(
        self, postgres_server: PostgresServer, session_url: str, postgres_url: str
    ) -> AsyncIterator[PostgresHarness]:
        harness = PostgresHarness(postgres_server, session_url, control=postgres_url)
        yield harness
        await harness.close()


async def test_in_session_mode_notices_come_through_the_pooler(
    session_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "listen=" not in session_url
    await _use_notices(session_url, monkeypatch)
    assert "No notices" not in caplog.text


async def test_in_session_mode_a_worker_needs_nothing_else(session_url: str) -> None:
    app = TaskQueue("tasks", broker=session_url)

    @app.task(name="add")
    async def add(x: int, y: int) -> int:
        return x + y

    async with asyncio.timeout(PATIENCE), app, app.worker():
        handles = [await add.kiq(n, 1) for n in range(20)]
        assert [await one.result() for one in handles] == [n + 1 for n in range(20)]
        assert await (await add.with_options(countdown=0.1).kiq(1, 1)).result() == 2


async def test_without_notices_there_is_a_warning_and_messages_are_found_by_looking(
    pgbouncer: PgBouncer,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(notify, "_TEST_TIMEOUT", 0.3)
    caplog.set_level(logging.WARNING, logger="aiotaskq")
    broker = PostgresBroker(pgbouncer.url(postgres_url.rpartition("/")[2]))
    await broker.open()
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    waiting = asyncio.create_task(consumer.fetch(1, PATIENCE))
    async with asyncio.timeout(PATIENCE):
        while "listen=host:port" not in caplog.text:
            await asyncio.sleep(0.01)
    await broker.publish([Envelope(id="a", queue="q", body=b"")])
    assert [one.id for one in await waiting] == ["a"]
    await consumer.close()
    await broker.close()


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_a_url_without_the_option_for_poolers_is_refused_with_advice(
    pgbouncer: PgBouncer, in_session_mode: PgBouncer, postgres_url: str, mode: str
) -> None:
    """PgBouncer takes no settings with which a session starts, unless it is told to ignore them."""
    pooler = pgbouncer if mode == "transaction" else in_session_mode
    url = pooler.url(postgres_url.rpartition("/")[2]).partition("?")[0]
    with pytest.raises(ConfigError, match="statement_cache_size=0"):
        await PostgresBroker(url).open()
    if mode == "session":
        return
    backend = PostgresBackend(url)
    with pytest.raises(ConfigError, match="statement_cache_size=0"):
        await _use(backend)
    await backend.close()


async def _use(backend: PostgresBackend) -> None:
    await backend.open()
    for _ in range(50):  # which connection is whose is chance
        await asyncio.gather(*(backend.load([f"{number}"]) for number in range(5)))


_NULL = Raw(b"null")
