"""Redis and PostgreSQL servers that are stopped and started while tasks run."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiotaskq import TaskQueue
from aiotaskq.events import Refused, Started
from tests.servers import PostgresServer, RedisServer
from tests.worker.events import EventRecorder, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]
AGAIN = 60.0  # seconds for a restart, and for the pauses between attempts to connect


@pytest.fixture
def over_redis(redis_url: str) -> TaskQueue:
    app = TaskQueue("app", broker=redis_url)
    app.drivers()  # imports the drivers, which would block the loop of the test
    return app


@pytest.fixture
def over_both(redis_url: str, postgres_url: str) -> TaskQueue:
    app = TaskQueue("app", broker=redis_url, backend=postgres_url)
    app.drivers()
    return app


async def test_tasks_that_end_while_redis_is_stopped_are_stored_after_its_start(
    over_redis: TaskQueue, redis_server: RedisServer
) -> None:
    app = over_redis
    recorded = EventRecorder(app, Refused, Started)
    gate, thread_gate = asyncio.Event(), threading.Event()

    @app.task
    async def job(n: int) -> int:
        await gate.wait()
        return n

    @app.task
    def plain(n: int) -> int:
        assert thread_gate.wait(AGAIN)
        return n

    async with app.worker() as worker:
        handles = await app.kiq_many([job.s(n) for n in range(5)])
        handles += await app.kiq_many([plain.s(n) for n in range(5, 8)])
        await until(lambda: worker.running == 8)
        await asyncio.to_thread(redis_server.kill)
        gate.set()
        thread_gate.set()
        await until(lambda: worker.running == 0)
        await asyncio.to_thread(redis_server.start)
        assert [await handle.result(AGAIN) for handle in handles] == list(range(8))
        assert await (await job.kiq(9)).result(AGAIN) == 9
    assert recorded.names == ["Started"] * 9
    await app.close()


async def test_a_worker_ends_while_redis_is_stopped(
    over_redis: TaskQueue, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.worker.incarnation._STORE_WAIT", 0.5)
    app = over_redis

    @app.task
    async def job() -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(AGAIN):
        async with app.worker(grace_period=0) as worker:
            await job.kiq()
            await until(lambda: worker.running == 1)
            await asyncio.to_thread(redis_server.kill)
        await app.close()


async def test_results_are_stored_after_the_start_of_the_database(
    over_both: TaskQueue, postgres_server: PostgresServer
) -> None:
    app = over_both
    recorded = EventRecorder(app, Refused, Started)
    gate = asyncio.Event()

    @app.task
    async def job(n: int) -> int:
        await gate.wait()
        return n

    async with app.worker() as worker:
        handles = await app.kiq_many([job.s(n) for n in range(5)])
        await until(lambda: worker.running == 5)
        await asyncio.to_thread(postgres_server.kill)
        gate.set()
        await until(lambda: worker.running == 0)
        await asyncio.to_thread(postgres_server.start)
        assert [await handle.result(AGAIN) for handle in handles] == list(range(5))
    assert recorded.names == ["Started"] * 5
    await app.close()
