"""End-to-end cases over every pair of broker and result backend."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aiotaskq import (
    ConfigError,
    Retry,
    TaskFailed,
    TaskQueue,
    TaskRevoked,
    TaskStatus,
    current_task,
)
from aiotaskq.contract.records import Depth
from aiotaskq.worker import Worker
from tests.worker.events import LONG, until

pytestmark = pytest.mark.timeout(400)

Make = Callable[..., TaskQueue]


def _memory(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    return "memory://", None


def _sqlite(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    folder: Path = request.getfixturevalue("tmp_path")
    return f"sqlite:///{folder}/queue.db", None


def _redis(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    return request.getfixturevalue("redis_url"), None


def _redis_and_postgres(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    return request.getfixturevalue("redis_url"), request.getfixturevalue("postgres_url")


_PAIRS = {
    "memory": _memory,
    "sqlite": _sqlite,
    "redis": pytest.param(_redis, marks=pytest.mark.server),
    "redis-postgres": pytest.param(_redis_and_postgres, marks=pytest.mark.server),
}


@pytest.fixture(params=list(_PAIRS.values()), ids=list(_PAIRS))
def made(request: pytest.FixtureRequest) -> TaskQueue:
    broker, backend = request.param(request)
    app = TaskQueue("matrix", broker=broker, backend=backend)
    app.drivers()  # imports the drivers, which would block the loop of the test
    return app


@pytest.fixture
async def app(made: TaskQueue) -> AsyncIterator[TaskQueue]:
    yield made
    await made.close()


async def empty(app: TaskQueue) -> bool:
    depths = await (await app.broker()).depth()
    return not any(d.ready or d.delayed or d.held for d in depths.values())


async def test_values_come_back(app: TaskQueue) -> None:
    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    @app.task
    def greet(name: str) -> dict[str, Any]:
        return {"hello": name, "n": None, "list": [1, 2.5, "ü", "\N{SNOWMAN}"]}

    async with app.worker():
        assert await (await add.kiq(2, 8)).result(LONG) == 10
        handle = await greet.kiq("you")
        expected = {"hello": "you", "n": None, "list": [1, 2.5, "ü", "\N{SNOWMAN}"]}
        assert await handle.result(LONG) == expected
        outcome = await handle.wait(LONG)
        assert outcome.name == greet.name
        assert outcome.queue == "default"
        assert outcome.worker is not None
        assert outcome.date_done is not None
        assert abs(datetime.now(UTC) - outcome.date_done) < timedelta(minutes=5)
    assert await empty(app)


async def test_many_at_once(app: TaskQueue) -> None:
    @app.task
    async def square(x: int) -> int:
        return x * x

    async with app.worker(concurrency=50):
        handles = await app.kiq_many([square.s(n) for n in range(500)])
        values = await asyncio.gather(*(handle.result(LONG) for handle in handles))
    assert values == [n * n for n in range(500)]
    assert await empty(app)


async def test_large_payloads_pass_both_ways(app: TaskQueue) -> None:
    @app.task
    async def echo(data: str) -> str:
        return data

    data = "x" * 900_000
    async with app.worker():
        assert await (await echo.kiq(data)).result(LONG) == data


async def test_a_failure_is_raised_at_the_caller(app: TaskQueue) -> None:
    @app.task
    async def divide(x: int, y: int) -> float:
        return x / y

    async with app.worker():
        with pytest.raises(ZeroDivisionError) as caught:
            await (await divide.kiq(1, 0)).result(LONG)
    assert isinstance(caught.value, TaskFailed)
    assert caught.value.remote_traceback is not None
    assert "return x / y" in caught.value.remote_traceback


async def test_a_status_that_changes_within_one_batch(app: TaskQueue) -> None:
    @app.task(track_started=True)
    async def quick() -> int:
        return 1

    async with app.worker():
        handles = await app.kiq_many([quick.s() for _ in range(20)])
        for handle in handles:
            assert await handle.result(LONG) == 1
            assert await handle.status() is TaskStatus.SUCCESS


async def test_attempts_until_success(app: TaskQueue) -> None:
    @app.task(retry=Retry(max_attempts=4, delay=0.01))
    async def job() -> int:
        if current_task().attempt < 3:
            raise OSError("not yet")
        return current_task().attempt

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert outcome.return_value == outcome.attempts == 3
    assert await empty(app)


async def test_a_delayed_task_waits_in_the_store(app: TaskQueue) -> None:
    @app.task
    async def job() -> float:
        return datetime.now(UTC).timestamp()

    due = datetime.now(UTC) + timedelta(seconds=1)
    handle = await job.with_options(eta=due).kiq()
    assert (await (await app.broker()).depth())["default"].delayed == 1
    async with app.worker():
        assert await handle.result(LONG) >= due.timestamp() - 0.01


async def test_priorities_and_queues(app: TaskQueue) -> None:
    order: list[str] = []

    @app.task
    async def job(name: str) -> None:
        order.append(name)

    for queue, priority in (("b", 0), ("b", 9), ("a", 3), ("a", 7)):
        await job.with_options(queue=queue, priority=priority).kiq(f"{queue}{priority}")
    async with app.worker(queues=["a", "b"], concurrency=1):
        await until(lambda: len(order) == 4)
    assert order == ["a7", "a3", "b9", "b0"]


async def test_an_id_of_ones_own_is_stored_once(app: TaskQueue) -> None:
    runs = 0

    @app.task
    async def job() -> int:
        nonlocal runs
        runs += 1
        return runs

    async with app.worker():
        first = await job.with_options(task_id="mine").kiq()
        assert await first.result(LONG) == 1
        again = await job.with_options(task_id="mine").kiq()
        assert await again.result(LONG) == 1
        await (await job.kiq()).result(LONG)
    assert runs == 2


async def test_a_cancelled_id_that_is_sent_again_after_its_result_lapsed_is_revoked(
    app: TaskQueue,
) -> None:
    @app.task
    async def job() -> None: ...

    await app.handle("mine").cancel()
    await app.forget("mine")  # results lapse after a day, cancelled ids after a week
    again = await job.with_options(task_id="mine").kiq()
    with pytest.raises(TaskRevoked):
        await again.result(LONG)
    async with app.worker():  # and the other tasks run
        await (await job.with_options(task_id="other").kiq()).result(LONG)


async def test_the_value_of_a_task_without_results_is_refused_at_once(app: TaskQueue) -> None:
    @app.task(ignore_result=True)
    async def job() -> int:
        return 1

    handle = await job.kiq()
    for call in (handle.result(), handle.wait(LONG), handle.result(0)):
        with pytest.raises(ConfigError, match=r"job keeps no results.*ignore_result=False"):
            await call
    await handle.cancel()
    with pytest.raises(TaskRevoked):  # this outcome is there
        await handle.result()
    unset = await app.send("elsewhere")
    with pytest.raises(TimeoutError):
        await unset.result(0.01)
    app.conf.task_ignore_result = True  # of this process; the task is registered in another one
    with pytest.raises(TimeoutError):
        await unset.result(0.01)

    @app.task(name="elsewhere")
    async def elsewhere() -> None: ...

    with pytest.raises(ConfigError, match="elsewhere keeps no results"):
        await unset.result()


async def test_cancelling_waiting_running_and_ended_tasks(app: TaskQueue) -> None:
    begun: list[str] = []

    @app.task
    async def job(name: str) -> str:
        begun.append(name)
        if name == "long":
            await asyncio.Event().wait()
        return name

    waiting = await job.with_options(countdown=3600).kiq("waiting")
    ready = await job.kiq("ready")
    await waiting.cancel()
    await ready.cancel()
    async with app.worker() as worker:
        long = await job.kiq("long")
        await until(lambda: begun == ["long"])
        await long.cancel()
        for handle in (waiting, ready, long):
            with pytest.raises(TaskRevoked):
                await handle.result(LONG)
        await until(lambda: worker.running == 0)
        ended = await job.kiq("short")
        assert await ended.result(LONG) == "short"
        await ended.cancel()
        assert await ended.result(LONG) == "short"
    assert begun == ["long", "short"]
    # A driver may keep a cancelled message until it falls due.
    depth = (await (await app.broker()).depth()).get("default", Depth())
    assert (depth.ready, depth.held, depth.dead) == (0, 0, 0)


async def test_a_released_task_runs_on_another_worker_as_the_same_attempt(app: TaskQueue) -> None:
    attempts: list[int] = []

    @app.task
    async def job() -> int:
        attempts.append(current_task().attempt)
        if len(attempts) == 1:
            await asyncio.Event().wait()
        return 1

    async with app.worker(grace_period=0) as worker:
        handle = await job.kiq()
        await until(lambda: worker.running == 1)
    async with app.worker():
        assert await handle.result(LONG) == 1
    assert attempts == [1, 1]


async def test_messages_that_cannot_run_are_kept(app: TaskQueue) -> None:
    app.conf.unknown_task_ttl = 0.1

    @app.task
    async def typed(x: int) -> None: ...

    unknown = await app.send("nobody.knows", (1,))
    sender = TaskQueue("sender", broker=app.drivers()[0])
    wrong = await sender.send(typed.name, ("x",))
    async with app.worker():
        assert (await unknown.wait(LONG)).is_err
        error = (await app.handle(wrong.id).wait(LONG)).error
        assert isinstance(error, TaskFailed)
        assert error.exc_type == "DecodeError"
    (letter,) = await (await app.broker()).dead("default")
    assert letter.id == unknown.id
    await sender.close()


async def test_two_workers_do_no_task_twice(app: TaskQueue) -> None:
    runs: list[int] = []

    @app.task
    async def job(n: int) -> None:
        runs.append(n)

    handles = await app.kiq_many([job.s(n) for n in range(200)])
    async with app.worker(concurrency=5), app.worker(concurrency=5):
        for handle in handles:
            await handle.result(LONG)
    assert sorted(runs) == list(range(200))


async def test_a_burst_empties_the_queues(app: TaskQueue) -> None:
    @app.task
    async def job(n: int) -> int:
        return n

    handles = await app.kiq_many([job.s(n) for n in range(30)])
    await asyncio.wait_for(Worker(app, burst=True, concurrency=7).run(), LONG)
    assert [await handle.result(LONG) for handle in handles] == list(range(30))
    assert await empty(app)


async def test_plain_code_sends_and_waits_from_any_thread(app: TaskQueue) -> None:
    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    found: list[int] = []

    def script() -> None:
        from aiotaskq import bridge

        found.append(add.delay(2, 8).get(timeout=LONG))
        bridge.stop()  # as a script does when it exits

    async with app.worker():
        thread = threading.Thread(target=script)
        thread.start()
        await until(lambda: not thread.is_alive())
    assert found == [10]
