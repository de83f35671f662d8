"""`Task`: options, the kind of its function, and the ways to call it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from aiotaskq import Call, ConfigError, Retry, Task, TaskQueue
from aiotaskq.tasks.options import check_call_options, choose_executor, task_options


@pytest.fixture
def app() -> TaskQueue:
    return TaskQueue("t", broker="memory://")


def plain(x: int) -> int:
    return x


async def coroutine(x: int) -> int:
    return x


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"countdown": 0},
        {"countdown": -1.5},
        {"eta": datetime(2026, 1, 1)},
        {"eta": datetime(2026, 1, 1, tzinfo=UTC)},
        {"expires": 5},
        {"expires": timedelta(days=1)},
        {"expires": datetime(2026, 1, 1)},
        {"queue": "überall"},
        {"priority": 0},
        {"priority": 9},
        {"task_id": "a b"},
        {"task_id": UUID(int=1)},
        {"timeout": 0.5},
        {"retry": Retry()},
        {"headers": {"a": "b"}},
    ],
    ids=repr,
)
def test_right_options_are_kept(options: Any) -> None:
    assert check_call_options(options) == options


def test_options_that_are_none_are_left_out() -> None:
    assert check_call_options({"countdown": None, "eta": datetime(2026, 1, 1), "queue": None}) == {  # type: ignore[typeddict-item]  # as Celery users call it
        "eta": datetime(2026, 1, 1)
    }


@pytest.mark.parametrize(
    "options",
    [
        {"countdown": "5"},
        {"countdown": math.nan},
        {"countdown": math.inf},
        {"countdown": timedelta(1)},
        {"eta": 5},
        {"eta": "2026-01-01"},
        {"expires": "tomorrow"},
        {"expires": math.inf},
        {"queue": ""},
        {"queue": 5},
        {"queue": "a\nb"},
        {"queue": "\ud800"},
        {"queue": "q" * 201},
        {"priority": 10},
        {"priority": -1},
        {"priority": 5.0},
        {"priority": True},
        {"task_id": ""},
        {"task_id": "x\x00"},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"retry": 3},
        {"retry": True},
        {"headers": {"a": 1}},
        {"headers": {1: "a"}},
        {"headers": "a"},
    ],
    ids=repr,
)
def test_a_wrong_option_is_refused_by_name(options: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        check_call_options(options)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="count_down, did you mean countdown"):
        check_call_options({"count_down": 5})  # type: ignore[typeddict-unknown-key]  # that is the point


def test_two_times_to_start_are_refused() -> None:
    with pytest.raises(ConfigError, match="countdown and eta"):
        check_call_options({"countdown": 5, "eta": datetime(2026, 1, 1)})


# --- the place where a function runs -----------------------------------------------------------


def test_each_kind_of_function_has_its_place() -> None:
    assert choose_executor(coroutine, None) == "loop"
    assert choose_executor(coroutine, "loop") == "loop"
    assert choose_executor(plain, None) is None  # as the setting says
    assert choose_executor(plain, "thread") == "thread"
    assert choose_executor(plain, "process") == "process"
    assert choose_executor(math.sqrt, None) is None


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


class Callable_:
    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("fn", "executor", "why"),
    [
        (coroutine, "thread", "event loop"),
        (coroutine, "process", "event loop"),
        (plain, "loop", "async def"),
        (plain, "threads", "thread.*process"),
        (lambda: None, "process", "top level"),
        (generator, None, "generator"),
        (async_generator, None, "generator"),
        ("reports", None, "keywords"),
        (functools.partial(plain, 1), "process", "top level"),
        (Callable_(), "process", "top level"),
        (Callable_(), "loop", "async def"),
        (Callable_, None, "no function"),
        (None, None, "no function"),
    ],
)
def test_objects_that_cannot_run_are_refused(fn: Any, executor: str | None, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        task_options(fn, {"executor": executor})


# --- the task object ----------------------------------------------------------------------------


async def test_calling_the_task_runs_the_function_here(app: TaskQueue) -> None:
    assert app.task(plain)(5) == 5
    assert await app.task(coroutine)(6) == 6
    assert await (await app.broker()).depth() == {}
    await app.close()


def test_a_task_looks_like_its_function(app: TaskQueue) -> None:
    task = app.task(plain)
    assert isinstance(task, Task)
    assert inspect.signature(task) == inspect.signature(plain)
    assert (task.__name__, task.__qualname__, task.__module__) == ("plain", "plain", __name__)
    assert repr(task) == f"<Task {__name__}.plain>"


def test_s_returns_a_call_with_its_options(app: TaskQueue) -> None:
    task = app.task(plain)
    assert task.s(5) == Call(f"{__name__}.plain", (5,), {}, {})
    assert task.with_options(priority=3).s(x=5) == Call(
        f"{__name__}.plain", (), {"x": 5}, {"priority": 3}
    )


def test_a_call_that_does_not_fit_is_a_type_error_at_the_caller(app: TaskQueue) -> None:
    task = app.task(plain)
    calls: list[Callable[[], object]] = [
        lambda: task.s(),  # type: ignore[call-arg]  # that is the point
        lambda: task.s(1, 2),  # type: ignore[call-arg]  # as above
        lambda: task.with_options(queue="q").s(y=1),  # type: ignore[call-arg]  # as above
        lambda: task.delay(),  # type: ignore[call-arg]  # as above
        lambda: task.apply_async((1, 2)),
        lambda: task.apply_async(kwargs={"y": 1}),
    ]
    for wrong in calls:
        with pytest.raises(TypeError, match=r"plain\(x: "):
            wrong()


@pytest.mark.parametrize("args", ["x", 5, {"x": 1}, None])
def test_apply_async_takes_no_text_for_a_list(app: TaskQueue, args: Any) -> None:
    with pytest.raises(TypeError, match="list or a tuple"):
        app.task(plain).apply_async(args)


async def test_every_way_to_call_takes_a_parameter_named_self(app: TaskQueue) -> None:
    @app.task
    async def method(self: int, args: int, timeout: int, queue: int, task_id: int) -> list[int]:
        return [self, args, timeout, queue, task_id]

    arguments = {"self": 1, "args": 2, "timeout": 3, "queue": 4, "task_id": 5}
    async with app, app.worker():
        for handle in [
            await method.kiq(**arguments),
            await method.with_options(timeout=60).kiq(**arguments),
            *await app.kiq_many([method.s(**arguments)]),
            await app.send(method.name, kwargs=arguments),
        ]:
            assert await handle.result(120) == [1, 2, 3, 4, 5]
    assert await method(**arguments) == [1, 2, 3, 4, 5]


def test_with_options_leaves_the_task_as_it_is(app: TaskQueue) -> None:
    task = app.task(plain)
    task.with_options(queue="other")
    assert task.s(1).options == {}
