"""Messages that cannot run, since they are unreadable, refused or unknown: dead letters."""

from __future__ import annotations

import asyncio
import pickle
import time
from typing import Any

import pytest

from aiotaskq import (
    TaskFailed,
    TaskQueue,
    TaskStatus,
    current_task,
)
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DeadLetter
from aiotaskq.events import Buried, Received, Started
from tests.worker.events import LONG, EventRecorder, until


async def dead(app: TaskQueue, count: int = 1) -> list[DeadLetter]:
    broker = await app.broker()
    letters = list(await broker.dead("default"))
    assert len(letters) == count
    return letters


async def let_workers_die(app: TaskQueue, count: int) -> bytes:
    """Let several consumers take the next message and die, one after another; return its body."""
    broker = await app.broker()
    body = b""
    for crashes in range(count):
        consumer = broker.consumer(["default"], name="dies", lease=10.0)
        await consumer.open()
        (taken,) = await consumer.fetch(1, 0)
        assert taken.crashes == crashes
        broker.store._time_shift += 11.0  # type: ignore[attr-defined]  # it is in memory
        assert (await broker.maintain()).reclaimed == 1
        body = taken.body
    return body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\xff",
        b"{",
        b"[]",
        b'{"id": 1}',
        b'{"id": "x"}',
        b'{"id": "x", "task": "\xff"}',
        b"[" * 100_000,
        b"{" + b'"a":{' * 100_000,
        b"\x91" * 100_000,
        pickle.dumps(("args",)),
    ],
    ids=lambda body: repr(bytes(body[:12])),
)
async def test_a_body_that_is_no_message_is_an_unchanged_dead_letter(
    app: TaskQueue, body: bytes
) -> None:
    recorded = EventRecorder(app, Buried)

    @app.task
    async def fine() -> int:
        return 1

    broker = await app.broker()
    await broker.publish([Envelope(id="broken", queue="default", body=body)])
    async with app.worker():
        assert await (await fine.kiq()).result(LONG) == 1
        (event,) = await recorded.count(1)
        error = (await app.handle("broken").wait(LONG)).error  # the waiting caller gets the error
    (letter,) = await dead(app)
    assert letter.id == event.task_id == "broken"
    assert letter.body == body
    assert letter.reason == event.reason != ""
    assert isinstance(error, TaskFailed)
    assert error.exc_type == "DecodeError"


async def test_pickle_is_refused_unless_it_is_accepted(app: TaskQueue) -> None:
    sender = TaskQueue(
        "sender",
        broker=app.drivers()[0],
        task_serializer="pickle",
        accept_content=["json", "pickle"],
    )
    ran = False

    @app.task(name="job")
    async def job(x: int) -> None:
        nonlocal ran
        ran = True

    handle = await sender.send("job", (1,))
    async with app.worker():
        outcome = await app.handle(handle.id).wait(LONG)
    assert outcome.is_err
    (letter,) = await dead(app)
    assert "pickle" in letter.reason
    assert not ran
    await sender.close()


async def test_an_unknown_task_is_put_back_for_a_worker_that_knows_it(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Received)
    handle = await app.send("somewhere.else", (1,), headers={"a": "b"}, priority=4)
    async with app.worker():
        await recorded.count(1)
    broker = await app.broker()
    depth = (await broker.depth())["default"]
    assert (depth.ready, depth.delayed, depth.dead) == (0, 1, 0)
    assert await handle.status() is TaskStatus.PENDING

    @app.task(name="somewhere.else")
    async def known(x: int) -> dict[str, Any]:

        context = current_task()
        return {
            "x": x,
            "attempt": context.attempt,
            "headers": dict(context.headers),
            "priority": context.priority,
        }

    broker.store._time_shift += 60  # type: ignore[attr-defined]  # it is in memory
    async with app.worker():
        assert await handle.result(LONG) == {
            "x": 1,
            "attempt": 1,
            "headers": {"a": "b"},
            "priority": 4,
        }


async def test_a_task_that_stays_unknown_is_a_dead_letter_and_fails_for_its_caller(
    app: TaskQueue,
) -> None:
    app.conf.unknown_task_ttl = 0.2

    @app.task
    async def fine() -> int:
        return 1

    handle = await app.send("nobody.knows", (1, 2))
    began = time.time()
    async with app.worker():
        assert await (await fine.kiq()).result(LONG) == 1
        outcome = await handle.wait(LONG)
        assert await (await fine.kiq()).result(LONG) == 1
    assert time.time() - began >= 0.2
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "UnknownTask"
    (letter,) = await dead(app)
    assert "nobody.knows" in letter.reason
    assert b"[1,2]" in letter.body


async def test_an_unknown_task_is_a_dead_letter_at_once_with_a_ttl_of_zero(app: TaskQueue) -> None:
    app.conf.unknown_task_ttl = 0
    handle = await app.send("nobody.knows")
    async with app.worker():
        assert (await handle.wait(LONG)).is_err
    await dead(app)


@pytest.mark.parametrize(("most", "words"), [(1, "a worker died"), (3, "3 workers died")])
async def test_a_task_with_too_many_crashes_is_a_dead_letter_and_fails_for_its_caller(
    app: TaskQueue, most: int, words: str
) -> None:
    app.conf.max_crashes = most
    buried, begun = EventRecorder(app, Buried), EventRecorder(app, Received, Started)
    ran: list[int] = []

    @app.task
    async def killer(x: int) -> None:
        ran.append(x)

    @app.task
    async def fine() -> int:
        return 1

    handle = await killer.kiq(7)
    waiting = asyncio.create_task(handle.wait(LONG))
    body = await let_workers_die(app, most)
    async with app.worker():
        outcome = await waiting
        assert begun.events == []
        assert await (await fine.kiq()).result(LONG) == 1
    assert outcome.status is TaskStatus.FAILURE
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "WorkerLost"
    assert words in str(outcome.error)
    (letter,) = await dead(app)
    assert (letter.id, letter.body, letter.crashes) == (handle.id, body, most)
    assert words in letter.reason
    assert [event.task_id for event in buried.events] == [handle.id]
    assert ran == []


async def test_a_task_runs_while_its_crashes_are_below_the_limit(app: TaskQueue) -> None:
    @app.task
    async def survivor(x: int) -> int:
        return x

    handle = await survivor.kiq(7)
    await let_workers_die(app, 2)
    async with app.worker():
        assert await handle.result(LONG) == 7
    await dead(app, 0)


async def test_an_unreadable_message_with_crashes_is_a_dead_letter_as_unreadable(
    app: TaskQueue,
) -> None:
    broker = await app.broker()
    await broker.publish([Envelope(id="broken", queue="default", body=b"{")])
    await let_workers_die(app, 3)
    async with app.worker():
        error = (await app.handle("broken").wait(LONG)).error
    assert isinstance(error, TaskFailed)
    assert error.exc_type == "DecodeError"
    (letter,) = await dead(app)
    assert (letter.body, letter.crashes) == (b"{", 3)


async def test_an_unreadable_message_without_an_id_is_a_dead_letter_without_an_outcome(
    app: TaskQueue, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await app.broker()
    await broker.publish([Envelope(id="", queue="default", body=b"\xff")])
    async with app.worker(burst=True) as worker:
        await until(lambda: not worker.running and "dead letters" in caplog.text)
    assert "message without an id goes to the dead letters" in caplog.text
    assert "too late" not in caplog.text
    [dead] = await broker.dead("default")
    assert dead.body == b"\xff"
