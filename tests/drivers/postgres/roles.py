"""Programs of each kind, for the tests of the rights that their users need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
import pytest

from aiotaskq import Reject, Retry, Schedule, TaskQueue, current_task
from aiotaskq.contract.message import Envelope
from aiotaskq.errors import TaskFailed, TaskRevoked

PATIENCE = 120.0
Scenario: TypeAlias = Callable[[str, str], Awaitable[None]]
"""Takes the URL of a user of the kind, and that of one with all rights."""


def application(url: str, **settings: Any) -> TaskQueue:
    app = TaskQueue("tasks", broker=url, **settings)

    @app.task(name="add")
    async def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="fail", retry=Retry(max_attempts=2, delay=0.01))
    async def fail() -> None:
        raise ValueError("no")

    @app.task(name="reject")
    async def reject() -> None:
        raise Reject

    @app.task(name="slow")
    async def slow() -> None:
        await asyncio.Event().wait()

    @app.task(name="parent")
    async def parent() -> str:
        child = await app.tasks["add"].kiq(1, 1)
        return child.id

    @app.task(name="pay")
    async def pay() -> int:
        connection = await current_task().transaction()
        return int(await connection.fetchval("SELECT 1"))

    return app


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[TaskQueue]:
    async with asyncio.timeout(PATIENCE), application(url, **settings) as app:
        yield app


async def send_all_kinds(app: TaskQueue) -> None:
    add = app.tasks["add"]
    await add.kiq(1, 2)
    await add.with_options(countdown=60).kiq(1, 2)
    await add.with_options(task_id="mine").kiq(1, 2)
    await add.with_options(priority=9, expires=60).kiq(1, 2)
    await app.kiq_many([add.s(1, 2), add.s(3, 4)])
    await app.send("unknown", queue="other")
    broker = await app.broker()
    for _ in "12":
        await broker.publish([Envelope(id="u", queue="q", body=b"", unique=True)], call_id="c")


async def sender(url: str, owner: str) -> None:
    async with opened(owner) as other:
        consumer = (await other.broker()).consumer(["default"], name="w", lease=60)
        await consumer.open()
        waiting = asyncio.create_task(consumer.fetch(1, PATIENCE))
        await asyncio.sleep(0.05)
        async with opened(url, result_backend="disabled://") as app:
            await send_all_kinds(app)
            assert await waiting
            connection = await asyncpg.connect(url)
            async with connection.transaction():
                await app.tasks["add"].with_options(connection=connection).kiq(1, 2)
            await connection.close()
        await consumer.close()


async def reader(url: str, owner: str) -> None:
    async with opened(owner) as app, opened("memory://", result_backend=url) as reading:
        handle = await app.tasks["add"].kiq(1, 2)
        waiting = asyncio.create_task(reading.handle(handle.id).result())
        async with app.worker():
            assert await waiting == 3
        assert await reading.handle(handle.id).result() == 3


async def client(url: str, owner: str) -> None:
    await sender(url, owner)
    async with opened(owner) as app, opened(url) as calling:
        waiting = await calling.tasks["add"].with_options(countdown=60).kiq(1, 2)
        async with app.worker(queues=["default", "other"]):
            handle = await calling.tasks["add"].kiq(1, 2)
            assert await handle.result() == 3
            await handle.status()
            await handle.forget()
            slow = await calling.tasks["slow"].kiq()
            await slow.cancel()
            broker = await calling.broker()
            await broker.cancel([waiting.id], running=False)
            with pytest.raises(TaskRevoked):
                await slow.result()


async def worker(url: str, owner: str) -> None:
    await client(url, owner)
    async with opened(owner) as calling, opened(url, dead_letter_max=1) as app:
        waiting = await calling.tasks["add"].with_options(countdown=0.2).kiq(1, 2)
        dead = (await calling.broker()).consumer(["default"], name="dead", lease=0.01)
        await dead.open()
        await calling.tasks["add"].kiq(1, 2)
        await dead.fetch(1, 0)
        async with app.worker(queues=["default", "other"], name="w"):
            assert await waiting.result() == 3
            for _ in "12":
                with pytest.raises(TaskFailed):
                    await (await calling.tasks["fail"].kiq()).result()
                with pytest.raises(TaskFailed):
                    await (await calling.tasks["reject"].kiq()).result()
            child = await (await calling.tasks["parent"].kiq()).result()
            assert await calling.handle(str(child)).result() == 2
            assert await (await calling.tasks["pay"].kiq()).result() == 1
            slow = await calling.tasks["slow"].kiq()
            await slow.cancel()
            await app.workers()
            while await app.dead.count() > 1:  # until the worker has trimmed them
                await asyncio.sleep(0.01)
        broker = await app.broker()
        own = broker.consumer(["r"], name="r", lease=60)
        await own.open()
        lease = broker.lease(own.grant)
        await lease.renew()
        await broker.publish([Envelope(id=one, queue="r", body=b"") for one in "ab"])
        await own.fetch(1, 0)
        await lease.end("killed")
        await lease.close()
        await own.close()


async def scheduler(url: str, owner: str) -> None:
    async with opened(owner) as app, opened(url) as timer:
        await app.schedules.add("often", "add", Schedule(0.1, args=[1, 2], overlap="skip"))
        broker = await app.broker()
        async with timer.scheduler():
            while not (await broker.depth()).get("default"):
                await asyncio.sleep(0.01)
        async with app.worker(), timer.scheduler():
            while (await app.schedules.get("often")).runs < 3:  # type: ignore[union-attr]  # it is there
                await asyncio.sleep(0.01)
        await app.schedules.remove("often")


async def operator(url: str, owner: str) -> None:
    async with opened(owner, unknown_task_ttl=0) as other, opened(url) as app:
        for name in "abc":
            await (await other.broker()).publish([Envelope(id=name, queue="default", body=b"{")])
        await other.worker(burst=True).run()
        broker = await app.broker()
        await broker.depth()
        await app.workers()
        assert len(await app.dead.list()) >= 3
        assert await app.dead.count(reason="not") >= 3
        assert await app.dead.discard(id=["a"]) == 1
        assert await app.dead.retry(id=["b"]) == 1
        await app.dead.discard(everything=True)
        await app.tasks["add"].kiq(1, 2)
        assert await broker.purge("default")
        await app.schedules.add("s", "add", Schedule(60, args=[1, 2]))
        assert await app.schedules.list()
        await app.schedules.pause("s")
        await app.schedules.resume("s")
        await app.schedules.run_now("s")
        assert await app.schedules.remove("s")
        await broker.purge("default")
    await client(url, owner)


SCENARIOS: Mapping[str, Scenario] = {
    "sender": sender,
    "reader": reader,
    "client": client,
    "worker": worker,
    "scheduler": scheduler,
    "operator": operator,
}
