"""Running tasks: concurrency, threads, arguments, contexts and results."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from aiotaskq import (
    Retry,
    TaskFailed,
    TaskQueue,
    TaskStatus,
    current_task,
)
from aiotaskq.events import Succeeded
from tests.worker.events import LONG, EventRecorder, until


async def test_coroutines_run_concurrently_up_to_the_limit_and_not_beyond(app: TaskQueue) -> None:
    now = most = 0
    full = asyncio.Event()
    gate = asyncio.Event()

    @app.task
    async def job() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 4:
            full.set()
        await gate.wait()
        now -= 1

    handles = [await job.kiq() for _ in range(10)]
    async with app.worker(concurrency=4) as worker:
        await asyncio.wait_for(full.wait(), LONG)
        await asyncio.sleep(0.05)  # a fifth task would have begun by now
        assert worker.running == now == 4
        gate.set()
        for handle in handles:
            await handle.result(LONG)
    assert most == 4


async def test_a_plain_function_runs_in_a_thread_and_blocks_no_other_task(app: TaskQueue) -> None:
    entered, leave = threading.Event(), threading.Event()

    @app.task
    def block() -> str:
        entered.set()
        assert leave.wait(LONG)
        return threading.current_thread().name

    @app.task
    async def free() -> str:
        return threading.current_thread().name

    async with app.worker():
        blocked = await block.kiq()
        await until(entered.is_set)
        assert await (await free.kiq()).result(LONG) == threading.main_thread().name
        leave.set()
        assert (await blocked.result(LONG)).startswith("aiotaskq-thread")


async def test_plain_functions_share_the_threads_that_there_are(app: TaskQueue) -> None:
    lock = threading.Lock()
    now = most = 0

    @app.task
    def job() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    async with app.worker(threads=2):
        handles = await app.kiq_many([job.s() for _ in range(20)])
        for handle in handles:
            await handle.result(LONG)
    assert most == 2


async def test_a_timeout_begins_when_the_function_does_and_not_while_it_waits_for_a_thread(
    app: TaskQueue,
) -> None:
    @app.task(timeout=0.5)
    def job() -> None:
        time.sleep(0.2)

    async with app.worker(threads=1):
        handles = await app.kiq_many([job.s() for _ in range(6)])
        for handle in handles:
            outcome = await handle.wait(LONG)
            assert outcome.error is None
            assert outcome.execution_time is not None
            assert outcome.execution_time < 0.5


async def test_each_task_has_a_context_of_its_own(app: TaskQueue) -> None:
    both = asyncio.Barrier(2)

    @app.task
    async def job(x: int) -> list[Any]:
        before = current_task()
        await both.wait()  # the other run has entered its context as well
        assert current_task() is before
        context = current_task()
        return [context.id, context.args, context.attempt, context.retries, dict(context.headers)]

    @app.task
    def plain() -> list[Any]:
        context = current_task()
        return [context.id, context.name, context.queue, context.priority, context.worker]

    async with app.worker(name="w"):
        one = await job.with_options(headers={"who": "one"}).kiq(1)
        two = await job.with_options(headers={"who": "two"}).kiq(2)
        assert await one.result(LONG) == [one.id, (1,), 1, 0, {"who": "one"}]
        assert await two.result(LONG) == [two.id, (2,), 1, 0, {"who": "two"}]
        third = await plain.with_options(priority=3).kiq()
        assert await third.result(LONG) == [third.id, plain.name, "default", 3, "w"]
    with pytest.raises(RuntimeError, match="no task runs here"):
        current_task()


async def test_arguments_arrive_as_annotated(app: TaskQueue) -> None:
    @app.task
    async def kinds(a: UUID, b: datetime, *more: int, c: set[int]) -> list[str]:
        return [type(x).__name__ for x in (a, b, more, c)]

    async with app.worker():
        handle = await kinds.kiq(UUID(int=1), datetime.now(UTC), 1, 2, c={3})
        assert await handle.result(LONG) == ["UUID", "datetime", "tuple", "set"]


async def test_arguments_that_do_not_fit_fail_the_task_before_it_runs(app: TaskQueue) -> None:
    ran = False

    @app.task(retry=Retry(max_attempts=5, delay=0))
    async def job(x: int) -> None:
        nonlocal ran
        ran = True

    @app.task
    async def fine() -> int:
        return 1

    async with app.worker():
        sender = TaskQueue("other", broker=app.drivers()[0])
        wrong = await sender.send(job.name, ("no number",))
        many = await sender.send(job.name, (1, 2))
        for handle in (wrong, many):
            outcome = await app.handle(handle.id).wait(LONG)
            assert isinstance(outcome.error, TaskFailed)
            assert outcome.error.exc_type == "DecodeError"
            assert outcome.attempts == 1
        assert await (await fine.kiq()).result(LONG) == 1
        await sender.close()
    assert not ran


async def test_a_class_that_fails_while_it_is_built_fails_its_task_and_not_the_worker(
    app: TaskQueue,
) -> None:
    async with app.worker():
        handle = await app.send(explosive.name, ({"x": 1},))
        app.tasks[explosive.name] = explosive
        outcome = await handle.wait(LONG)
        assert outcome.is_err
        assert (await (await app.broker()).depth()) == {}


@dataclasses.dataclass
class Exploding:
    x: int

    def __post_init__(self) -> None:
        raise KeyError("no such thing")


_other = TaskQueue("other", broker="memory://")


@_other.task
async def explosive(x: Exploding) -> None:
    raise AssertionError("it ran")


async def test_an_ignored_result_is_not_kept(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Succeeded)

    @app.task(ignore_result=True)
    async def silent() -> int:
        return 1

    @app.task
    async def loud() -> int:
        return 2

    async with app.worker():
        handle = await silent.kiq()
        await recorded.count(1)
        assert await (await loud.kiq()).result(LONG) == 2
    assert await handle.status() is TaskStatus.PENDING


async def test_a_running_task_may_be_told_apart_from_a_waiting_one(app: TaskQueue) -> None:
    gate = asyncio.Event()

    @app.task(track_started=True)
    async def job() -> None:
        await gate.wait()

    async with app.worker():
        handle = await job.kiq()
        async with asyncio.timeout(LONG):
            while await handle.status() is not TaskStatus.STARTED:
                await asyncio.sleep(0.001)
        gate.set()
        await handle.result(LONG)
        assert await handle.status() is TaskStatus.SUCCESS


async def test_a_result_without_a_form_fails_the_task_and_nothing_else(app: TaskQueue) -> None:
    app.conf.max_result_size = 1000

    @app.task
    async def odd() -> object:
        return object()

    @app.task
    def large() -> str:
        return "x" * 2000

    @app.task
    async def fine() -> int:
        return 1

    async with app.worker():
        for job, kind in (
            (odd, "EncodeError"),
            (large, "PayloadTooLarge"),
        ):
            error = (await (await job.kiq()).wait(LONG)).error
            assert isinstance(error, TaskFailed)
            assert error.exc_type == kind
        assert await (await fine.kiq()).result(LONG) == 1


async def test_arguments_in_messagepack_that_json_cannot_show_fail_nothing() -> None:
    app = TaskQueue("app", broker="memory://", task_serializer="msgpack", result_extended=True)

    @app.task
    async def job(x: dict[tuple[int, int], int]) -> int:
        return len(x)

    @app.task
    async def simple(x: int) -> int:
        return x

    async with app.worker():
        odd = await app.send(job.name, ({(1, 2): 3},))
        assert (await odd.wait(LONG)).error is None
        handle = await simple.kiq(4)
        assert await handle.result(LONG) == 4
        outcome = await app.load_outcome(handle.id)
        assert outcome is not None
        assert bytes(outcome.args) == b"[4]"  # type: ignore[arg-type]  # it was asked for
    await app.close()


async def test_the_same_id_may_run_twice_at_once(app: TaskQueue) -> None:
    # For example sent again by hand, or reclaimed from a living worker.
    gate = asyncio.Event()
    running = 0

    @app.task
    async def job() -> None:
        nonlocal running
        running += 1
        await gate.wait()

    async with app.worker() as worker:
        handle = await job.kiq()
        await until(lambda: running == 1)
        broker = await app.broker()
        envelopes: list[Any] = []
        original = broker.publish

        async def publish(batch: Any, *, call_id: str | None = None) -> Any:
            envelopes.extend(batch)
            return await original(batch, call_id=call_id)

        broker.publish = publish  # type: ignore[method-assign]  # a spy
        other = await job.kiq()
        await until(lambda: running == 2)
        from msgspec.structs import replace

        body = envelopes[0].body.replace(other.id.encode(), handle.id.encode())
        await original([replace(envelopes[0], id=handle.id, body=body)])
        await until(lambda: running == 3)
        assert worker.running == 3
        await handle.cancel()  # both runs
        await until(lambda: worker.running == 1)
        gate.set()
        await other.result(LONG)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_ten_thousand_tasks_sleep_at_once(app: TaskQueue) -> None:
    @app.task
    async def nap() -> None:
        await asyncio.sleep(1)

    handles = await app.kiq_many([nap.s() for _ in range(10_000)])
    began = time.monotonic()
    async with app.worker(concurrency=10_000):
        await asyncio.gather(*(handle.result(1000) for handle in handles))
    assert time.monotonic() - began < 2000  # one after another they would take 10,000 s


async def test_a_wrong_annotation_raises_at_the_start(app: TaskQueue) -> None:
    from aiotaskq import ConfigError

    async def job(x: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    app.task(job)
    with pytest.raises(ConfigError, match="Missing"):
        async with app.worker():
            raise AssertionError("it was entered")
