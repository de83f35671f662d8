"""`Observers`: adding, removing and calling observers."""

from __future__ import annotations

import logging

import pytest

from aiotaskq.errors import ConfigError
from aiotaskq.events import Event, Observers, TaskEvent, WorkerReady, WorkerStopped


def test_an_observer_hears_exactly_its_kind_in_order() -> None:
    observers = Observers()
    heard: list[str] = []
    observers.add(WorkerReady, lambda event: heard.append(f"first {event.worker}"))
    observers.add(WorkerReady, lambda event: heard.append(f"second {event.worker}"))
    observers.add(WorkerStopped, lambda event: heard.append("stopped"))
    observers.add(Event, lambda event: heard.append("any"))
    observers.emit(WorkerReady(worker="w"))
    assert heard == ["first w", "second w"]


def test_heard_is_true_while_there_is_an_observer() -> None:
    observers = Observers()
    observer = print
    assert not observers.heard(WorkerReady)
    observers.add(WorkerReady, observer)
    assert observers.heard(WorkerReady)
    assert not observers.heard(TaskEvent)
    observers.remove(WorkerReady, observer)
    assert not observers.heard(WorkerReady)


def test_an_observer_that_raises_is_logged_and_the_others_hear(
    caplog: pytest.LogCaptureFixture,
) -> None:
    observers = Observers()
    heard: list[WorkerReady] = []

    def fail(event: WorkerReady) -> None:
        raise ValueError("deaf")

    observers.add(WorkerReady, fail)
    observers.add(WorkerReady, heard.append)
    with caplog.at_level(logging.ERROR, "aiotaskq.events"):
        observers.emit(WorkerReady(worker="w"))
    assert len(heard) == 1
    assert "an observer of WorkerReady failed" in caplog.text


def test_an_observer_may_leave_while_an_event_is_on_its_way() -> None:
    observers = Observers()
    heard: list[str] = []

    def once(event: WorkerReady) -> None:
        heard.append("once")
        observers.remove(WorkerReady, once)

    observers.add(WorkerReady, once)
    observers.add(WorkerReady, lambda event: heard.append("always"))
    observers.emit(WorkerReady(worker="w"))
    observers.emit(WorkerReady(worker="w"))
    assert heard == ["once", "always", "always"]


def test_a_coroutine_function_is_refused() -> None:
    async def observer(event: WorkerReady) -> None: ...

    with pytest.raises(ConfigError, match="plain function"):
        Observers().add(WorkerReady, observer)  # type: ignore[arg-type]  # that is the point
