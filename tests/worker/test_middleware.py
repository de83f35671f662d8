"""Middleware around sending and running tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from aiotaskq import (
    Middleware,
    Retry,
    TaskContext,
    TaskFailed,
    TaskQueue,
    current_task,
)
from aiotaskq.contract.message import Message
from tests.worker.events import LONG


class Noting(Middleware):
    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told

    async def send(self, message: Message, proceed: Any) -> None:
        self.told.append(f"{self.name} sends")
        headers = {**message.headers, self.name: str(len(message.headers))}
        await proceed(msgspec.structs.replace(message, headers=headers))
        self.told.append(f"{self.name} sent")

    async def run(self, context: TaskContext, proceed: Any) -> Any:
        self.told.append(f"{self.name} runs")
        value = await proceed(context)
        self.told.append(f"{self.name} ran")
        return value


@pytest.mark.parametrize("where", ["loop", "thread"])
async def test_middleware_is_an_onion_around_send_and_run(app: TaskQueue, where: str) -> None:
    told: list[str] = []
    app.add_middleware(Noting("outer", told))
    app.add_middleware(Noting("inner", told))

    def plain() -> dict[str, str]:
        told.append("job")
        return dict(current_task().headers)

    async def coroutine() -> dict[str, str]:
        return plain()

    job: Any = app.task(plain) if where == "thread" else app.task(coroutine)
    async with app.worker():
        handle = await job.kiq()
        assert await handle.result(LONG) == {"outer": "0", "inner": "1"}
    assert told == [
        "outer sends", "inner sends", "inner sent", "outer sent",
        "outer runs", "inner runs", "job", "inner ran", "outer ran",
    ]  # fmt: skip


async def test_middleware_may_replace_values_and_translate_exceptions(app: TaskQueue) -> None:
    class Changing(Middleware):
        async def run(self, context: TaskContext, proceed: Any) -> Any:
            try:
                return [await proceed(context), context.name]
            except KeyError as error:
                raise PermissionError("translated") from error

    app.add_middleware(Changing())

    @app.task(retry=Retry(max_attempts=5, delay=0, on=(KeyError,)))
    async def job(fail: bool) -> Any:
        if fail:
            raise KeyError("x")
        return 1

    async with app.worker():
        assert await (await job.kiq(False)).result(LONG) == [1, job.name]
        outcome = await (await job.kiq(True)).wait(LONG)
    assert isinstance(outcome.error, PermissionError)
    assert outcome.attempts == 1  # the exception that left the outermost middleware counts


async def test_middleware_may_answer_without_running(app: TaskQueue) -> None:
    class Cached(Middleware):
        async def run(self, context: TaskContext, proceed: Any) -> Any:
            return "cached"

    app.add_middleware(Cached())

    @app.task
    def job() -> str:
        raise AssertionError("it ran")

    async with app.worker(threads=1):
        for _ in range(3):
            assert await (await job.kiq()).result(LONG) == "cached"


async def test_middleware_that_refuses_a_send_tells_the_caller(app: TaskQueue) -> None:
    class Refusing(Middleware):
        async def send(self, message: Message, proceed: Any) -> None:
            raise PermissionError("not you")

    app.add_middleware(Refusing())

    @app.task
    async def job() -> None: ...

    with pytest.raises(PermissionError, match="not you"):
        await job.kiq()
    assert await (await app.broker()).depth() == {}


async def test_a_timeout_includes_the_middleware(app: TaskQueue) -> None:
    class Slow(Middleware):
        async def run(self, context: TaskContext, proceed: Any) -> Any:
            await asyncio.Event().wait()

    app.add_middleware(Slow())

    @app.task(timeout=0.02)
    async def job() -> None: ...

    async with app.worker():
        error = (await (await job.kiq()).wait(LONG)).error
    assert isinstance(error, TaskFailed)
    assert error.exc_type == "TimeLimitExceeded"


async def test_a_failure_in_a_middleware_is_the_tasks_failure(app: TaskQueue) -> None:
    class Broken(Middleware):
        async def run(self, context: TaskContext, proceed: Any) -> Any:
            raise SystemExit(4)

    app.add_middleware(Broken())

    @app.task
    async def job() -> None: ...

    async with app.worker():
        error = (await (await job.kiq()).wait(LONG)).error
        assert isinstance(error, TaskFailed)
        assert error.exc_type == "SystemExit"
