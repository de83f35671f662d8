"""Observers of tasks and workers, and the log of tasks."""

from __future__ import annotations

import logging
import threading

import pytest

from aiotaskq import (
    Retry,
    TaskQueue,
    events,
)
from aiotaskq.events import Observers
from tests.worker.events import LONG, EventRecorder


async def test_observers_get_the_events_of_tasks_and_workers(app: TaskQueue) -> None:
    recorded = EventRecorder(
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
        await recorded.count(1)
        handle = await job.kiq(False)
        await handle.result(LONG)
        good = (await recorded.count(5))[1:]
        await (await job.kiq(True)).wait(LONG)
        bad = (await recorded.count(12))[5:]
    assert recorded.names[0] == "WorkerReady"
    assert [type(event).__name__ for event in good] == ["Sent", "Received", "Started", "Succeeded"]
    assert {event.message.id for event in good} == {handle.id}
    assert good[-1].value == 5
    assert good[-1].execution_time > 0
    assert [type(event).__name__ for event in bad] == [
        "Sent", "Received", "Started", "Retried", "Received", "Started", "Failed",
    ]  # fmt: skip
    assert isinstance(bad[3].error, OSError)
    assert isinstance(bad[-1].error, OSError)
    assert recorded.names[-1] == "WorkerStopped"
    assert recorded.events[-1].worker == "w"


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


async def test_without_observers_no_event_is_created(
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
    recorded = EventRecorder(app, events.Succeeded)

    @app.task
    def job() -> tuple[int, str]:
        return 1, threading.current_thread().name

    async with app.worker():
        await (await job.kiq()).result(LONG)
    assert isinstance(recorded.events[0].value, tuple)
