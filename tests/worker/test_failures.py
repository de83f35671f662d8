"""Tasks that fail: errors of every kind, and their tracebacks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aiotaskq import (
    Reject,
    ResultTimeout,
    Retry,
    RetryLater,
    Snooze,
    TaskFailed,
    TaskQueue,
    TaskStatus,
)
from aiotaskq.worker.execution import OutcomeExists
from tests.worker.events import LONG


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


@pytest.mark.parametrize(
    "error",
    [Reject("child"), RetryLater(0), Snooze(0), ResultTimeout("child"), OutcomeExists()],
    ids=lambda error: type(error).__name__,
)
async def test_the_failure_of_a_child_does_not_act_on_the_task_that_waits_for_it(
    app: TaskQueue, error: Exception
) -> None:
    runs = 0

    # The child asks for nothing itself: only its failure has the type.
    @app.task
    async def child() -> None:
        raise ExceptionGroup("of a child", [error])

    @app.task(retry=Retry(max_attempts=2, delay=0))
    async def parent() -> None:
        nonlocal runs
        runs += 1
        try:
            await (await child.kiq()).result(LONG)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async with app.worker():
        outcome = await (await parent.kiq()).wait(LONG)
    # Another attempt, as after any failure.
    assert (outcome.status, outcome.attempts, runs) == (TaskStatus.FAILURE, 2, 2)
    (letter,) = await (await app.broker()).dead("default")
    assert letter.reason.startswith("failed 2 times")
