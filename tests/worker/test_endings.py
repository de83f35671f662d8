"""Tasks that do not end well: failures, further attempts, timeouts, expiry."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiotaskq import (
    Retry,
    TaskFailed,
    TaskQueue,
    TaskRevoked,
    TaskStatus,
    current_task,
)
from aiotaskq.contract.message import Envelope
from aiotaskq.events import Failed, Retried, Revoked, Succeeded
from tests.worker.tools import LONG, Heard, until


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("one"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError("mine"),
        StopIteration(1),
        StopAsyncIteration(),
        BaseException("base"),
        BaseExceptionGroup("many", [SystemExit(1), ValueError()]),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["loop", "thread", "timed"])
async def test_whatever_a_task_raises_ends_only_that_task(
    app: TaskQueue, error: BaseException, where: str
) -> None:
    async def coroutine() -> None:
        await asyncio.sleep(0)
        raise error

    def plain() -> None:
        raise error

    job: Any = (
        app.task(plain)
        if where == "thread"
        else app.task(timeout=LONG if where == "timed" else None)(coroutine)
    )

    @app.task
    async def fine() -> int:
        return 1

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
        assert outcome.status is TaskStatus.FAILURE
        assert isinstance(outcome.error, TaskFailed)
        # A StopIteration cannot leave a coroutine, nor travel in a future.
        expected = {
            ("StopIteration", "loop"): "RuntimeError",
            ("StopIteration", "timed"): "RuntimeError",
            ("StopIteration", "thread"): "ThreadStopped",
        }.get((type(error).__name__, where), type(error).__name__)
        assert outcome.error.exc_type == expected
        assert await (await fine.kiq()).result(LONG) == 1


async def test_a_failure_carries_type_message_and_the_traceback_of_the_task_alone(
    app: TaskQueue,
) -> None:
    @app.task
    async def fail() -> None:
        raise LookupError("nothing there")

    async with app.worker():
        handle = await fail.kiq()
        with pytest.raises(LookupError, match="nothing there") as caught:
            await handle.result(LONG)
        assert isinstance(caught.value, TaskFailed)
        trace = (await handle.wait()).traceback
        assert trace is not None
        assert 'raise LookupError("nothing there")' in trace
        assert "aiotaskq/worker" not in trace


async def test_a_failed_task_runs_again_until_it_succeeds(app: TaskQueue) -> None:
    heard = Heard(app, Retried, Succeeded, Failed)
    attempts: list[int] = []

    @app.task(retry=Retry(max_attempts=5, delay=0))
    async def job() -> str:
        attempts.append(current_task().attempt)
        if len(attempts) < 3:
            raise OSError("not yet")
        return "done"

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert outcome.return_value == "done"
    assert outcome.attempts == 3
    assert attempts == [1, 2, 3]
    assert heard.names == ["Retried", "Retried", "Succeeded"]


async def test_it_gives_up_after_the_last_attempt(app: TaskQueue) -> None:
    attempts = 0

    @app.task(retry=Retry(max_attempts=3, delay=0))
    def job() -> None:
        nonlocal attempts
        attempts += 1
        raise OSError("never")

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert isinstance(outcome.error, OSError)
    assert outcome.attempts == attempts == 3


async def test_while_it_waits_for_its_next_attempt_its_status_is_retry(app: TaskQueue) -> None:
    heard = Heard(app, Retried)

    @app.task(retry=Retry(max_attempts=2, delay=3600))
    async def job() -> None:
        raise OSError("no")

    async with app.worker():
        handle = await job.kiq()
        await heard.count(1)
        while await handle.status() is not TaskStatus.RETRY:
            await asyncio.sleep(0.001)
        depth = (await (await app.broker()).depth())["default"]
        assert depth.delayed == 1


async def test_what_is_not_worth_another_attempt_gets_none(app: TaskQueue) -> None:
    @app.task(retry=Retry(max_attempts=3, delay=0, on=(OSError,), never_on=(FileNotFoundError,)))
    async def job(kind: str) -> None:
        raise {"os": OSError, "file": FileNotFoundError, "value": ValueError}[kind]

    async with app.worker():
        for kind, attempts in (("os", 3), ("file", 1), ("value", 1)):
            assert (await (await job.kiq(kind)).wait(LONG)).attempts == attempts


async def test_a_backoff_that_fails_costs_no_attempt(app: TaskQueue) -> None:
    def wrong(attempt: int) -> float:
        raise RuntimeError("a mistake of the user's")

    @app.task(retry=Retry(max_attempts=3, backoff=wrong, max_delay=0))
    async def mistaken() -> None:
        raise OSError

    async with app.worker():
        assert (await (await mistaken.kiq()).wait(LONG)).attempts == 3


async def test_a_call_may_ask_for_other_attempts_than_the_task(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        raise OSError

    async with app.worker():
        handle = await job.with_options(retry=Retry(max_attempts=4, delay=0)).kiq()
        assert (await handle.wait(LONG)).attempts == 4


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
        with pytest.raises(TimeoutError, match=r"longer than its timeout of 0\.05 s"):
            await (await job.kiq()).result(LONG)
        outcome = await (await job.with_options(timeout=0.01).kiq()).wait(LONG)
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "TimeLimitExceeded"
    assert cleaned_up


async def test_a_thread_that_runs_too_long_is_left_behind_and_the_task_fails(
    app: TaskQueue,
) -> None:
    leave = threading.Event()

    @app.task(timeout=0.05)
    def job() -> None:
        leave.wait(LONG)

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
        assert isinstance(outcome.error, TimeoutError)
        leave.set()


async def test_a_task_may_raise_a_timeout_of_its_own(app: TaskQueue) -> None:
    @app.task(timeout=LONG)
    async def job() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "TimeoutError"


async def test_the_settings_limit_tasks_that_say_nothing(app: TaskQueue) -> None:
    app.conf.task_time_limit = 0.02

    @app.task
    async def job() -> None:
        await asyncio.Event().wait()

    async with app.worker():
        assert isinstance((await (await job.kiq()).wait(LONG)).error, TimeoutError)


async def test_a_task_that_expired_is_revoked_and_never_runs(app: TaskQueue) -> None:
    ran = False

    @app.task
    async def job() -> None:
        nonlocal ran
        ran = True

    handle = await job.with_options(expires=datetime.now(UTC) - timedelta(seconds=1)).kiq()
    async with app.worker():
        with pytest.raises(TaskRevoked, match="expired"):
            await handle.result(1)
    assert not ran


async def test_a_task_that_expires_between_its_attempts_is_revoked(app: TaskQueue) -> None:
    heard = Heard(app, Retried, Revoked)

    @app.task(retry=Retry(max_attempts=2, delay=0.6, jitter=False))
    async def job() -> None:
        raise OSError

    async with app.worker():
        handle = await job.with_options(expires=0.3).kiq()
        with pytest.raises(TaskRevoked, match="expired"):
            await handle.result(LONG)
    assert heard.names == ["Retried", "Revoked"]


async def test_a_function_that_does_not_end_costs_nobody_else_a_thread(app: TaskQueue) -> None:
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
                with pytest.raises(TimeoutError):
                    await (await hang.kiq()).result(LONG)
            assert await (await quick.kiq()).result(LONG) == "done"
            end.set()
    finally:
        end.set()


async def test_a_very_long_message_is_logged_shortened(
    app: TaskQueue, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task
    async def shout() -> None:
        raise ValueError("y" * 3_000_000)

    async with app.worker():
        ended = await (await shout.kiq()).wait(LONG)
    assert "y" * 1000 in str(ended.error)
    assert len(caplog.text) < 100_000


async def test_what_cannot_be_read_and_has_no_id_is_buried_without_an_outcome(
    app: TaskQueue, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await app.broker()
    await broker.publish([Envelope(id="", queue="default", body=b"\xff")])
    async with app.worker(burst=True) as worker:
        await until(lambda: not worker.running and "dead letters" in caplog.text)
    assert "message without an id goes to the dead letters" in caplog.text
    assert "too late" not in caplog.text
    [dead] = await broker.dead("default")
    assert dead.body == b"\xff"
