"""What is put around tasks: lifespans, middleware, observers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from aiotaskq import (
    Middleware,
    Retry,
    State,
    TaskContext,
    TaskFailed,
    TaskQueue,
    current_task,
    events,
)
from aiotaskq.contract.message import Message
from aiotaskq.events import Observers
from tests.worker.tools import LONG, Heard

# --- lifespans ----------------------------------------------------------------------------------


async def test_lifespans_begin_in_order_and_end_in_the_reverse_order(app: TaskQueue) -> None:
    told: list[str] = []

    @app.lifespan
    async def first(state: State) -> AsyncIterator[None]:
        state.number = 7
        told.append("first begins")
        yield
        told.append("first ends")

    @app.on_startup
    async def up(state: State) -> None:
        state.number += 1
        told.append("up")

    @app.on_shutdown
    async def down(state: State) -> None:
        told.append(f"down {state.number}")

    @app.lifespan
    async def last(state: State) -> AsyncIterator[None]:
        told.append("last begins")
        yield
        told.append("last ends")

    @app.task
    async def job() -> int:
        told.append("job")
        return int(current_task().state.number)

    @app.task
    def plain() -> int:
        return int(current_task().state.number)

    async with app.worker():
        assert await (await job.kiq()).result(LONG) == 8
        assert await (await plain.kiq()).result(LONG) == 8
    assert told == [
        "first begins", "up", "last begins", "job", "last ends", "down 8", "first ends",
    ]  # fmt: skip


async def test_each_worker_has_a_state_of_its_own(app: TaskQueue) -> None:
    states: list[State] = []

    @app.on_startup
    async def up(state: State) -> None:
        states.append(state)

    async with app.worker(), app.worker():
        pass
    assert len({id(state) for state in states}) == 2


async def test_a_lifespan_that_fails_at_start_is_raised_and_undoes_what_began(
    app: TaskQueue,
) -> None:
    told: list[str] = []

    @app.lifespan
    async def first(state: State) -> AsyncIterator[None]:
        try:
            yield
        finally:
            told.append("undone")

    @app.on_startup
    async def up(state: State) -> None:
        raise LookupError("no database")

    @app.task
    async def job() -> None:
        told.append("ran")

    await job.kiq()
    with pytest.raises(LookupError, match="no database"):
        async with app.worker():
            told.append("entered")
    assert told == ["undone"]


async def test_what_the_state_has_not_is_said(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        current_task().state.pool  # noqa: B018

    async with app.worker():
        error = (await (await job.kiq()).wait(LONG)).error
    assert isinstance(error, AttributeError)
    assert "state has no 'pool'" in str(error)


# --- middleware ---------------------------------------------------------------------------------


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
    assert outcome.attempts == 1  # what left the onion counts


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
        assert isinstance((await (await job.kiq()).wait(LONG)).error, TimeoutError)


# --- observers ----------------------------------------------------------------------------------


async def test_observers_hear_what_happens(app: TaskQueue) -> None:
    heard = Heard(
        app,
        events.Sent,
        events.Received,
        events.Started,
        events.Succeeded,
        events.Failed,
        events.Retried,
        events.WorkerReady,
        events.WorkerStopped,
    )

    @app.task(retry=Retry(max_attempts=2, delay=0))
    async def job(fail: bool) -> int:
        if fail:
            raise OSError("no")
        return 5

    async with app.worker(name="w"):
        await heard.count(1)
        handle = await job.kiq(False)
        await handle.result(LONG)
        good = (await heard.count(5))[1:]
        await (await job.kiq(True)).wait(LONG)
        bad = (await heard.count(12))[5:]
    assert heard.names[0] == "WorkerReady"
    assert [type(event).__name__ for event in good] == ["Sent", "Received", "Started", "Succeeded"]
    assert {event.message.id for event in good} == {handle.id}
    assert good[-1].value == 5
    assert good[-1].execution_time > 0
    assert [type(event).__name__ for event in bad] == [
        "Sent", "Received", "Started", "Retried", "Received", "Started", "Failed",
    ]  # fmt: skip
    assert isinstance(bad[3].error, OSError)
    assert isinstance(bad[-1].error, OSError)
    assert heard.names[-1] == "WorkerStopped"
    assert heard.events[-1].worker == "w"


async def test_an_observer_that_fails_harms_nothing(
    app: TaskQueue, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: object) -> None:
        raise RuntimeError("an observer's own mistake")

    for kind in (events.Received, events.Started, events.Succeeded, events.Failed,
                 events.Sent, events.WorkerReady, events.WorkerStopped):  # fmt: skip
        app.observers.add(kind, fail)

    @app.task
    async def job(fail: bool) -> int:
        if fail:
            raise OSError
        return 1

    async with app.worker():
        assert await (await job.kiq(False)).result(LONG) == 1
        assert isinstance((await (await job.kiq(True)).wait(LONG)).error, OSError)
        assert await (await job.kiq(False)).result(LONG) == 1
    failures = [record for record in caplog.records if record.name == "aiotaskq.events"]
    assert len(failures) == 3 + 3 + 3 + 2 + 1 + 1 + 1


async def test_where_nobody_listens_no_event_is_made(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted: list[object] = []
    monkeypatch.setattr(Observers, "emit", lambda self, event: emitted.append(event))
    logging.getLogger("aiotaskq.task").setLevel(logging.WARNING)
    try:

        @app.task(track_started=True)
        async def job() -> int:
            return 1

        async with app.worker():
            await (await job.kiq()).result(LONG)
    finally:
        logging.getLogger("aiotaskq.task").setLevel(logging.NOTSET)
    assert emitted == []


async def test_two_workers_of_one_app_log_each_task_once(
    app: TaskQueue, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiotaskq.task")

    @app.task
    async def job() -> int:
        return 1

    async with app.worker():
        async with app.worker():
            handle = await job.kiq()
            await handle.result(LONG)
        other = await job.kiq()
        await other.result(LONG)
    lines = [record.getMessage() for record in caplog.records if record.name == "aiotaskq.task"]
    assert [line.partition("]")[2].split()[0] for line in lines] == ["received", "succeeded"] * 2
    assert not app.observers.heard(events.Succeeded)


async def test_a_value_that_cannot_be_shown_does_not_harm_the_log(
    app: TaskQueue, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiotaskq.task")

    class Hostile(dict[str, int]):
        def __repr__(self) -> str:
            raise RuntimeError("no")

    @app.task
    async def job() -> dict[str, int]:
        return Hostile(a=1)

    @app.task
    async def long() -> str:
        return "x" * 5000

    async with app.worker():
        assert await (await job.kiq()).result(LONG) == {"a": 1}
        await (await long.kiq()).result(LONG)
    assert "whose repr fails: RuntimeError" in caplog.text
    assert "x" * 300 not in caplog.text


async def test_a_thread_pool_value_is_observed_as_it_is(app: TaskQueue) -> None:
    heard = Heard(app, events.Succeeded)

    @app.task
    def job() -> tuple[int, str]:
        return 1, threading.current_thread().name

    async with app.worker():
        await (await job.kiq()).result(LONG)
    assert isinstance(heard.events[0].value, tuple)


async def test_a_wrong_annotation_is_said_at_the_start(app: TaskQueue) -> None:
    from aiotaskq import ConfigError

    async def job(x: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    app.task(job)
    with pytest.raises(ConfigError, match="Missing"):
        async with app.worker():
            raise AssertionError("it was entered")


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
