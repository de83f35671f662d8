"""Lost connections: they count as crashes where the process died, and nowhere else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from pamqp.commands import Queue

from aiotaskq import TaskQueue
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import ConsumerInfo
from aiotaskq.contract.settlement import Again, Dead, Release
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq.channel import AmqpDisconnected
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.drivers.rabbitmq.membership.ledger import Ledger
from aiotaskq.drivers.rabbitmq.membership.losses import HarmlessLosses
from aiotaskq.drivers.rabbitmq.membership.records import (
    ConsumerAnswer,
    ConsumerQuestion,
    ConsumerSurvived,
    LedgerRecord,
    MessagesRestored,
)
from aiotaskq.drivers.rabbitmq.membership.survey import ConsumerSurvey
from aiotaskq.drivers.rabbitmq.transport import connect
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import BrokerUnavailable, LeaseLost, TaskFailed
from tests.servers import RabbitServer

PATIENCE = 120.0
DURABLE_AFTER = 4.0  # seconds until RabbitMQ 3.10 finds a new queue again when it is restarted


async def take(broker: RabbitBroker) -> tuple[RabbitConsumer, Delivery]:
    """Have a new consumer take the one message that there is."""
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    [got] = await consumer.fetch(1, PATIENCE)
    return consumer, got


async def lose(consumer: RabbitConsumer, server: RabbitServer) -> None:
    """Close its connection at the server, and receive the errors that its worker would get."""
    await asyncio.to_thread(server.close_connections)
    with pytest.raises(LeaseLost):
        await _fetch_for_ever(consumer)
    await consumer.close()


async def _fetch_for_ever(consumer: RabbitConsumer) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            await consumer.fetch(1, 0.1)


async def die(consumer: RabbitConsumer) -> None:
    await consumer.abort()
    await consumer.close()


def envelope(name: str) -> Envelope:
    return Envelope(id=name, queue="q", body=b"x")


async def test_messages_lost_by_a_process_that_lives_count_no_crash(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    await broker.publish([envelope("a")])
    notes = []
    for _ in range(4):
        consumer, got = await take(broker)
        assert got.crashes == 0
        notes.append(bool(got.crash_note))
        await lose(consumer, rabbit_server)
    # Its outcome may be stored all the same, so the worker must get an error.
    assert notes == [False, True, True, True]
    consumer, got = await take(broker)
    assert got.crashes == 0
    await consumer.close()


async def test_deaths_count_also_among_losses_and_in_copies(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    await broker.publish([envelope("a")])
    consumer, _ = await take(broker)
    await lose(consumer, rabbit_server)
    consumer, got = await take(broker)
    assert not await consumer.settle([Release(got)])  # which makes a copy
    await die((await _again(consumer, broker, crashes=0))[0])
    consumer, got = await take(broker)
    assert got.crashes == 1
    await lose(consumer, rabbit_server)
    consumer, got = await take(broker)
    assert got.crashes == 1
    await die(consumer)
    consumer, got = await take(broker)  # from the queue of suspects
    assert got.crashes == 2
    await lose(consumer, rabbit_server)
    consumer, got = await take(broker)
    assert got.crashes == 2
    await die(consumer)
    consumer, got = await take(broker)
    assert got.crashes == 3
    await consumer.close()


async def _again(
    consumer: RabbitConsumer, broker: RabbitBroker, *, crashes: int
) -> tuple[RabbitConsumer, Delivery]:
    await consumer.close()
    consumer, got = await take(broker)
    assert got.crashes == crashes
    return consumer, got


async def test_a_retry_and_a_revived_one_begin_anew(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    await broker.publish([envelope("a")])
    consumer, _ = await take(broker)
    await lose(consumer, rabbit_server)
    consumer, got = await take(broker)
    assert not await consumer.settle([Again(got, envelope("a"))])
    consumer, _ = await _again(consumer, broker, crashes=0)
    await die(consumer)
    consumer, got = await take(broker)
    assert got.crashes == 1, "the loss of the first attempt was taken off the second"
    assert not await consumer.settle([Dead(got, "why")])
    await consumer.close()
    [letter] = await broker.dead("q")
    assert letter.crashes == 1
    assert not await broker.revive("q", [(letter.key, envelope("a"))])
    consumer, got = await take(broker)
    assert got.crashes == 0
    await die(consumer)
    consumer, got = await take(broker)
    assert got.crashes == 1
    await consumer.close()


async def test_a_retry_of_a_retry_begins_anew(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    await broker.publish([envelope("a")])
    consumer, _ = await take(broker)
    await lose(consumer, rabbit_server)
    for _ in range(2):
        consumer, got = await take(broker)
        assert not await consumer.settle([Again(got, envelope("a"))])
        await consumer.close()
    consumer, _ = await take(broker)
    await die(consumer)
    consumer, got = await take(broker)
    assert got.crashes == 1, "the loss of the first attempt was taken off the third"
    await consumer.close()


async def test_messages_lost_after_a_refusal_count_no_crash(url: str, broker: RabbitBroker) -> None:
    await broker.publish([envelope("a")])
    consumer = broker.consumer(["q", "p"], name="w", lease=60.0)
    await consumer.open()
    assert await consumer.fetch(1, PATIENCE)
    transport = await connect(parse_url(url))
    name = broker._names.ready("p")
    await (await transport.open_channel()).call(
        Queue.Delete(queue=name), Queue.Declare(queue=name, durable=True)
    )
    with pytest.raises(LeaseLost):
        await consumer.news()  # the queue has other arguments
    await consumer.close()
    consumer, got = await take(broker)
    assert got.crashes == 0
    await consumer.close()
    await transport.close()


async def test_a_delivery_before_the_record_counts_one_crash_too_many_and_the_next_does_not(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, overtaken = Ledger.write, threading.Event()

    async def write_later(ledger: Ledger, record: LedgerRecord) -> None:
        if isinstance(record, ConsumerSurvived) and not overtaken.is_set():
            raise BrokerUnavailable("not yet")
        await write(ledger, record)

    monkeypatch.setattr(Ledger, "write", write_later)
    await broker.publish([envelope("a")])
    loser, _ = await take(broker)
    other = broker.consumer(["q"], name="w", lease=60.0)
    await other.open()
    waiting = asyncio.create_task(other.fetch(1, PATIENCE))
    transport = loser._loop._transport
    assert transport is not None  # it is open
    loser._running()._loop.call_soon_threadsafe(transport.fail, AmqpDisconnected("by a test"))
    [got] = await waiting
    assert got.crashes == 1
    overtaken.set()
    await loser.close()  # the loss is recorded then
    async with asyncio.timeout(PATIENCE):
        while not other._loop._membership.harmless_losses(("a", "")):
            await asyncio.sleep(0.01)  # until it has read the record
    assert not await other.settle([Release(got)])
    [got] = await other.fetch(1, PATIENCE)
    assert got.crashes == 0
    await other.close()


async def test_held_messages_are_restored_though_cancel_lost_its_connection(
    url: str, prefix: str, broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.publish([envelope("a")])
    consumer, got = await take(broker)
    caller = RabbitBroker(url, prefix=prefix)
    await caller.open()
    ask, write = ConsumerSurvey.ask, Ledger.write
    restored = asyncio.Event()

    async def ask_and_lose(
        survey: ConsumerSurvey, question: ConsumerQuestion
    ) -> Mapping[str, tuple[ConsumerInfo, ConsumerAnswer | None]]:
        # The cancellation is written by now.
        (await survey._connection.transport()).fail(AmqpDisconnected("by a test"))
        monkeypatch.setattr(ConsumerSurvey, "ask", ask)
        raise BrokerUnavailable("by a test")

    async def write_and_notify(ledger: Ledger, record: LedgerRecord) -> None:
        await write(ledger, record)
        if isinstance(record, MessagesRestored):
            restored.set()

    monkeypatch.setattr(ConsumerSurvey, "ask", ask_and_lose)
    monkeypatch.setattr(Ledger, "write", write_and_notify)
    with pytest.raises(BrokerUnavailable):
        await caller.cancel(["a"], running=False)
    async with asyncio.timeout(PATIENCE):
        await restored.wait()
    assert not await consumer.settle([Again(got, envelope("a"))])
    await consumer.close()
    consumer, _ = await take(broker)
    await consumer.close()
    await caller.close()


async def test_a_process_that_stood_still_is_taken_for_dead(url: str, prefix: str) -> None:
    broker = RabbitBroker(f"{url}?heartbeat=1", prefix=prefix)
    await broker.open()
    await broker.publish([envelope("a")])
    consumer, _ = await take(broker)
    # Like code that holds the interpreter's lock for longer than the server waits.
    consumer._running()._loop.call_soon_threadsafe(stand_still, 3.5)
    with pytest.raises(LeaseLost):
        await _fetch_for_ever(consumer)
    await consumer.close()
    consumer, got = await take(broker)
    assert got.crashes == 1
    await consumer.close()
    await broker.close()


def stand_still(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_the_memory_of_losses_is_bounded() -> None:
    losses = HarmlessLosses()
    for number in range(100_010):
        losses.note("w", [(f"{number}", "")])
    losses.note("w", [("100000", "")])
    losses.note("v", [("100000", "")])
    assert [losses.count((one, "")) for one in ("5", "99999", "100000")] == [0, 1, 2]


# --- workers ------------------------------------------------------------------------------------

DEADLY = """
import os, signal
from aiotaskq import TaskQueue

app = TaskQueue("deadly")

@app.task
async def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(400)
async def test_a_long_task_lives_through_restarts_of_the_server(
    rabbit_server: RabbitServer, url: str, prefix: str, redis_url: str
) -> None:
    app = TaskQueue("t", broker=url, backend=redis_url, prefix=prefix, max_crashes=1)
    begun: asyncio.Queue[int] = asyncio.Queue()
    restarted = asyncio.Event()

    @app.task
    async def long() -> str:
        begun.put_nowait(1)
        await restarted.wait()
        return "healthy"

    await asyncio.to_thread(app.drivers)  # imports them, which reads files
    async with app, app.worker():
        began = time.monotonic()
        handle = await long.kiq()
        await asyncio.wait_for(begun.get(), PATIENCE)
        await asyncio.sleep(max(0.0, began + DURABLE_AFTER - time.monotonic()))
        for _ in range(2):
            await asyncio.to_thread(rabbit_server.kill)
            await asyncio.to_thread(rabbit_server.start)
            await asyncio.wait_for(begun.get(), PATIENCE)
        restarted.set()
        assert await handle.result(timeout=PATIENCE) == "healthy"


async def test_a_task_that_kills_its_workers_is_buried(
    url: str, prefix: str, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    environment = {
        **os.environ,
        "AIOTASKQ_BROKER_URL": url,
        "AIOTASKQ_RESULT_BACKEND": redis_url,
        "AIOTASKQ_PREFIX": prefix,
        "PYTHONPATH": str(tmp_path),
    }
    app = TaskQueue("caller", broker=url, backend=redis_url, prefix=prefix)
    worker = subprocess.Popen(
        [sys.executable, "-m", "aiotaskq", "worker", "deadly:app", "-l", "critical"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await asyncio.to_thread(app.drivers)
        async with app:
            handle = await app.send("deadly.die")
            with pytest.raises(TaskFailed, match="3 workers died while running it"):
                await handle.result(timeout=2 * PATIENCE)
    finally:
        worker.terminate()
        worker.wait(PATIENCE)
