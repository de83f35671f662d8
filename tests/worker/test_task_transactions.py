"""Tasks whose own writes and outcome are committed in one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import asyncpg
import pytest
from msgspec import Raw

from aiotaskq import Retry, TaskFailed, TaskQueue, TaskRevoked, current_task
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.postgres import PostgresBackend
from aiotaskq.drivers.postgres.transactions import PostgresTransaction
from aiotaskq.errors import BackendUnavailable
from aiotaskq.testing import FaultKind, FaultPlan, FaultPoint, FlakyBroker

LONG = 120.0  # seconds until something that must happen has failed
PAY = "INSERT INTO paid (order_id) VALUES ($1)"


@pytest.fixture
async def paid(postgres_url: str) -> AsyncIterator[asyncpg.Pool]:
    """A pool of the test itself, on a database with a table of the user's."""
    async with asyncpg.create_pool(postgres_url, min_size=0, max_size=2) as pool:
        await pool.execute("CREATE TABLE paid (order_id integer NOT NULL)")
        yield pool


@pytest.fixture
async def app(postgres_url: str, paid: asyncpg.Pool) -> AsyncIterator[TaskQueue]:
    app = TaskQueue("paying", broker="memory://", backend=postgres_url)
    async with app:
        yield app


async def count(paid: asyncpg.Pool) -> int:
    return int(await paid.fetchval("SELECT count(*) FROM paid"))


async def until_settled(app: TaskQueue) -> None:
    broker = await app.broker()
    async with asyncio.timeout(LONG):
        while await broker.depth():
            await asyncio.sleep(0.01)


async def until_lost(connection: asyncpg.Connection) -> None:
    """Wait until the client notices that a connection of a pool has ended."""
    with contextlib.suppress(asyncpg.InterfaceError):
        async with asyncio.timeout(LONG):
            while connection.get_server_pid():
                await asyncio.sleep(0.01)


async def test_writes_of_a_task_are_committed_with_its_success(
    app: TaskQueue, paid: asyncpg.Pool
) -> None:
    seen: list[int] = []

    @app.task
    async def pay(order: int) -> str:
        connection = await current_task().transaction()
        assert connection is await current_task().transaction()
        await connection.execute(PAY, order)
        seen.append(await count(paid))
        return "paid"

    async with app.worker():
        handle = await pay.kiq(1)
        assert await handle.result(LONG) == "paid"
    assert (seen, await count(paid)) == ([0], 1)
    assert (await handle.wait(LONG)).execution_time is not None


@pytest.mark.parametrize(
    "way", ["raises", "is too late", "hides that", "is cancelled", "returns what has no form"]
)
async def test_writes_of_a_task_that_does_not_succeed_are_undone(
    app: TaskQueue, paid: asyncpg.Pool, way: str
) -> None:
    written = asyncio.Event()

    @app.task
    async def pay(order: int) -> object:
        await (await current_task().transaction()).execute(PAY, order)
        written.set()
        if way == "raises":
            raise ValueError("no money")
        if way == "hides that":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(LONG)
            return "paid"
        if way != "returns what has no form":
            await asyncio.sleep(LONG)
        return object()

    timeout = 0.2 if way in ("is too late", "hides that") else LONG
    async with app.worker():
        handle = await pay.with_options(timeout=timeout).kiq(1)
        await asyncio.wait_for(written.wait(), LONG)
        if way == "is cancelled":
            await handle.cancel()
        with pytest.raises(TaskRevoked if way == "is cancelled" else TaskFailed):
            await handle.result(LONG)
        await until_settled(app)
    assert await count(paid) == 0


async def test_the_second_of_two_runs_is_undone(app: TaskQueue, paid: asyncpg.Pool) -> None:
    """As after a worker that stood still while another one ran its task."""

    @app.task
    async def pay(order: int) -> str:
        await (await current_task().transaction()).execute(PAY, order)
        backend = await app.backend()
        assert backend is not None
        first = Outcome(task_id=current_task().id, status=TaskStatus.SUCCESS, result=b'"first"')  # type: ignore[arg-type]  # bytes do
        assert not await backend.store([first], None)
        return "second"

    async with app.worker() as worker:
        handle = await pay.kiq(1)
        assert await handle.result(LONG) == "first"
        await until_settled(app)
        assert worker.health.counts["refused"] == 1
    assert await count(paid) == 0


async def test_runs_at_the_same_time_write_once(app: TaskQueue, paid: asyncpg.Pool) -> None:
    both = asyncio.Barrier(2)

    @app.task
    async def pay(order: int) -> int:
        await (await current_task().transaction()).execute(PAY, order)
        await both.wait()
        return order

    async with app.worker() as worker:
        first = await pay.kiq(1)
        # Sent twice under one id, as if a broker had delivered it twice.
        again = await pay.with_options(task_id=first.id).kiq(1)
        assert await again.result(LONG) == 1
        await until_settled(app)
        assert worker.health.counts["refused"] == 1
    assert await count(paid) == 1


async def test_a_worker_that_dies_after_the_commit_has_done_it_once(
    postgres_url: str, paid: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The application that died waits for its broker when it is closed.
    monkeypatch.setattr("aiotaskq.worker.incarnation._STORE_WAIT", 0.1)
    memory = MemoryBroker()
    plan = FaultPlan(FaultPoint("consumer.settle", 1), FaultKind.NOT_SENT, deadly=True)
    dying = FlakyBroker(memory, plan)
    runs: list[int] = []

    def make(broker: MemoryBroker | FlakyBroker) -> TaskQueue:
        app = TaskQueue("paying", broker=broker, backend=postgres_url)

        @app.task(name="pay")
        async def pay(order: int) -> str:
            runs.append(order)
            await (await current_task().transaction()).execute(PAY, order)
            return "paid"

        return app

    first, second = make(dying), make(memory)
    handle = await second.send("pay", (1,))
    async with first.worker(grace_period=0):
        assert await handle.result(LONG) == "paid"
    [grant] = plan.grants
    assert await memory.lease(grant).end("killed") == 1
    async with second.worker():
        await until_settled(second)
    assert (runs, await count(paid)) == ([1], 1)
    for app in (first, second):
        await app.close()


async def test_a_task_whose_result_is_ignored_records_that_it_is_done(
    app: TaskQueue, paid: asyncpg.Pool
) -> None:
    """Otherwise a second run would not notice that it comes too late."""

    @app.task(ignore_result=True)
    async def pay(order: int) -> None:
        await (await current_task().transaction()).execute(PAY, order)

    async with app.worker():
        handle = await pay.kiq(1)
        async with asyncio.timeout(LONG):
            while await handle.status() is not TaskStatus.SUCCESS:
                await asyncio.sleep(0.01)
        await handle.result()
    assert await count(paid) == 1


async def test_a_connection_that_is_lost_fails_the_attempt_and_leaves_nothing(
    app: TaskQueue, paid: asyncpg.Pool
) -> None:
    attempts: list[int] = []

    @app.task(retry=Retry(max_attempts=2, delay=0.01))
    async def pay(order: int) -> None:
        connection = await current_task().transaction()
        await connection.execute(PAY, order)
        attempts.append(current_task().attempt)
        if attempts == [1]:
            pid = connection.get_server_pid()
            await paid.execute("SELECT pg_terminate_backend($1)", pid, timeout=LONG)
            await until_lost(connection)

    async with app.worker():
        await (await pay.kiq(1)).result(LONG)
    assert (attempts, await count(paid)) == ([1, 2], 1)


async def test_a_statement_that_failed_fails_the_task_though_it_was_caught(
    app: TaskQueue, paid: asyncpg.Pool
) -> None:
    """PostgreSQL has aborted the transaction by then: "success" would be wrong."""

    @app.task
    async def pay(order: int) -> str:
        connection = await current_task().transaction()
        await connection.execute(PAY, order)
        try:
            await connection.execute("SELECT 1 / 0")
        except asyncpg.DivisionByZeroError:
            return "paid"
        return "never"

    async with app.worker():
        with pytest.raises(TaskFailed, match="aborted"):
            await (await pay.kiq(1)).result(LONG)
    assert await count(paid) == 0


async def test_arguments_that_postgres_cannot_keep_are_left_out_of_the_outcome(
    app: TaskQueue, paid: asyncpg.Pool
) -> None:
    @app.task
    async def pay(order: int, note: str) -> str:
        await (await current_task().transaction()).execute(PAY, order)
        return "paid"

    async with app.worker():
        assert await (await pay.kiq(1, "\0")).result(LONG) == "paid"
    assert await count(paid) == 1


async def test_a_worker_that_hangs_at_the_commit_delays_another_run_for_one_call_at_most(
    postgres_url: str,
) -> None:
    outcome = Outcome(task_id="pay-1", status=TaskStatus.SUCCESS, result=Raw(b"1"))
    frozen, other = PostgresBackend(postgres_url, timeout=0.2), PostgresBackend(postgres_url)
    await frozen.open()
    await other.open()
    standing = await frozen.begin()
    assert await frozen._store_on(standing.connection, outcome, None)
    second = await other.begin()
    assert await second.commit(outcome, None)
    await until_lost(standing.connection)
    with pytest.raises(BackendUnavailable):
        await standing.commit(outcome, None)
    await standing.roll_back()
    await frozen.close()
    await other.close()


async def test_a_server_that_hangs_at_the_end_delays_no_task(postgres_url: str) -> None:
    backend = PostgresBackend(postgres_url, timeout=0.2)
    outcome = Outcome(task_id="pay-1", status=TaskStatus.SUCCESS, result=Raw(b"1"))
    await backend.open()
    commit, roll_back = await backend.begin(), await backend.begin()
    serving = [one.connection.get_server_pid() for one in (commit, roll_back)]
    for pid in serving:
        os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(LONG):
            with pytest.raises(BackendUnavailable):
                await commit.commit(outcome, None)
            await roll_back.roll_back()
    finally:
        for pid in serving:
            os.kill(pid, signal.SIGCONT)
    await backend.close()


async def test_a_task_that_outlives_its_worker_connects_no_more(postgres_url: str) -> None:
    backend = PostgresBackend(postgres_url)
    await backend.open()
    await (await backend.begin()).roll_back()
    await backend.close()
    with pytest.raises(BackendUnavailable, match="not open"):
        await backend.begin()


async def test_more_tasks_than_connections_take_turns(app: TaskQueue, paid: asyncpg.Pool) -> None:
    @app.task
    async def pay(order: int) -> None:
        await (await current_task().transaction()).execute(PAY, order)

    async with app.worker():
        for handle in await app.kiq_many([pay.s(number) for number in range(200)]):
            await handle.result(LONG)
    assert await count(paid) == 200


async def test_other_result_backends_have_no_transactions() -> None:
    app = TaskQueue("paying", broker="memory://")

    @app.task
    async def pay() -> None:
        await current_task().transaction()

    async with app, app.worker():
        with pytest.raises(TaskFailed, match=r"postgresql://, and not memory://"):
            await (await pay.kiq()).result(LONG)


async def test_a_limit_that_passes_while_writes_are_undone_does_not_hide_the_end(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    roll_back = PostgresTransaction.roll_back

    async def slow(self: PostgresTransaction) -> None:
        try:
            await asyncio.Event().wait()  # until the soft limit
        finally:
            await roll_back(self)

    monkeypatch.setattr(PostgresTransaction, "roll_back", slow)

    @app.task(soft_timeout=0.3)
    async def pay() -> None:
        await current_task().transaction()
        raise ValueError("no money")

    async with app.worker():
        with pytest.raises(TaskFailed, match="no money"):
            await (await pay.kiq()).result(LONG)
        await until_settled(app)


async def test_only_the_coroutine_of_a_task_has_a_transaction(app: TaskQueue) -> None:
    @app.task
    def plain() -> None:
        asyncio.run(current_task().transaction())

    @app.task
    async def split() -> None:
        await asyncio.create_task(current_task().transaction())

    async with app.worker():
        with pytest.raises(TaskFailed, match="only a coroutine task"):
            await (await plain.kiq()).result(LONG)
        with pytest.raises(TaskFailed, match="in the task's own coroutine"):
            await (await split.kiq()).result(LONG)
