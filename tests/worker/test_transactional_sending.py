"""Tasks that are sent in a transaction of the caller, to PostgreSQL or through the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import aiotaskq.drivers.redis  # noqa: F401 - an import in the loop of a test would block it
from aiotaskq import BatchRefused, ConfigError, TaskQueue, Unsupported
from aiotaskq.client.outbox import QUEUE
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.tasks.options import CallOptions
from aiotaskq.testing import FaultKind, FaultPlan, FaultPoint, FlakyBroker

LONG = 120.0  # seconds until something that must happen has failed
A_MOMENT = 0.2  # seconds to wait for something that must not happen


@pytest.fixture(params=["postgres", "outbox"])
async def app(request: pytest.FixtureRequest, postgres_url: str) -> AsyncIterator[TaskQueue]:
    """An application whose broker is PostgreSQL, or memory with an outbox in PostgreSQL."""
    if request.param == "postgres":
        app = TaskQueue("shop", broker=postgres_url)
    else:
        app = TaskQueue("shop", broker="memory://", outbox_url=postgres_url)
    async with app:
        yield app


@pytest.fixture
async def connection(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


async def test_a_task_is_sent_if_and_only_if_the_transaction_commits(
    app: TaskQueue, connection: asyncpg.Connection
) -> None:
    runs: list[int] = []

    @app.task
    async def order(number: int) -> int:
        runs.append(number)
        return number

    async with app.worker():
        undone = connection.transaction()
        await undone.start()
        await order.with_options(connection=connection).kiq(1)
        await undone.rollback()
        async with connection.transaction():
            handle = await order.with_options(connection=connection).kiq(2)
            await asyncio.sleep(A_MOMENT)
            assert not runs
        assert await handle.result(LONG) == 2
    assert runs == [2]


async def test_connections_of_a_pool_and_batches_do_as_well(
    app: TaskQueue, postgres_url: str
) -> None:
    @app.task
    async def order(number: int) -> int:
        return number

    async with app.worker(), asyncpg.create_pool(postgres_url, min_size=0) as pool:
        async with pool.acquire() as connection, connection.transaction():
            enlisted = order.with_options(connection=connection)
            handles = await app.kiq_many([order.s(1), *(enlisted.s(n) for n in range(2, 600))])
        assert [await one.result(LONG) for one in handles] == list(range(1, 600))


async def test_sessions_and_connections_of_sqlalchemy_do_as_well(
    app: TaskQueue, postgres_url: str
) -> None:
    @app.task
    async def order(number: int) -> int:
        return number

    engine = create_async_engine(postgres_url.replace("postgresql://", "postgresql+asyncpg://"))
    async with app.worker():
        async with AsyncSession(engine) as session:  # sending the task is its first statement
            await order.with_options(connection=session).kiq(1)
            await session.rollback()
            handle = await order.with_options(connection=session).kiq(2)
            await session.execute(text("SELECT 1"))
            await session.commit()
        assert await handle.result(LONG) == 2
        async with engine.begin() as begun:
            handle = await order.with_options(connection=begun).kiq(3)
        assert await handle.result(LONG) == 3
        broker = await app.broker()
        assert all(one == Depth(held=one.held) for one in (await broker.depth()).values())
    await engine.dispose()


async def test_an_id_given_twice_is_stored_once(
    app: TaskQueue, connection: asyncpg.Connection
) -> None:
    runs: list[int] = []

    @app.task
    async def order(number: int) -> int:
        runs.append(number)
        return number

    async with connection.transaction():
        enlisted = order.with_options(connection=connection, task_id="order-1")
        first, second = await enlisted.kiq(1), await enlisted.kiq(2)
    async with app.worker():
        assert await first.result(LONG) == await second.result(LONG) == 1
        last = await order.kiq(3)
        await last.result(LONG)
    assert runs == [1, 3]


async def test_a_conflict_with_another_transaction_raises_the_clients_error(
    app: TaskQueue, connection: asyncpg.Connection, postgres_url: str
) -> None:
    @app.task
    async def order(number: int) -> int:
        return number

    other = await asyncpg.connect(postgres_url)

    async def behind_another() -> None:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetch("SELECT 1")  # from here on it sees no changes of others
            async with other.transaction():
                await order.with_options(connection=other, task_id="order-1").kiq(1)
            await order.with_options(connection=connection, task_id="order-1").kiq(2)

    async def after_a_failure() -> None:
        async with connection.transaction():
            with pytest.raises(asyncpg.DivisionByZeroError):
                await connection.fetch("SELECT 1 / 0")
            await order.with_options(connection=connection).kiq(3)

    with pytest.raises(asyncpg.SerializationError):
        await behind_another()
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await after_a_failure()
    await other.close()


async def test_options_hold_in_a_transaction_too(
    app: TaskQueue, connection: asyncpg.Connection
) -> None:
    ended: list[str] = []

    @app.task
    async def order(name: str) -> str:
        ended.append(name)
        return name

    async with connection.transaction():
        wanted: dict[str, CallOptions] = {
            "late": {"countdown": 0.5},
            "low": {"priority": 1},
            "high": {"priority": 8},
        }
        for name, options in wanted.items():
            options["connection"] = connection
            await order.with_options(**options).kiq(name)
        elsewhere = await order.with_options(connection=connection, queue="other").kiq("other")
    async with app.worker(queues=["default", "other"], concurrency=1):
        assert await elsewhere.result(LONG) == "other"
        while "late" not in ended:
            await asyncio.sleep(0.01)
    assert ended.index("late") == 3


async def test_a_wrong_connection_is_refused_with_advice(
    app: TaskQueue, connection: asyncpg.Connection, postgres_url: str
) -> None:
    @app.task
    async def order() -> None: ...

    enlisted = order.with_options(connection=connection)
    with pytest.raises(ConfigError, match=r"open one: async with connection\.transaction"):
        await app.kiq_many([order.s(), enlisted.s()])
    assert not await (await app.broker()).depth()
    with pytest.raises(ConfigError, match="dict"):
        await order.with_options(connection={}).kiq()
    with pytest.raises(ConfigError, match=r"sqlalchemy\.orm\.session\.Session"):
        await order.with_options(connection=Session()).kiq()
    with pytest.raises(ConfigError, match="no URL"):
        order.with_options(connection=postgres_url)
    with pytest.raises(ConfigError, match=r"await task\.kiq"):
        await asyncio.to_thread(order.with_options(connection=connection).delay)
    with pytest.raises(ConfigError, match="makes no sense for a schedule"):
        await app.schedules.add("s", order.with_options(connection=connection).s(), 60)
    await connection.execute("CREATE DATABASE elsewhere")
    other = await asyncpg.connect(postgres_url.rpartition("/")[0] + "/elsewhere")
    transaction = other.transaction()
    await transaction.start()
    with pytest.raises(ConfigError, match=r"has no table .*give a connection to that"):
        await order.with_options(connection=other).kiq()
    await transaction.rollback()
    await other.close()
    await connection.execute("DROP DATABASE elsewhere")


async def test_other_brokers_without_an_outbox_raise_with_advice(
    connection: asyncpg.Connection,
) -> None:
    async with TaskQueue("shop", broker="memory://") as app:

        @app.task
        async def order() -> None: ...

        async with connection.transaction():
            with pytest.raises(Unsupported, match="set outbox_url"):
                await order.with_options(connection=connection).kiq()


def test_an_outbox_elsewhere_than_in_postgres_is_refused() -> None:
    app = TaskQueue("shop", broker="memory://", outbox_url="redis://localhost:1/0")
    with pytest.raises(ConfigError, match=r"outbox_url is redis://.* must be a PostgreSQL"):
        app.outbox_broker()


async def test_large_tasks_are_relayed_a_few_at_a_time(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand of the largest tasks would be more than a server takes in one call."""
    monkeypatch.setattr("aiotaskq.client.outbox_relay._BATCH_BYTES", 10_000)
    sizes: list[int] = []
    publish = MemoryBroker.publish

    async def noting(
        broker: MemoryBroker, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        sizes.append(sum(len(one.body) for one in batch))
        return await publish(broker, batch, call_id=call_id)

    monkeypatch.setattr(MemoryBroker, "publish", noting)
    app = TaskQueue("shop", broker="memory://", outbox_url=postgres_url)

    @app.task
    async def order(text: str) -> int:
        return len(text)

    async with app, app.worker():
        async with connection.transaction():
            small, large = (order.with_options(connection=connection).s("x" * n) for n in (1, 4000))
            handles = await app.kiq_many([*[small] * 50, *[large] * 20, order.s("")])
        assert [await one.result(LONG) for one in handles] == [1] * 50 + [4000] * 20 + [0]
    assert 10 < len(sizes) < 40
    assert max(sizes) <= 10_000


async def test_what_the_broker_never_takes_goes_to_the_dead_letters_of_the_outbox_alone(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = MemoryBroker.publish

    async def picky(
        broker: MemoryBroker, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        refused: dict[int, Exception] = {
            at: Unsupported("never") for at, one in enumerate(batch) if one.queue == "bad"
        }
        rest = [one for at, one in enumerate(batch) if at not in refused]
        answer = await publish(broker, rest, call_id=call_id)
        if refused:
            raise BatchRefused(refused, answer=answer)
        return answer

    monkeypatch.setattr(MemoryBroker, "publish", picky)
    app = TaskQueue("shop", broker="memory://", outbox_url=postgres_url)

    @app.task
    async def order(number: int) -> int:
        return number

    async with app, app.worker():
        async with connection.transaction():
            bad = await order.with_options(queue="bad", connection=connection).kiq(0)
            good = [await order.with_options(connection=connection).kiq(n) for n in range(5)]
        assert [await one.result(LONG) for one in good] == list(range(5))
        outbox = app.outbox_broker()
        assert outbox is not None
        await outbox.open()
        async with asyncio.timeout(LONG):
            while not (dead := await outbox.dead(QUEUE)):
                await asyncio.sleep(0.01)
        await outbox.close()
    assert [(one.id, one.reason) for one in dead] == [
        (bad.id, "the broker does not take it: never")
    ]


async def test_sending_needs_the_documented_rights_only(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    page = Path(__file__).parents[2] / "docs/how-to/transactions.md"
    grants = [line for line in page.read_text().splitlines() if line.startswith("GRANT")]
    async with TaskQueue("shop", broker=postgres_url) as app:

        @app.task
        async def order() -> None: ...

        await app.broker()
        await connection.execute("CREATE ROLE sender")
        try:
            for grant in grants:
                await connection.execute(grant.replace("TO app", "TO sender"))
            async with connection.transaction():
                await connection.execute("SET LOCAL ROLE sender")
                await order.with_options(connection=connection).kiq()
                await order.with_options(connection=connection, task_id="1", countdown=1).kiq()
        finally:
            await connection.execute("DROP OWNED BY sender; DROP ROLE sender")
        assert (await (await app.broker()).depth())["default"] == Depth(ready=1, delayed=1)


async def test_a_relay_goes_on_once_its_table_is_there_again(
    postgres_url: str, connection: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    app = TaskQueue("shop", broker="memory://", outbox_url=postgres_url)

    @app.task
    async def order(number: int) -> int:
        return number

    async def send(number: int) -> int:
        async with connection.transaction():
            handle = await order.with_options(connection=connection).kiq(number)
        return await handle.result(LONG)

    async with app, app.worker():
        assert await send(1) == 1
        await connection.execute("ALTER TABLE aiotaskq_outbox_consumers RENAME TO away")
        async with asyncio.timeout(LONG):
            while "tasks wait in the outbox, trying again" not in caplog.text:
                await asyncio.sleep(0.01)
        await asyncio.sleep(A_MOMENT)
        await connection.execute("ALTER TABLE away RENAME TO aiotaskq_outbox_consumers")
        assert await send(2) == 2


class FlakyOutbox(TaskQueue):
    """An application whose outbox fails as planned."""

    plan: FaultPlan

    def outbox_broker(self) -> Broker | None:
        store = super().outbox_broker()
        if not hasattr(self, "plan"):
            return store
        assert isinstance(store, PostgresBroker)
        return FlakyBroker(store, self.plan)


@pytest.mark.parametrize("deadly", [True, False], ids=["dies", "fails"])
@pytest.mark.parametrize("way", list(FaultKind))
async def test_a_task_that_is_relayed_twice_runs_once(
    postgres_url: str, redis_url: str, connection: asyncpg.Connection, way: FaultKind, deadly: bool
) -> None:
    """A relay that stops after publishing leaves its messages in the outbox for the next one."""
    app = FlakyOutbox(
        "shop", broker=redis_url, outbox_url=postgres_url, worker_lease=1.0, worker_heartbeat=0.2
    )
    runs: list[int] = []

    @app.task
    async def order(number: int) -> int:
        runs.append(number)
        return number

    async with app:
        async with connection.transaction():
            calls = [order.with_options(connection=connection).s(n) for n in range(5)]
            handles = await app.kiq_many(calls)
        plan = app.plan = FaultPlan(FaultPoint("consumer.settle", 1), way, deadly=deadly)
        async with app.worker():
            assert [await one.result(LONG) for one in handles] == [0, 1, 2, 3, 4]
            while not plan.hit:
                await asyncio.sleep(0.01)
        del app.plan
        async with app.worker():
            store = PostgresBroker(postgres_url, prefix=f"{app.conf.prefix}_{QUEUE}")
            await store.open()
            async with asyncio.timeout(LONG):
                while await store.depth():
                    await asyncio.sleep(0.01)
            await store.close()
            last = await order.kiq(9)
            await last.result(LONG)
        assert sorted(runs) == [0, 1, 2, 3, 4, 9]
