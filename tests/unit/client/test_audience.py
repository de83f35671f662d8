"""The audience: a sender hears of tasks that no live worker takes."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

import msgspec
import pytest

from aiotaskq.client import audience
from aiotaskq.client.audience import Audience
from aiotaskq.contract.broker import Consumer, Traits
from aiotaskq.contract.message import Message
from aiotaskq.contract.records import WorkerInfo
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.errors import BrokerUnavailable
from tests.unit.client.drivers import until


class SharedBroker(MemoryBroker):
    traits: ClassVar[Traits] = Traits()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(audience, "_A_MOMENT", 0.0)
    caplog.set_level(logging.DEBUG, "aiotaskq.session")


def sent(queue: str, task: str) -> Message:
    return Message(id="1", task=task, queue=queue)


async def worker(broker: MemoryBroker, queue: str, about: bytes) -> Consumer:
    consumer = broker.consumer([queue], name="w", lease=60, about=about)
    await consumer.open()
    return consumer


def knows(*tasks: str) -> bytes:
    return msgspec.json.encode(WorkerInfo(name="w", host="h", pid=1, started_at=0, tasks=tasks))


async def test_the_log_tells_once_where_no_live_worker_takes_a_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = SharedBroker()
    await worker(broker, "served", knows("a.known"))
    await worker(broker, "foreign", b"of another package")
    heard = Audience(broker)
    heard.note([sent("served", "a.known"), sent("nowhere", "a.x"), sent("served", "a.unknown")])
    heard.note([sent("foreign", "a.x")])
    await until(lambda: len(caplog.messages) >= 3)
    for _ in range(3):
        heard.note([sent("nowhere", "a.x"), sent("served", "a.unknown")])
        await asyncio.sleep(0.01)
    unknown = "and no live worker of this queue knows it: is the queue another application's?"
    assert sorted(caplog.messages) == [
        f"a.unknown was sent to the queue served, {unknown}",
        f"a.x was sent to the queue foreign, {unknown}",
        "a.x was sent to the queue nowhere, which no live worker serves; it waits there",
    ]
    await heard.close()


async def test_a_broker_that_is_away_is_no_concern_of_the_sender(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = SharedBroker()

    async def away() -> None:
        raise BrokerUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(broker, "consumers", away)
        heard = Audience(broker)
        heard.note([sent("q", "a.x")])
        await until(lambda: "cannot see which workers there are" in caplog.text)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    heard.note([sent("q", "a.y")])
    await until(lambda: "a.y was sent" in caplog.text)
    await heard.close()


async def test_closing_ends_a_look_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "_A_MOMENT", 1000.0)
    heard = Audience(SharedBroker())
    heard.note([sent("q", "a.x")])
    await heard.close()
    assert len(asyncio.all_tasks()) == 1
