"""Sending: notes are of the messages that the broker has taken, and of no others."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

import msgspec
import pytest

from aiotaskq import Middleware, TaskQueue
from aiotaskq.client import audience
from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Message
from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.errors import BatchRefused, EncodeError
from aiotaskq.middleware import Send
from tests.unit.client.drivers import RefusingBroker, until


class SharedMemory(MemoryBroker):
    """A memory broker whose workers may be in other processes."""

    traits: ClassVar[Traits] = Traits()


class Director(Middleware):
    """Sends the messages for one queue to another one, and those for a second one not at all."""

    async def send(self, message: Message, proceed: Send) -> None:
        if message.queue == "held-up":
            return
        moved = "there" if message.queue == "here" else message.queue
        await proceed(msgspec.structs.replace(message, queue=moved))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(audience, "_A_MOMENT", 0.0)
    caplog.set_level(logging.WARNING, "aiotaskq.session")


async def test_the_audience_is_that_of_the_messages_that_were_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with TaskQueue("t", broker=SharedMemory()) as app:
        app.add_middleware(Director())
        for queue in ("held-up", "here", "elsewhere"):
            await app.send("a.task", queue=queue)
        await until(lambda: len(caplog.messages) >= 2)
        await asyncio.sleep(0)
    assert sorted(caplog.messages) == [
        f"a.task was sent to the queue {queue}, which no live worker serves; it waits there"
        for queue in ("elsewhere", "there")
    ]


async def test_the_audience_of_messages_before_a_failure_is_looked_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refusing(Middleware):
        async def send(self, message: Message, proceed: Send) -> None:
            if message.queue == "wrong":
                raise PermissionError
            await proceed(message)

    async with TaskQueue("t", broker=SharedMemory()) as app:
        app.add_middleware(Refusing())

        @app.task
        async def job() -> None: ...

        calls = [job.with_options(queue=queue).s() for queue in ("right", "wrong")]
        with pytest.raises(PermissionError):
            await app.kiq_many(calls)
        await until(lambda: "was sent to the queue right" in caplog.text)


async def test_a_message_that_was_not_sent_is_not_told_as_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with TaskQueue("t", broker=MemoryBroker()) as app:
        app.add_middleware(Director())
        await (await app.broker()).cancel(["mine"])
        await app.send("a.task", task_id="mine", queue="held-up")
        assert await app.load_outcome("mine") is None
        assert caplog.messages == []
        await app.send("a.task", task_id="mine", queue="here")
        outcome = await app.load_outcome("mine")
    assert outcome is not None
    assert outcome.status is TaskStatus.REVOKED
    assert "was cancelled before it was sent now" in caplog.text


async def test_a_message_beside_a_refused_one_is_told_as_cancelled() -> None:
    broker = RefusingBroker({"refused": EncodeError("refused")}, whole=False)
    async with TaskQueue("t", broker=broker) as app:

        @app.task
        async def job() -> None: ...

        await (await app.broker()).cancel(["mine"])
        with pytest.raises(BatchRefused):
            await app.kiq_many([job.with_options(task_id=one).s() for one in ("refused", "mine")])
        outcome = await app.load_outcome("mine")
        assert outcome is not None
        assert outcome.status is TaskStatus.REVOKED
        assert await app.load_outcome("refused") is None
