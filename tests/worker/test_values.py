"""Values of tasks: those without a form, those that nobody keeps, and those that are awaited."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable, Generator
from datetime import datetime
from typing import Any, ParamSpec, TypeVar

import pytest

from aiotaskq import EncodeError, Retry, TaskFailed, TaskQueue
from aiotaskq.events import Succeeded
from tests.worker.events import LONG

P = ParamSpec("P")
R = TypeVar("R")


def plainly(fn: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return fn(*args, **kwargs)

    return call


# --- without a form -----------------------------------------------------------------------------


async def test_a_value_without_a_form_fails_its_task_once_and_says_so(app: TaskQueue) -> None:
    runs: list[str] = []
    retry = Retry(max_attempts=3, delay=0.01)

    @app.task(retry=retry)
    async def on_the_loop() -> object:
        runs.append("loop")
        return object()

    @app.task(retry=retry)
    def in_a_thread() -> Any:
        runs.append("thread")
        return [threading.Lock()]

    @app.task(autoretry_for=(Exception,), default_retry_delay=0.01)
    async def too_large() -> str:
        runs.append("large")
        return "x" * 2000

    app.conf.max_result_size = 1000
    async with app.worker():
        for task in (on_the_loop, in_a_thread, too_large):
            outcome = await (await app.send(task.name)).wait(LONG)
            assert isinstance(outcome.error, TaskFailed)
            assert outcome.error.exc_type in ("EncodeError", "PayloadTooLarge")
            assert "the result" in str(outcome.error)
            assert outcome.attempts == 1
    assert runs == ["loop", "thread", "large"]


async def test_an_encode_error_of_the_task_itself_is_a_failure_as_any(app: TaskQueue) -> None:
    @app.task(retry=Retry(max_attempts=2, delay=0.01))
    async def send() -> None:
        raise EncodeError("another task's argument")

    async with app.worker():
        assert (await (await send.kiq()).wait(LONG)).attempts == 2


@pytest.mark.parametrize("backend", [None, "disabled://"])
async def test_a_value_that_nobody_keeps_is_not_encoded(backend: str | None) -> None:
    app = TaskQueue("app", broker="memory://", backend=backend)
    ended: list[str] = []
    done = asyncio.Event()

    @app.on(Succeeded)
    def note(event: Succeeded) -> None:
        ended.append(event.message.task)
        if len(ended) == 2:
            done.set()

    @app.task(name="loop", ignore_result=backend is None)
    async def on_the_loop() -> Any:
        return object()

    @app.task(name="thread", ignore_result=backend is None)
    def in_a_thread() -> Any:
        return object()

    async with app.worker():
        await on_the_loop.kiq()
        await in_a_thread.kiq()
        await asyncio.wait_for(done.wait(), LONG)
    assert sorted(ended) == ["loop", "thread"]


async def test_values_without_annotations_arrive_as_they_were_sent(app: TaskQueue) -> None:
    @app.task
    async def echo(x, *rest, key=None, **more):  # type: ignore[no-untyped-def]  # as old code has it
        return [x, rest, key, more]

    now = datetime(2026, 1, 2)
    async with app.worker():
        handle = await app.send(echo.name, (now, {1}), {"key": b"x", "other": (1,)})
        assert await handle.result(LONG) == [now, ({1},), b"x", {"other": (1,)}]
        elsewhere = TaskQueue("other", broker=app.drivers()[0])
        by_name = await elsewhere.send(echo.name, (now, {1}), {"key": b"x", "other": (1,)})
        assert await app.handle(by_name.id).result(LONG) == [now, ({1},), b"x", {"other": (1,)}]
        await elsewhere.close()


# --- awaited ------------------------------------------------------------------------------------


async def test_a_plain_function_around_a_coroutine_function_runs_its_body(app: TaskQueue) -> None:
    before: list[str] = []

    def noting(fn: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            before.append(threading.current_thread().name)  # it may block
            return fn(*args, **kwargs)

        return call

    @app.task
    @noting
    async def add(x: int, y: int) -> int:
        await asyncio.sleep(0)
        assert threading.current_thread() is threading.main_thread()
        return x + y

    async with app.worker():
        assert await (await add.kiq(2, 3)).result(LONG) == 5
    assert len(before) == 1
    assert "aiotaskq-thread" in before[0]
    assert await add(2, 3) == 5


async def test_a_plain_function_may_run_a_loop_of_its_own(app: TaskQueue) -> None:
    def synchronous(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any) -> Any:
            return asyncio.run(fn(*args))

        return call

    @app.task
    @synchronous
    async def double(x: int) -> int:
        return 2 * x

    async with app.worker():
        assert await (await app.send(double.name, (4,))).result(LONG) == 8


async def test_anything_that_can_be_awaited_is(app: TaskQueue) -> None:
    class Soon:
        def __await__(self) -> Generator[Any, None, int]:
            yield from asyncio.sleep(0).__await__()
            return 7

    @app.task
    def soon() -> Awaitable[int]:
        return Soon()

    async with app.worker():
        assert await (await app.send(soon.name)).result(LONG) == 7


async def test_the_body_of_a_wrapped_coroutine_function_has_the_limits_of_its_task(
    app: TaskQueue,
) -> None:
    cancelled = asyncio.Event()

    @app.task(timeout=0.05)
    @plainly
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with app.worker():
        error = (await (await wait.kiq()).wait(LONG)).error
        assert isinstance(error, TaskFailed)
        assert error.exc_type == "TimeLimitExceeded"
        await asyncio.wait_for(cancelled.wait(), LONG)
