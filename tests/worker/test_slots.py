"""Threads as slots: a worker keeps only tasks that it can start, and the others go elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from aiotaskq import TaskQueue, TaskStatus, current_task
from aiotaskq.events import Received, Revoked, WorkerStopped
from aiotaskq.worker import Worker, fetching
from tests.worker.events import LONG, EventRecorder, until


class Gate:
    """A gate for functions in threads, and the names and numbers of those that have come to it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.came: list[tuple[str, int]] = []

    def enter(self, number: int) -> None:
        self.came.append((current_task().worker, number))
        self.open.wait(LONG)

    @property
    def numbers(self) -> list[int]:
        return [number for _, number in self.came]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


async def test_what_a_worker_cannot_start_is_run_by_another_one(app: TaskQueue, gate: Gate) -> None:
    @app.task
    def job(number: int) -> None:
        gate.enter(number)

    async with app.worker(name="a", threads=2), app.worker(name="b", threads=2):
        handles = await app.kiq_many([job.s(number) for number in range(12)])
        await until(lambda: len(gate.came) == 4)
        assert sorted(name for name, _ in gate.came) == ["a", "a", "b", "b"]
        gate.open.set()
        for handle in handles:
            assert (await handle.wait(LONG)).status is TaskStatus.SUCCESS
    assert sorted(gate.numbers) == list(range(12))  # each of them once


async def test_a_task_of_a_higher_priority_starts_before_those_that_wait(
    app: TaskQueue, gate: Gate
) -> None:
    @app.task
    def job(number: int) -> None:
        gate.enter(number)

    async with app.worker(threads=1):
        handles = await app.kiq_many([job.s(number) for number in range(6)])
        await until(lambda: gate.numbers == [0])
        handles.append(await job.with_options(priority=9).kiq(9))
        await asyncio.sleep(0.2)  # they have waited for longer than they are held
        gate.open.set()
        for handle in handles:
            await handle.wait(LONG)
    assert gate.numbers == [0, 9, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("queue", ["default", "other"])
async def test_coroutines_flow_while_all_threads_are_busy(
    app: TaskQueue, gate: Gate, queue: str
) -> None:
    @app.task
    def job(number: int) -> None:
        gate.enter(number)

    @app.task
    async def quick(number: int) -> int:
        return number

    async with app.worker(threads=1, queues=["default", "other"]):
        await app.kiq_many([job.s(number) for number in range(30)])
        await until(lambda: gate.numbers == [0])
        for size in (1, 500):
            batch = [quick.with_options(queue=queue).s(number) for number in range(size)]
            handles = await app.kiq_many(batch)
            assert [await handle.result(LONG) for handle in handles] == list(range(size))
        assert gate.numbers == [0]
        gate.open.set()
        await until(lambda: len(gate.came) == 30)
    assert gate.numbers == list(range(30))


async def test_tasks_that_were_not_started_are_handed_back_at_once(
    app: TaskQueue, gate: Gate
) -> None:
    @app.task
    def job(number: int) -> None:
        gate.enter(number)

    recorded = EventRecorder(app, Received)
    first = Worker(app, name="a", threads=1, grace_period=LONG)
    running = asyncio.create_task(first.run())
    handles = await app.kiq_many([job.s(number) for number in range(8)])
    await until(lambda: gate.numbers == [0])
    first.stop()
    async with app.worker(name="b", threads=7):
        await until(lambda: len(gate.came) == 8)  # while the first one goes on
        assert not running.done()
        assert sorted(gate.came[1:]) == [("b", number) for number in range(1, 8)]
        gate.open.set()
        for handle in handles:
            assert (await handle.wait(LONG)).attempts == 1
        await running
    assert len(recorded.events) == 8  # those that were handed back were never received


async def test_a_task_that_is_cancelled_while_it_waits_never_starts(
    app: TaskQueue, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_HOLD", LONG)
    recorded = EventRecorder(app, Revoked)

    @app.task
    def job(number: int) -> None:
        gate.enter(number)

    async with app.worker(threads=1):
        handles = await app.kiq_many([job.s(number) for number in range(3)])
        await until(lambda: gate.numbers == [0])
        await handles[1].cancel()
        await recorded.count(1)
        assert await handles[1].status() is TaskStatus.REVOKED
        gate.open.set()
        await handles[2].result(LONG)
    assert gate.numbers == [0, 2]


async def test_a_worker_takes_as_many_tasks_as_it_may_and_starts_all_of_them(
    app: TaskQueue, gate: Gate
) -> None:
    @app.task
    def job(number: int) -> None:
        gate.enter(number)

    stopped = EventRecorder(app, WorkerStopped)
    await app.kiq_many([job.s(number) for number in range(6)])
    worker = Worker(app, threads=1, max_tasks=3)
    running = asyncio.create_task(worker.run())
    await until(lambda: gate.numbers == [0])
    await asyncio.sleep(0.2)  # the others were handed back, and count no more
    gate.open.set()
    async with asyncio.timeout(LONG):
        await running
    assert gate.numbers == [0, 1, 2]
    assert worker.exhausted
    assert stopped.names == ["WorkerStopped"]


async def test_a_burst_ends_when_all_have_run(app: TaskQueue) -> None:
    ran: list[int] = []

    @app.task
    def job(number: int) -> None:
        threading.Event().wait(0.03)
        ran.append(number)

    await app.kiq_many([job.s(number) for number in range(20)])
    async with asyncio.timeout(LONG):
        await app.worker(threads=2, burst=True).run()
    assert sorted(ran) == list(range(20))
