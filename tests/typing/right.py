"""Programs that type checkers must accept: checked by test_typing.py, and never run."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Coroutine
from typing import Any, assert_type
from uuid import UUID

from aiotaskq import (
    AsyncResult,
    Attempt,
    Call,
    Retry,
    State,
    Task,
    TaskHandle,
    TaskQueue,
    TaskResult,
    TaskStatus,
    WorkerInfo,
    events,
)
from aiotaskq.tasks.task import CoroutineTask, FunctionTask

app = TaskQueue("typed", broker="memory://")


@app.task
async def add(x: int, y: int = 1) -> int:
    return x + y


@app.task(queue="reports", timeout=300, retry=Retry(max_attempts=5), executor="process")
def render(report_id: UUID, *, title: str) -> str:
    return title


@app.task(bind=True, soft_timeout=5)
async def bound(self: Task[..., Any], x: int) -> int:
    assert_type(self.request.id, str | None)
    assert_type(self.request.retries, int)
    raise self.retry(exc=ValueError(), countdown=5, max_retries=3)


@app.task(bind=True, autoretry_for=(OSError,), max_retries=None, retry_backoff=True, time_limit=9)
def bound_too(self: Task[[str], str], x: str, *, y: int = 1) -> str:
    return x


@app.task(bind=False, acks_late=True, retry=Retry(max_attempts=math.inf, jitter="full"))
def loose(x: str) -> str:
    return x


@app.task()
async def nothing() -> None: ...


@app.task
def named_like_options(self: int, args: str, timeout: float, queue: bytes) -> list[int]:
    return []


async def asynchronous() -> None:
    handle = await add.kiq(1, 2)
    assert_type(handle, TaskHandle[int])
    assert_type(await handle.result(timeout=5), int)
    assert_type(await handle, int)
    assert_type(await handle.status(), TaskStatus)
    ended = await handle.wait()
    assert_type(ended, TaskResult[int])
    assert_type(ended.return_value, int | None)
    assert_type(ended.value(), int)

    assert_type(await render.kiq(UUID(int=1), title="x"), TaskHandle[str])
    assert_type(await (await nothing.kiq()).result(), None)
    await named_like_options.kiq(self=1, args="", timeout=1.0, queue=b"")

    configured = add.with_options(countdown=10, queue="slow", priority=9, task_id="x")
    assert_type(await configured.kiq(1), TaskHandle[int])
    assert_type(configured.s(1, y=2), Call[int])
    assert_type(configured.delay(1), AsyncResult[int])

    assert_type(await app.kiq_many([add.s(2, 8), add.s(3)]), list[TaskHandle[int]])
    await app.kiq_many([add.s(2, 8), render.s(UUID(int=1), title="x")])  # of several types
    by_name = await app.send("tasks.add", args=(2, 8), countdown=1)
    assert_type(by_name, TaskHandle[Any])

    # Callers do not give parameters that a worker fills.
    assert_type(await bound.kiq(1), TaskHandle[int])
    assert_type(bound.with_options(soft_timeout=1).s(x=1), Call[int])
    assert_type(await bound(1), int)
    assert_type(bound_too("1", y=2), str)
    assert_type(await loose.kiq("1"), TaskHandle[str])
    assert_type(await app.workers(), list[WorkerInfo])
    assert_type(ended.history, tuple[Attempt, ...])

    # Calling the task itself runs the function.
    coroutine: Coroutine[Any, Any, int] = add(1, 2)
    assert_type(await coroutine, int)
    assert_type(render(UUID(int=1), title="x"), str)

    async with app, app.worker(concurrency=10, queues=["default"]):
        pass


def synchronous() -> None:
    result = add.delay(2, 8)
    assert_type(result, AsyncResult[int])
    assert_type(result.get(timeout=5), int)
    assert_type(result.ready(), bool)
    result.revoke(terminate=True, signal="SIGKILL")
    assert_type(render.apply_async((UUID(int=1),), {"title": "x"}, countdown=1), AsyncResult[str])
    assert_type(app.send_task("x", (1,), {"k": 2}, queue="q"), AsyncResult[Any])


@app.on(events.Failed)
def heard(event: events.Failed) -> None:
    assert_type(event.error, BaseException)


@app.lifespan
async def around(state: State) -> AsyncIterator[None]:
    state.pool = 5
    yield


def takes(one: CoroutineTask[[int, int], int], other: FunctionTask[..., str]) -> None: ...


takes(add, render)
