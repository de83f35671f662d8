"""Time limits and cancelling of plain functions in threads: exceptions are raised in them."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from aiotaskq import (
    ConfigError,
    Retry,
    SoftTimeLimitExceeded,
    TaskFailed,
    TaskQueue,
    TaskStatus,
    TimeLimitExceeded,
)
from aiotaskq.events import Refused, Retried, Stuck
from aiotaskq.middleware import Middleware, Run
from aiotaskq.worker import Worker
from tests.worker.events import LONG, EventRecorder, until


def spin() -> None:
    """Run Python code until something is raised in it."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        time.sleep(0.002)


async def test_a_soft_limit_is_raised_inside_and_may_be_handled(app: TaskQueue) -> None:
    @app.task(soft_timeout=0.05, timeout=LONG)
    def job() -> str:
        try:
            spin()
        except SoftTimeLimitExceeded as told:
            time.sleep(0.01)  # the function goes on
            return f"cleaned up: {told}"
        return "too late"

    async with app.worker():
        value = await (await job.kiq()).result(LONG)
    assert value == "cleaned up: it ran longer than its soft_timeout of 0.05 s"


async def test_a_soft_limit_that_is_not_handled_fails_the_task(app: TaskQueue) -> None:
    @app.task(soft_time_limit=0.05)
    def job() -> None:
        spin()

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert "SoftTimeLimitExceeded: " in str(outcome.error)
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "SoftTimeLimitExceeded"
    assert "spin" in str(outcome.traceback)


async def test_the_settings_and_each_call_have_limits_for_threads_too(app: TaskQueue) -> None:
    app.conf.update(task_soft_time_limit=0.03, task_time_limit=0.1)
    told: list[str] = []

    @app.task
    def job() -> None:
        for _ in range(2):
            try:
                spin()
            except (SoftTimeLimitExceeded, TimeLimitExceeded) as error:
                told.append(type(error).__name__)
                if isinstance(error, TimeLimitExceeded):
                    raise

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
        assert told == ["SoftTimeLimitExceeded", "TimeLimitExceeded"]
        assert "timeout of 0.1 s" in str(outcome.error)
        limited = job.with_options(soft_timeout=0.01, timeout=0.02)
        assert "timeout of 0.02 s" in str((await (await limited.kiq()).wait(LONG)).error)


async def test_a_soft_limit_reaches_through_middleware(app: TaskQueue) -> None:
    class Around(Middleware):
        async def run(self, context: Any, proceed: Run) -> Any:
            return await proceed(context)

    app.add_middleware(Around())

    @app.task(soft_timeout=0.05)
    def job() -> str:
        try:
            spin()
        except SoftTimeLimitExceeded:
            return "told"
        return ""

    async with app.worker():
        assert await (await job.kiq()).result(LONG) == "told"


async def test_the_hard_limit_ends_the_function_and_shows_where_it_was(app: TaskQueue) -> None:
    cleaned_up = threading.Event()

    @app.task(timeout=0.05)
    def job() -> None:
        try:
            spin()
        finally:
            cleaned_up.set()

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert isinstance(outcome.error, TaskFailed)
    assert (outcome.error.exc_type, outcome.error.exc_message) == (
        "TimeLimitExceeded",
        "it ran longer than its timeout of 0.05 s",
    )
    assert "spin" in str(outcome.traceback)
    assert cleaned_up.is_set()


async def test_a_function_that_catches_every_exception_ends_all_the_same(app: TaskQueue) -> None:
    app.conf.task_cancel_grace = 0.05
    caught: list[Exception] = []
    recorded = EventRecorder(app, Stuck, Refused)

    @app.task(timeout=0.03)
    def stubborn() -> None:
        while True:
            try:
                spin()
            except Exception as error:
                caught.append(error)

    async with app.worker():
        outcome = await (await stubborn.kiq()).wait(LONG)
        assert "TimeLimitExceeded: " in str(outcome.error)
        await recorded.count(2)  # it has ended
    assert [type(error) for error in caught] == [TimeLimitExceeded]
    assert recorded.names == ["Stuck", "Refused"]


async def test_a_cancelled_function_gets_what_a_coroutine_gets(app: TaskQueue) -> None:
    begun = threading.Event()
    told: list[BaseException] = []

    @app.task
    def job() -> None:
        begun.set()
        try:
            spin()
        except BaseException as error:
            told.append(error)
            raise

    async with app.worker():
        handle = await job.kiq()
        await until(begun.is_set)
        await handle.cancel()
        await until(lambda: bool(told))
        assert await handle.status() is TaskStatus.REVOKED
    assert [type(error) for error in told] == [asyncio.CancelledError]


async def test_a_worker_that_stops_hands_back_what_runs_in_threads(app: TaskQueue) -> None:
    begun: list[int] = []
    stopped: list[type] = []

    @app.task
    def job() -> str:
        begun.append(1)
        if len(begun) > 1:
            return "done"
        try:
            spin()
        except BaseException as error:
            stopped.append(type(error))
            raise
        return ""

    async with app.worker(grace_period=0):
        handle = await job.kiq()
        await until(lambda: len(begun) == 1)
    assert stopped == [asyncio.CancelledError]  # when the worker has ended, nothing of it runs
    async with app.worker():
        assert await handle.result(LONG) == "done"


async def test_c_code_is_not_given_the_time_to_clean_up(app: TaskQueue) -> None:
    app.conf.task_cancel_grace = 10 * LONG
    begun, end = threading.Event(), threading.Event()

    @app.task
    def hang() -> None:
        begun.set()
        end.wait(10 * LONG)

    try:
        async with asyncio.timeout(LONG):
            async with app.worker(grace_period=0):
                outcome = await (await hang.with_options(timeout=0.05).kiq()).wait(LONG)
                assert str(outcome.error).startswith("TimeLimitExceeded: ")
                begun.clear()
                handle = await hang.kiq()
                await until(begun.is_set)
            assert await handle.status() is TaskStatus.PENDING  # it was handed back
    finally:
        end.set()


async def test_c_code_is_left_behind_and_takes_no_thread_from_others(app: TaskQueue) -> None:
    app.conf.task_cancel_grace = 0.02
    end = threading.Event()

    @app.task(timeout=0.05)
    def hang() -> None:
        end.wait(LONG)

    @app.task
    def quick() -> str:
        return "done"

    try:
        async with app.worker(threads=1):
            for _ in range(3):
                with pytest.raises(TaskFailed, match="TimeLimitExceeded: "):
                    await (await hang.kiq()).result(LONG)
            assert await (await quick.kiq()).result(LONG) == "done"
    finally:
        end.set()


# --- one run at a time ----------------------------------------------------------------------------


class Entrance:
    """A place that counts how many are in it at once."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.entered = 0

    def __enter__(self) -> int:
        self.inside += 1
        self.entered += 1
        self.most = max(self.most, self.inside)
        return self.entered

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


@pytest.mark.parametrize("where", ["thread", "loop"])
async def test_the_next_attempt_waits_for_a_run_that_does_not_end(
    app: TaskQueue, where: str
) -> None:
    app.conf.task_cancel_grace = 0.02
    gate, entrance = threading.Event(), Entrance()
    recorded = EventRecorder(app, Stuck, Retried)
    retry = Retry(max_attempts=2, delay=0)

    @app.task(timeout=0.05, retry=retry, name="thread")
    def plain() -> int:
        with entrance as number:
            if number == 1:
                gate.wait(LONG)  # C code
            return number

    @app.task(timeout=0.05, retry=retry, name="loop")
    async def coroutine() -> int:
        with entrance as number:
            while number == 1 and not gate.is_set():
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)
            return number

    @app.task
    async def other() -> int:
        return entrance.inside

    async with app.worker():
        handle = await app.tasks[where].kiq()
        await recorded.count(1)
        assert await (await other.kiq()).result(LONG) == 1  # it still runs
        gate.set()
        assert await handle.result(LONG) == 2
    assert recorded.names == ["Stuck", "Retried"]
    assert entrance.most == 1


async def test_the_next_attempt_is_stored_when_the_worker_stops(app: TaskQueue) -> None:
    app.conf.task_cancel_grace = 0.02
    gate = threading.Event()
    recorded = EventRecorder(app, Stuck, Retried)

    @app.task(timeout=0.05, retry=Retry(max_attempts=2, delay=0))
    def job() -> str:
        if not gate.is_set():
            gate.wait(LONG)
        return "second"

    try:
        async with app.worker():
            handle = await job.kiq()
            await recorded.count(1)
        assert recorded.names == ["Stuck", "Retried"]
        gate.set()
        async with app.worker():
            outcome = await handle.wait(LONG)
        assert (outcome.return_value, outcome.attempts) == ("second", 2)
    finally:
        gate.set()


# --- only the task's own code is interrupted ------------------------------------------------------


async def test_limits_that_pass_as_functions_end_hit_no_other_code(app: TaskQueue) -> None:
    """Each run ends at about its limit. Exceptions that are late must hit no task that follows."""
    ended: list[int] = []

    @app.task(soft_timeout=0.004, timeout=0.02)
    def close() -> str:
        end = time.perf_counter() + 0.004
        while time.perf_counter() < end:
            pass
        return "ended"

    @app.task
    def other(number: int) -> int:
        for _ in range(50):
            time.sleep(0)
            ended.append(number)
        return number

    async with app.worker(threads=2) as worker:
        tight = [await close.kiq() for _ in range(60)]
        quiet = [await other.kiq(number) for number in range(60)]
        for handle in tight:
            outcome = await handle.wait(LONG)
            assert outcome.return_value == "ended" or "TimeLimitExceeded: " in str(outcome.error)
        assert [await handle.result(LONG) for handle in quiet] == list(range(60))
        assert worker.running == 0
    assert len(ended) == 60 * 50


# --- where plain functions run --------------------------------------------------------------------


async def test_a_function_that_no_process_can_find_is_refused_at_start(app: TaskQueue) -> None:
    @app.task
    def local() -> None: ...

    app.conf.task_default_executor = "process"
    with pytest.raises(ConfigError, match=r'local runs in another process.*executor="thread"'):
        await Worker(app).run()
