"""Failures in an error tracker that listens to the log: Sentry's own client, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from aiotaskq import Retry, TaskFailed, TaskQueue
from tests.worker import process_tasks
from tests.worker.events import LONG


class KeptEvents(Transport):
    """A transport that keeps its events and sends none."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event: Any = envelope.get_event()
        if event is not None:
            self.events.append(event)


@pytest.fixture
def sentry() -> Iterator[list[dict[str, Any]]]:
    """The events that a client of Sentry sends."""
    transport = KeptEvents()
    scope = sentry_sdk.get_global_scope()
    before = scope.client
    sentry_sdk.init(
        dsn="http://key@127.0.0.1:1/1", transport=transport, auto_enabling_integrations=False
    )
    yield transport.events
    scope.client.close(timeout=0)
    scope.set_client(before)


def frames_of(exception: dict[str, Any]) -> list[str]:
    return [frame["function"] for frame in exception["stacktrace"]["frames"]]


class Unpaid(Exception):
    pass


async def pay(order: int) -> None:
    await charge(order)


def pay_in_a_thread(order: int) -> None:
    try:
        raise KeyError(order)
    except KeyError as error:
        raise Unpaid(f"order {order}") from error


async def charge(order: int) -> None:
    raise Unpaid(f"order {order}")


async def test_the_failure_of_a_coroutine_has_its_exception_and_its_frames(
    app: TaskQueue, sentry: list[dict[str, Any]]
) -> None:
    task = app.task(name="pay")(pay)
    async with app.worker():
        handles = [await task.kiq(order) for order in (1, 2)]
        for handle in handles:
            await handle.wait(LONG)
    # One template for all; Sentry groups by the frames, whatever the message says.
    assert {event["logentry"]["message"] for event in sentry} == {"Task %s raised after %.6fs: %s"}
    for order, (handle, event) in enumerate(zip(handles, sentry, strict=True), 1):
        (exception,) = event["exception"]["values"]
        assert (exception["type"], exception["value"]) == ("Unpaid", f"order {order}")
        assert exception["module"] == __name__
        assert frames_of(exception) == ["pay", "charge"]
        assert event["extra"] == {"task_name": "pay", "task_id": handle.id} | event["extra"]
        assert (event["level"], event["logger"]) == ("error", "aiotaskq.task")


async def test_the_failure_of_a_function_in_a_thread_has_its_causes(
    app: TaskQueue, sentry: list[dict[str, Any]]
) -> None:
    task = app.task(name="pay")(pay_in_a_thread)
    async with app.worker():
        await (await task.kiq(3)).wait(LONG)
    (event,) = sentry
    cause, exception = event["exception"]["values"]
    assert (cause["type"], exception["type"]) == ("KeyError", "Unpaid")
    assert frames_of(exception) == ["pay_in_a_thread"]


@pytest.mark.timeout(400)
async def test_the_failure_of_a_function_in_a_process_has_its_type_and_its_traceback(
    sentry: list[dict[str, Any]],
) -> None:
    async with process_tasks.app.worker():
        await (await process_tasks.fail.kiq("over there")).wait(LONG)
    await process_tasks.app.close()
    (event,) = sentry
    (exception,) = event["exception"]["values"]
    assert (exception["module"], exception["type"]) == (None, "ValueError")
    assert exception["value"].startswith("over there\n\nIn the worker:\nTraceback")
    assert "in fail\n" in exception["value"]


async def test_a_failure_whose_message_cannot_be_made_is_told_too(
    app: TaskQueue, sentry: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

        __repr__ = __str__

    @app.task
    async def act() -> None:
        raise Hostile

    async with app.worker():
        assert isinstance((await (await act.kiq()).wait(LONG)).error, TaskFailed)
    (event,) = sentry
    assert event["exception"]["values"][0]["type"].endswith("Hostile")
    assert "Logging error" not in capsys.readouterr().err


@pytest.mark.parametrize("fail", [pay, pay_in_a_thread])
async def test_the_log_shows_a_traceback_once(
    app: TaskQueue, caplog: pytest.LogCaptureFixture, fail: Callable[..., Any]
) -> None:
    task: Any = app.task(name="pay", retry=Retry(max_attempts=2, delay=0))(fail)
    async with app.worker():
        await (await task.kiq(4)).wait(LONG)
    (record,) = (record for record in caplog.records if record.name == "aiotaskq.task")
    assert record.exc_info is not None
    assert record.exc_info[0] is Unpaid
    assert caplog.text.count(f"{__name__}.Unpaid: order 4\n") == 1
    assert caplog.text.count("aiotaskq/worker") == 0
