"""The drivers in memory: named stores, threads, a bounded memory."""

from __future__ import annotations

import asyncio
import threading

import pytest
from msgspec import Raw

from aiotaskq.contract.message import SUSPECT, Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import DeadLimits
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker, MemoryStore, notify
from aiotaskq.drivers.memory.consumer import MemoryConsumer
from aiotaskq.errors import ConfigError


def envelope(name: str) -> Envelope:
    return Envelope(id=name, queue="q", body=b"")


def outcome(name: str) -> Outcome:
    return Outcome(task_id=name, status=TaskStatus.SUCCESS, result=Raw(b"1"))


def test_a_name_is_one_store_of_the_process() -> None:
    first, second = MemoryBroker("memory://one"), MemoryBroker("memory://one")
    assert first.store is second.store is MemoryBackend("memory://one").memory
    assert MemoryBroker("memory://two").store is not first.store
    assert MemoryBroker("memory://one", prefix="other").store is not first.store
    assert first.url == "memory://one"


def test_no_name_is_a_store_of_its_own_shared_by_clones() -> None:
    broker = MemoryBroker()
    assert broker.store is not MemoryBroker().store
    assert broker.clone().store is broker.store
    assert MemoryBackend(store=broker.store).clone().memory is broker.store


def test_the_url_shows_no_password() -> None:
    assert MemoryBroker("memory://user:secret@name").url == "memory://name"


@pytest.mark.parametrize(
    "url", ["redis://x", "memory", "memory://name?x=1", "memory://name#x", "memory://["]
)
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="memory://name"):
        MemoryBroker(url)


async def test_event_loops_in_several_threads_share_a_store() -> None:
    broker = MemoryBroker()
    seen: list[str] = []

    async def work() -> None:
        consumer = broker.clone().consumer(["q"], name="thread", lease=60.0)
        await consumer.open()
        while got := await consumer.fetch(3, 2.0):
            seen.extend(one.id for one in got)
            assert not await consumer.settle([Done(one) for one in got])
            if len(seen) == 2000:
                break
        await consumer.close()

    threads = [threading.Thread(target=asyncio.run, args=(work(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2000):
        await broker.publish([envelope(f"{number}")])
    for thread in threads:
        thread.join()
    assert sorted(seen, key=int) == [f"{number}" for number in range(2000)]
    assert await broker.depth() == {}


async def test_a_subscriber_that_does_not_read_costs_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notify, "UNREAD_AT_MOST", 10)
    backend = MemoryBackend()
    arrivals = backend.subscribe()
    assert await anext(arrivals) == []
    for number in range(11):
        await backend.store([outcome(f"{number}")], None)
    await backend.store([outcome("late")], None)
    assert await anext(arrivals) == []  # something was missed
    assert await anext(arrivals) == ["late"]


def test_everything_out_of_date_is_dropped() -> None:
    memory = MemoryStore()
    memory.store([outcome(f"{number}") for number in range(100)], 1.0)
    memory.publish([Envelope(id="u", queue="q", body=b"", unique=True)], "call")
    memory.purge("q")
    memory.cancel(["c"], running=True)
    memory._time_shift += 8 * 86_400.0
    memory.store([outcome("new")], None)
    memory.maintain(DeadLimits())
    assert list(memory._outcomes) == ["new"]
    assert not memory._ends
    assert not memory._unique
    assert not memory._cancelled
    assert not memory._calls
    assert not memory._queues


async def test_a_consumer_that_holds_nothing_any_more_is_woken_for_a_suspect() -> None:
    broker = MemoryBroker()
    await broker.publish([envelope("s")])
    dying: list[MemoryConsumer] = []
    for crashes in range(SUSPECT):
        dying.append(broker.consumer(["q"], name="dying", lease=60.0))
        await dying[-1].open()
        [got] = await dying[-1].fetch(1, 0)
        assert got.crashes == crashes
        if crashes < SUSPECT - 1:
            assert await broker.lease(dying[-1].grant).end("killed") == 1
    await broker.publish([envelope("plain")])
    consumer = broker.consumer(["q"], name="busy", lease=60.0)
    await consumer.open()
    [plain] = await consumer.fetch(1, 0)
    waiting = asyncio.create_task(consumer.fetch(10, 3600.0))
    assert await broker.lease(dying[-1].grant).end("killed") == 1
    while not (await consumer.news()).suspects:
        await asyncio.sleep(0)
    for _ in range(10):  # it is woken, finds nothing for it, and waits again
        await asyncio.sleep(0)
    assert not waiting.done()
    assert not await consumer.settle([Done(plain)])
    async with asyncio.timeout(120.0):
        [got] = await waiting
    assert (got.id, got.crashes) == ("s", SUSPECT)


async def test_a_key_that_no_dead_letter_can_have_is_refused() -> None:
    broker = MemoryBroker()
    await broker.publish([envelope("a")])
    for key in ("a", "", "-1", "9" * 5000):
        with pytest.raises(ConfigError, match="is not the key of a dead letter"):
            await broker.dead("q", before=key)
        with pytest.raises(ConfigError, match="is not the key of a dead letter"):
            await broker.dead("no such queue", before=key)


async def test_a_consumer_whose_loop_was_closed_disturbs_nobody() -> None:
    broker = MemoryBroker()

    async def die_waiting() -> None:
        consumer = broker.consumer(["q"], name="dead", lease=60.0)
        await consumer.open()
        waiter = notify.MemoryWaiter()
        broker.store.take(consumer._holder, 1, waiter)  # nobody removes the waiter

    thread = threading.Thread(target=asyncio.run, args=(die_waiting(),))
    thread.start()
    thread.join()
    await broker.publish([envelope("a")])
    assert (await broker.depth())["q"].ready == 1
