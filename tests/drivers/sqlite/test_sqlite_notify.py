"""Notification between processes: waiting fetches and subscribers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from msgspec import Raw

from aiotaskq.contract.message import SUSPECT
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.settlement import Done, Release
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker, notify
from tests.drivers.sqlite.tools import (
    NEVER,
    PATIENCE,
    Start,
    envelope,
    line,
    listening,
    names,
    opened,
    rows,
    tell,
)


async def test_a_waiting_fetch_is_woken_by_another_process(
    broker: SQLiteBroker, start: Start
) -> None:
    broker._listener.poll = NEVER
    consumer = await opened(broker)
    publisher = start(
        """
        for n in range(3):
            await told()
            await broker.publish([envelope(f"{n}")])
        await broker.close()
        """
    )
    for number in range(3):
        waiting = asyncio.create_task(consumer.fetch(1, NEVER))
        await listening(broker)
        tell(publisher)
        async with asyncio.timeout(PATIENCE):
            assert names(await waiting) == [f"{number}"]
    await consumer.close()


async def test_a_subscriber_is_woken_by_another_process(
    backend: SQLiteBackend, start: Start
) -> None:
    backend._listener.poll = NEVER
    arrivals = backend.subscribe()
    assert await anext(arrivals) == []
    storer = start(
        """
        backend = SQLiteBackend(URL)
        await backend.open()
        await told()
        done = Outcome(task_id="a", status=TaskStatus.SUCCESS, result=Raw(b"1"))
        await backend.store([done], None)
        await backend.close()
        await broker.close()
        """
    )
    waiting = asyncio.ensure_future(anext(arrivals))
    tell(storer)
    async with asyncio.timeout(PATIENCE):
        assert await waiting == ["a"]
    await arrivals.aclose()


async def test_a_waiting_fetch_wakes_by_itself_when_a_delayed_one_falls_due(
    broker: SQLiteBroker,
) -> None:
    broker._listener.poll = NEVER
    consumer = await opened(broker)
    waiting = asyncio.create_task(consumer.fetch(1, NEVER))
    await listening(broker)
    due = time.time() + 0.3
    await broker.publish([envelope("a", not_before=due)])
    async with asyncio.timeout(PATIENCE):
        assert names(await waiting) == ["a"]
    assert time.time() >= due
    await consumer.close()


async def test_a_consumer_that_holds_nothing_any_more_is_woken_for_a_suspect(
    broker: SQLiteBroker,
) -> None:
    broker._listener.poll = NEVER
    await broker.publish([envelope("s")])
    for _ in range(SUSPECT):
        dying = await opened(broker)
        assert names(await dying.fetch(1, 0)) == ["s"]
        lease = broker.lease(dying.grant)
        assert await lease.end("killed") == 1
        await lease.close()
    consumer, other = await opened(broker), await opened(broker)
    [alone] = await other.fetch(1, 0)
    await broker.publish([envelope("plain")])
    [plain] = await consumer.fetch(1, 0)
    waiting = asyncio.create_task(consumer.fetch(10, NEVER))
    await listening(broker)
    assert not await other.settle([Release(alone)])
    await other.close()
    assert (await consumer.news()).suspects
    assert not waiting.done()
    assert not await consumer.settle([Done(plain)])
    async with asyncio.timeout(PATIENCE):
        [got] = await waiting
    assert (got.id, got.crashes, got.crash_note) == ("s", SUSPECT, "killed")
    await consumer.close()


async def test_without_a_port_waiters_look_more_often(
    broker: SQLiteBroker, backend: SQLiteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PermissionError

    monkeypatch.setattr(notify, "bind_port", refuse)
    for driver in (broker, backend):
        driver._listener.poll = NEVER
    consumer = await opened(broker)
    arrivals = backend.subscribe()
    assert await anext(arrivals) == []
    waiting = asyncio.create_task(consumer.fetch(1, NEVER))
    arriving = asyncio.ensure_future(anext(arrivals))
    await asyncio.sleep(0.05)
    await broker.publish([envelope("a")])
    await backend.store([Outcome(task_id="b", status=TaskStatus.SUCCESS, result=Raw(b"1"))], None)
    async with asyncio.timeout(PATIENCE):
        assert names(await waiting) == ["a"]
        assert await arriving == ["b"]
    await arrivals.aclose()
    await consumer.close()


async def test_ports_are_given_up_on_closing_and_dropped_when_stale(
    broker: SQLiteBroker, start: Start, path: Path
) -> None:
    count = "SELECT count(*) FROM aiotaskq_wakeups"
    clone = broker.clone()
    await clone.open()
    consumer = await opened(clone, "q", "p")
    async with asyncio.timeout(120.0):  # a short fetch may end before it listens, if all is busy
        while not await consumer.fetch(1, 0.01) and rows(path, count) == [(0,)]:
            pass
    assert rows(path, count) == [(2,)]
    await consumer.close()
    await clone.close()
    assert rows(path, count) == [(0,)]
    listener = start(
        """
        consumer = broker.consumer(["q"], name="test", lease=3600.0)
        await consumer.open()
        await consumer.fetch(1, 0.01)
        say("listening")
        await consumer.fetch(1, 3600.0)
        """
    )
    assert await line(listener) == "listening"
    listener.kill()
    listener.wait()
    await broker.publish([envelope("a")])  # nobody hears it, which harms nobody
    broker._maintenance.sweeper.timer.due_at = 0.0
    await broker.maintain()
    assert rows(path, count) == [(0,)]
