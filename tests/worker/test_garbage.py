"""Memory of tasks that keep their exceptions, which only the garbage collector would free."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ClassVar

import pytest

from aiotaskq import Retry, TaskQueue
from aiotaskq.worker.garbage import drop_tracebacks
from tests.worker.events import LONG


class Data:
    """Something in a local variable of a task."""

    alive: ClassVar[weakref.WeakSet[Data]] = weakref.WeakSet()

    def __init__(self, size: int = 1) -> None:
        self.filled = os.urandom(64) * (1 + size // 64)  # memory that was written to
        self.alive.add(self)


@pytest.fixture
def collector_is_off(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("CRITICAL", "aiotaskq.task")  # records that are kept hold exceptions
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def keeps_its_error() -> None:
    data = Data()
    error = ValueError(data)
    raise error


def keeps_a_cause() -> None:
    data = Data()
    last = None
    try:
        keeps_its_error()
    except ValueError as error:
        last = error
    raise LookupError(data) from last


def keeps_a_group() -> None:
    data = Data()
    errors: list[Exception] = []
    for act in (keeps_its_error, keeps_a_cause):
        try:
            act()
        except Exception as error:
            errors.append(error)
    raise ExceptionGroup(str(data), errors)


async def waits_and_keeps() -> None:
    data = Data()
    first = None
    try:
        await waits_for_another()
    except ValueError as error:
        first = error
    raise RuntimeError(data) from first


async def waits_for_another() -> None:
    data = Data()
    error = ValueError(data)
    await asyncio.sleep(0)
    raise error


@pytest.mark.usefixtures("collector_is_off")
@pytest.mark.parametrize(
    "fail",
    [keeps_its_error, keeps_a_cause, keeps_a_group, waits_and_keeps],
    ids=lambda f: f.__name__,
)
async def test_what_a_failed_task_has_held_is_freed_with_its_failure(
    app: TaskQueue, fail: Callable[[], Awaitable[None] | None]
) -> None:
    async def hidden() -> None:
        waiting = fail()
        if waiting is not None:
            await waiting

    again: Any = app.task(retry=Retry(max_attempts=2, delay=0))(fail)
    once: Any = app.task(name="hidden")(hidden)
    async with app.worker():
        for task in (once, again):
            await (await task.kiq()).wait(LONG)
        await asyncio.sleep(0)
        assert list(Data.alive) == []


@pytest.mark.usefixtures("collector_is_off")
def test_exceptions_that_hold_each_other_are_freed() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__cause__, second.__context__ = second, first
    caught: list[BaseException] = []
    for error in (first, second):
        try:
            raise error
        except ValueError as raised:
            caught.append(raised)
    drop_tracebacks(first)
    assert [error.__traceback__ for error in caught] == [None, None]


async def test_a_worker_does_not_grow_with_what_its_tasks_leave(app: TaskQueue) -> None:
    size, most = 2_000_000, 0

    @app.task
    async def leave() -> None:
        nonlocal most
        data = Data(size)
        most = max(most, len(Data.alive))
        await asyncio.sleep(0)
        try:
            raise ValueError(data)
        except ValueError as error:
            kept = error  # noqa: F841 - it closes the cycle

    before = gc.get_threshold()
    gc.set_threshold(10_000)  # as in the processes of `aiotaskq worker`
    try:
        async with app.worker(concurrency=10):
            for _ in range(9):
                handles = [await leave.kiq() for _ in range(50)]
                await asyncio.gather(*(handle.wait(LONG) for handle in handles))
    finally:
        gc.set_threshold(*before)
    # Else all 450: they are fewer than 10,000 objects.
    assert most < 250
