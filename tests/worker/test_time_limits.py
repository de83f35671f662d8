"""Time limits: soft ones, hard ones, and tasks that do not end at them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from aiotaskq import (
    SoftTimeLimitExceeded,
    TaskFailed,
    TaskQueue,
    TaskStatus,
)
from aiotaskq.events import HealthChanged, Refused, Stuck
from aiotaskq.middleware import Middleware, Run
from aiotaskq.worker import Worker
from tests.worker.events import LONG, EventRecorder


async def test_a_soft_limit_is_raised_inside_and_may_be_handled(app: TaskQueue) -> None:
    @app.task(soft_timeout=0.05, timeout=LONG)
    async def job() -> str:
        try:
            await asyncio.sleep(LONG)
        except SoftTimeLimitExceeded as told:
            await asyncio.sleep(0)  # the task may wait again
            return f"cleaned up: {told}"
        return "too late"

    async with app.worker():
        value = await (await job.kiq()).result(LONG)
    assert value == "cleaned up: it ran longer than its soft_timeout of 0.05 s"


async def test_a_soft_limit_that_is_not_handled_fails_the_task(app: TaskQueue) -> None:
    @app.task(soft_timeout=0.05)
    async def job() -> None:
        await asyncio.sleep(LONG)

    async with app.worker():
        handle = await job.kiq()
        with pytest.raises(TaskFailed, match="SoftTimeLimitExceeded"):
            await handle.result(LONG)


async def test_the_hard_limit_comes_after_the_soft_one(app: TaskQueue) -> None:
    told: list[str] = []

    @app.task(soft_timeout=0.03, timeout=0.1)
    async def job() -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(LONG)
            except BaseException as error:
                told.append(type(error).__name__)
                if not isinstance(error, SoftTimeLimitExceeded):
                    raise

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert told == ["SoftTimeLimitExceeded", "CancelledError"]
    assert outcome.error is not None
    assert "timeout of 0.1 s" in str(outcome.error)


async def test_code_that_cleans_up_after_a_cancellation_does_so_at_a_soft_limit(
    app: TaskQueue,
) -> None:
    ended = asyncio.Event()
    caught: list[BaseException] = []

    async def child() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            ended.set()

    @app.task(soft_timeout=0.05)
    async def job() -> str:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
        except SoftTimeLimitExceeded as told:
            caught.append(told)
            assert ended.is_set()  # the child has ended
            raise
        return "too late"

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert len(caught) == 1
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "SoftTimeLimitExceeded"
    assert not isinstance(outcome.error, asyncio.CancelledError)  # it is none for the caller


async def test_a_soft_limit_of_one_call(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        await asyncio.sleep(LONG)

    async with app.worker():
        handle = await job.with_options(soft_timeout=0.05).kiq()
        with pytest.raises(TaskFailed, match="SoftTimeLimitExceeded"):
            await handle.result(LONG)


async def test_a_soft_limit_reaches_through_middleware(app: TaskQueue) -> None:
    class Around(Middleware):
        async def run(self, context: Any, proceed: Run) -> Any:
            return await proceed(context)

    app.add_middleware(Around())

    @app.task(soft_timeout=0.05)
    async def job() -> str:
        try:
            await asyncio.sleep(LONG)
        except SoftTimeLimitExceeded:
            return "told"
        return ""

    async with app.worker():
        assert await (await job.kiq()).result(LONG) == "told"


async def test_settings_give_the_limits_of_tasks_that_have_none(app: TaskQueue) -> None:
    app.conf.update(task_soft_time_limit=0.05, task_time_limit=LONG)

    @app.task
    async def job() -> None:
        await asyncio.sleep(LONG)

    async with app.worker():
        with pytest.raises(TaskFailed, match="SoftTimeLimitExceeded"):
            await (await job.kiq()).result(LONG)


async def test_a_task_that_swallows_its_cancellation_frees_its_slot(app: TaskQueue) -> None:
    app.conf.task_cancel_grace = 0.05
    gate = asyncio.Event()
    recorded = EventRecorder(app, Stuck, Refused)

    @app.task(timeout=0.05)
    async def stubborn() -> str:
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        return "late"

    @app.task
    async def other() -> int:
        return 1

    async with app.worker(concurrency=1):
        handle = await stubborn.kiq()
        outcome = await handle.wait(LONG)
        assert outcome.status is TaskStatus.FAILURE
        assert "timeout of 0.05 s" in str(outcome.error)
        assert await (await other.kiq()).result(LONG) == 1  # the only slot is free
        assert recorded.names == ["Stuck"]
        gate.set()
        await recorded.count(2)  # its late value is refused
        assert recorded.names == ["Stuck", "Refused"]
        assert (await handle.wait(LONG)).status is TaskStatus.FAILURE


async def test_a_cancelled_task_that_does_not_end_is_revoked_all_the_same(app: TaskQueue) -> None:
    app.conf.task_cancel_grace = 0.05
    gate = asyncio.Event()
    started = asyncio.Event()
    recorded = EventRecorder(app, Stuck)

    @app.task
    async def stubborn() -> None:
        started.set()
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    async with app.worker(concurrency=1):
        handle = await stubborn.kiq()
        await started.wait()
        await handle.cancel()
        await recorded.count(1)
        assert await handle.status() is TaskStatus.REVOKED
        gate.set()


async def test_a_value_returned_after_the_timeout_does_not_count(app: TaskQueue) -> None:
    @app.task(timeout=0.05)
    async def job() -> str:
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            return "in spite of it"
        return ""

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert outcome.status is TaskStatus.FAILURE


async def test_a_worker_with_too_many_stuck_threads_asks_to_be_replaced(app: TaskQueue) -> None:
    app.conf.update(worker_max_stuck_tasks=3, task_cancel_grace=0.05)
    gate = threading.Event()

    @app.task(timeout=0.02)
    def stubborn() -> None:
        gate.wait(LONG)

    @app.task
    async def other() -> int:
        return 1

    worker = Worker(app, replaceable=True)
    running = asyncio.create_task(worker.run())
    try:
        for handle in [await stubborn.kiq() for _ in range(3)]:
            assert (await handle.wait(LONG)).status is TaskStatus.FAILURE
        async with asyncio.timeout(LONG):
            await running
        assert worker.recycle == "3 tasks do not end though they were told to"
    finally:
        gate.set()


async def test_an_embedded_worker_with_stuck_tasks_goes_on_and_is_unhealthy(app: TaskQueue) -> None:
    app.conf.update(worker_max_stuck_tasks=1, task_cancel_grace=0.05)
    gate = threading.Event()
    recorded = EventRecorder(app, HealthChanged)

    @app.task(timeout=0.02)
    def stubborn() -> None:
        gate.wait(LONG)

    @app.task
    async def other() -> int:
        return 1

    try:
        async with app.worker() as worker:
            await (await stubborn.kiq()).wait(LONG)
            [sick] = await recorded.count(1)
            assert sick.problems == ("1 tasks do not end though they were told to",)
            assert worker.health.problems == sick.problems
            assert await (await other.kiq()).result(LONG) == 1
            gate.set()
            await recorded.count(2)
            assert worker.health.problems == ()
    finally:
        gate.set()


async def test_a_coroutine_that_runs_too_long_is_cancelled_and_fails(app: TaskQueue) -> None:
    cleaned_up = False

    @app.task(timeout=0.05)
    async def job() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up = True

    async with app.worker():
        with pytest.raises(TaskFailed, match=r"longer than its timeout of 0\.05 s"):
            await (await job.kiq()).result(LONG)
        outcome = await (await job.with_options(timeout=0.01).kiq()).wait(LONG)
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "TimeLimitExceeded"
    assert cleaned_up


async def test_a_task_may_raise_a_timeout_of_its_own(app: TaskQueue) -> None:
    @app.task(timeout=LONG)
    async def job() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "TimeoutError"


async def test_the_settings_limit_tasks_without_a_limit(app: TaskQueue) -> None:
    app.conf.task_time_limit = 0.02

    @app.task
    async def job() -> None:
        await asyncio.Event().wait()

    async with app.worker():
        assert "TimeLimitExceeded" in str((await (await job.kiq()).wait(LONG)).error)
