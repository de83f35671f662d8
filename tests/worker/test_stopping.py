"""Stopping a worker: running tasks may finish, the rest is released, nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from aiotaskq import ConfigError, TaskQueue, TaskRevoked, TaskStatus, current_task
from aiotaskq.events import Received, Released, Revoked, Started, Succeeded, WorkerReady
from aiotaskq.worker import Worker, fetching
from tests.worker.events import LONG, EventRecorder, until
from tests.worker.outage import Outage, OutageBroker


async def depth(app: TaskQueue) -> tuple[int, int, int, int]:
    depths = await (await app.broker()).depth()
    found = depths.get("default")
    return (0, 0, 0, 0) if found is None else (found.ready, found.delayed, found.held, found.dead)


async def test_running_tasks_finish_and_waiting_ones_stay(app: TaskQueue) -> None:
    gate, begun = asyncio.Event(), asyncio.Event()

    @app.task
    async def job(n: int) -> int:
        begun.set()
        await gate.wait()
        return n

    handles = [await job.kiq(n) for n in range(5)]
    worker = app.worker(concurrency=2, grace_period=LONG)
    async with worker:
        await until(lambda: worker.running == 2)
        worker.stop()
        await asyncio.sleep(0.02)  # the task is cancelled in the next turn of the loop
        gate.set()
    assert [await handle.status() for handle in handles] == ["SUCCESS"] * 2 + ["PENDING"] * 3
    assert await depth(app) == (3, 0, 0, 0)


async def test_after_the_grace_period_the_rest_is_cancelled_and_handed_back(
    app: TaskQueue,
) -> None:
    recorded = EventRecorder(app, Released)
    attempts: list[int] = []
    cleaned_up = False

    @app.task
    async def job() -> str:
        nonlocal cleaned_up
        attempts.append(current_task().attempt)
        if len(attempts) > 1:
            return "done"
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up = True
        raise AssertionError

    async with app.worker(grace_period=0.01) as worker:
        handle = await job.kiq()
        await until(lambda: worker.running == 1)
    assert cleaned_up
    assert [event.message.id for event in recorded.events] == [handle.id]
    assert await handle.status() is TaskStatus.PENDING
    async with app.worker():
        assert await handle.result(LONG) == "done"
    assert attempts == [1, 1]  # it was not counted as an attempt


async def test_a_second_request_skips_the_wait(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        await asyncio.Event().wait()

    async with app.worker(grace_period=3600) as worker:
        await job.kiq()
        await until(lambda: worker.running == 1)
        worker.stop()
        await asyncio.sleep(0.02)
        assert worker.running == 1
        worker.stop(hurry=True)
        await until(lambda: worker.running == 0)
    assert await depth(app) == (1, 0, 0, 0)


async def test_a_task_that_finishes_in_spite_of_its_release_counts(app: TaskQueue) -> None:
    @app.task
    async def stubborn() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "all the same"
        raise AssertionError

    async with app.worker(grace_period=0) as worker:
        handle = await stubborn.kiq()
        await until(lambda: worker.running == 1)
    assert await handle.result(LONG) == "all the same"
    assert await depth(app) == (0, 0, 0, 0)


async def test_a_task_that_swallows_its_cancellation_is_handed_back_all_the_same(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.conf.task_cancel_grace = 0.1
    end = asyncio.Event()
    runs = 0

    @app.task
    async def undying() -> int:
        nonlocal runs
        runs += 1
        while runs == 1 and not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue
        return runs

    worker = app.worker(grace_period=0)
    async with worker:
        handle = await undying.kiq()
        await until(lambda: worker.running == 1)
    assert await depth(app) == (1, 0, 0, 0)
    async with app.worker():
        assert await handle.result(LONG) == 2
        end.set()  # the first run ends now, and its outcome is dropped


async def test_tasks_that_were_not_begun_are_released(app: TaskQueue) -> None:
    app.conf.task_cancel_grace = 0.05
    ran = 0

    @app.task
    def plain() -> None:
        nonlocal ran
        ran += 1
        release.wait(LONG)

    release = threading.Event()
    async with app.worker(threads=1, grace_period=0):
        await app.kiq_many([plain.s() for _ in range(5)])
        await until(lambda: ran == 1)
    release.set()
    assert await depth(app) == (5, 0, 0, 0)
    await asyncio.sleep(0.02)
    assert ran == 1  # the others waited for a thread and got none


async def test_stopping_right_after_the_fetch_loses_nothing(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Received, Started)

    @app.task
    async def job() -> None:
        await asyncio.sleep(0)

    worker = app.worker(grace_period=0)
    app.observers.add(Received, lambda _: worker.stop(hurry=True))
    handles = await app.kiq_many([job.s() for _ in range(50)])
    async with worker:
        await recorded.count(1)
    done = [h for h in handles if await h.status() is TaskStatus.SUCCESS]
    ready, *others = await depth(app)
    assert len(done) + ready == 50
    assert others == [0, 0, 0]


async def test_a_waiting_task_that_is_cancelled_never_starts(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Started)

    @app.task
    async def job() -> None: ...

    @app.task
    async def last() -> int:
        return 1

    handle = await job.kiq()
    delayed = await job.with_options(countdown=3600).kiq()
    await handle.cancel()
    await delayed.cancel()
    async with app.worker():
        assert await (await last.kiq()).result(LONG) == 1
    assert len(recorded.events) == 1
    for each in (handle, delayed):
        with pytest.raises(TaskRevoked):
            await each.result(LONG)
    assert await depth(app) == (0, 0, 0, 0)


@pytest.mark.parametrize("where", ["loop", "thread"])
async def test_a_running_task_that_is_cancelled_ends(app: TaskQueue, where: str) -> None:
    recorded = EventRecorder(app, Revoked, Succeeded)
    begun, leave = threading.Event(), threading.Event()

    async def coroutine() -> None:
        begun.set()
        await asyncio.Event().wait()

    def plain() -> None:
        begun.set()
        leave.wait(LONG)

    job: Any = app.task(plain if where == "thread" else coroutine)
    async with app.worker() as worker:
        handle = await job.kiq()
        await until(begun.is_set)
        await handle.cancel()
        with pytest.raises(TaskRevoked):
            await handle.result(LONG)
        await until(lambda: worker.running == 0)
        leave.set()
    assert recorded.names == ["Revoked"]
    assert await handle.status() is TaskStatus.REVOKED
    assert await depth(app) == (0, 0, 0, 0)


async def test_a_cancelled_task_that_returns_all_the_same_stays_cancelled(app: TaskQueue) -> None:
    @app.task
    async def job() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "no"
        raise AssertionError

    async with app.worker() as worker:
        handle = await job.kiq()
        await until(lambda: worker.running == 1)
        await handle.cancel()
        await until(lambda: worker.running == 0)
    assert await handle.status() is TaskStatus.REVOKED


async def test_a_cancelled_task_that_is_slow_to_end_does_not_come_back_when_the_worker_stops(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.conf.task_cancel_grace = 0.1
    cancelled = asyncio.Event()
    end = asyncio.Event()

    @app.task
    async def job() -> None:
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                cancelled.set()

    async with app.worker(grace_period=0):
        handle = await job.kiq()
        await until(lambda: worker_runs(app))
        await handle.cancel()
        await asyncio.wait_for(cancelled.wait(), LONG)
    end.set()
    assert await handle.status() is TaskStatus.REVOKED
    assert await depth(app) == (0, 0, 0, 0)


def worker_runs(app: TaskQueue) -> bool:
    held = app.drivers()[0].store.depth().get("default")  # type: ignore[attr-defined]  # in memory
    return held is not None and held.held == 1


async def test_a_task_that_ended_stays_as_it_ended(app: TaskQueue) -> None:
    @app.task
    async def job() -> int:
        return 1

    async with app.worker():
        handle = await job.kiq()
        await handle.result(LONG)
        await handle.cancel()
        assert await handle.result(LONG) == 1


async def test_two_workers_share_the_work_and_do_none_twice(app: TaskQueue) -> None:
    runs: list[tuple[int, str]] = []

    @app.task
    async def job(n: int) -> None:
        runs.append((n, current_task().worker))
        await asyncio.sleep(0.001)

    async with app.worker(concurrency=3, name="one"), app.worker(concurrency=3, name="two"):
        handles = await app.kiq_many([job.s(n) for n in range(200)])
        for handle in handles:
            await handle.result(LONG)
    assert sorted(n for n, _ in runs) == list(range(200))
    assert {worker for _, worker in runs} == {"one", "two"}


async def test_queues_are_drained_in_the_order_in_which_they_are_named(app: TaskQueue) -> None:
    order: list[str] = []

    @app.task
    async def job(name: str) -> None:
        order.append(name)

    for name in ("low", "high", "other", "low", "high"):
        await job.with_options(queue=name).kiq(name)
    async with app.worker(queues=["high", "low", "high"], concurrency=1, burst=True) as worker:
        await until(lambda: len(order) == 4)
        assert worker.options.queues == ["high", "low"]
    assert order == ["high", "high", "low", "low"]


async def test_a_burst_ends_when_the_queues_are_empty(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_FETCH_WAIT", 2 * LONG)  # it does not wait for the end of one
    done = 0

    @app.task
    async def child() -> None:
        nonlocal done
        done += 1

    @app.task
    async def job() -> None:
        nonlocal done
        await asyncio.sleep(0.05)
        await child.kiq()
        done += 1

    await app.kiq_many([job.s() for _ in range(10)])
    await asyncio.wait_for(Worker(app, burst=True, concurrency=3).run(), LONG)
    assert done == 20


async def test_a_burst_looks_for_more_while_a_long_task_runs(app: TaskQueue) -> None:
    sent = asyncio.Event()

    @app.task
    async def child() -> None:
        sent.set()

    @app.task
    async def parent() -> None:
        await child.kiq()
        await asyncio.wait_for(sent.wait(), LONG)

    handle = await parent.kiq()
    await asyncio.wait_for(Worker(app, burst=True).run(), LONG)
    await handle.result(LONG)


async def test_a_worker_may_take_only_so_many_tasks(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        await asyncio.sleep(0.001)

    handles = await app.kiq_many([job.s() for _ in range(10)])
    worker = Worker(app, max_tasks=4, concurrency=3)
    await asyncio.wait_for(worker.run(), LONG)
    assert worker.exhausted
    assert [await handle.status() for handle in handles] == ["SUCCESS"] * 4 + ["PENDING"] * 6
    assert await depth(app) == (6, 0, 0, 0)


async def test_a_worker_may_be_made_before_there_is_a_loop() -> None:
    app = TaskQueue("app", broker="memory://")
    worker = await asyncio.get_running_loop().run_in_executor(None, app.worker)

    @app.task
    async def job() -> int:
        return 1

    async with worker:
        assert await (await job.kiq()).result(LONG) == 1
    await app.close()


async def test_a_worker_lives_once(app: TaskQueue) -> None:
    worker = app.worker()
    async with worker:
        pass
    with pytest.raises(RuntimeError, match="lives once"):
        async with worker:
            raise AssertionError("it was entered")


async def test_a_worker_that_is_cancelled_while_it_starts_leaves_nothing() -> None:
    outage = Outage()
    app = TaskQueue("app", broker=OutageBroker(outage))
    begun = asyncio.Event()

    @app.on_startup
    async def up(state: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def embed() -> None:
        async with app.worker():
            raise AssertionError("it was entered")

    embedding = asyncio.create_task(embed())
    await asyncio.wait_for(begun.wait(), LONG)
    embedding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await embedding


async def test_a_worker_whose_asyncio_task_is_cancelled_releases_its_tasks(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        await asyncio.Event().wait()

    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    await job.kiq()
    await until(lambda: worker.running == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await depth(app) == (1, 0, 0, 0)


async def test_the_queue_is_served_when_the_worker_says_that_it_is_ready(app: TaskQueue) -> None:
    recorded = EventRecorder(app, WorkerReady)
    async with app.worker(name="me"):
        (event,) = await recorded.count(1)
    assert event.worker == "me"


def test_options_out_of_range_are_refused() -> None:

    app = TaskQueue("app", broker="memory://")
    with pytest.raises(ConfigError, match="concurrency is 0"):
        app.worker(concurrency=0)
    with pytest.raises(ConfigError, match="threads is 0"):
        app.worker(threads=0)
    with pytest.raises(ConfigError, match="grace period"):
        app.worker(grace_period=-1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("concurrency", "5"),
        ("concurrency", 2.5),
        ("concurrency", True),
        ("threads", "many"),
        ("grace_period", "long"),
        ("grace_period", float("nan")),
        ("burst", "yes"),
        ("name", ""),
        ("name", 5),
        ("queues", "default"),
        ("queues", []),
        ("queues", 5),
        ("queues", [5]),
        ("queues", ["a,b"]),
        ("queues", {"a": "1"}),
        ("queues", {"a": 0}),
    ],
)
def test_a_wrong_option_of_a_worker_is_refused_where_it_is_given(option: str, value: Any) -> None:
    app = TaskQueue("app", broker="memory://")
    with pytest.raises(ConfigError, match="queue" if option == "queues" else option[:5]):
        app.worker(**{option: value})
    with pytest.raises(TypeError, match="colour"):
        Worker(app, colour="red")  # type: ignore[call-arg]  # that is the point
