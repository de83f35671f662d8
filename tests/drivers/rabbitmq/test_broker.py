"""The RabbitMQ broker: limits, crashes, restarts of the server, TLS."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from pamqp.base import Frame
from pamqp.commands import Basic, Queue

from aiotaskq import TaskQueue
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq import broker as driver
from aiotaskq.drivers.rabbitmq.channel import AmqpRefused, RabbitChannel
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.drivers.rabbitmq.transport import connect
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import (
    BatchRefused,
    BrokerFull,
    BrokerUnavailable,
    ConfigError,
    LeaseLost,
    Unsupported,
)
from tests.servers import Certificates, RabbitServer

PATIENCE = 120.0
Holder: TypeAlias = tuple[RabbitConsumer, Delivery]


@pytest.fixture(scope="module")
def aged(rabbit_server: RabbitServer) -> tuple[str, float]:
    """A prefix whose queues exist, and the time after which they survive a kill.

    RabbitMQ 3.10 does not find a queue or stream again that was made three seconds before.
    """

    async def make() -> None:
        broker = RabbitBroker(rabbit_server.url(), prefix="aged")
        await broker.open()
        await broker.cancel(["early"])
        await broker.publish([envelope("early"), envelope("early", delay=1.0)])
        await broker.close()

    rabbit_server.start()
    asyncio.run(make())
    return "aged", time.monotonic() + 4.0


@pytest.fixture
def url(rabbit_server: RabbitServer, aged: tuple[str, float]) -> str:
    rabbit_server.start()
    return rabbit_server.url()


def envelope(name: str, **fields: object) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"x", **fields})  # type: ignore[arg-type]  # any field


async def test_a_wrong_password_is_a_configuration_error(rabbit_server: RabbitServer) -> None:
    rabbit_server.start()
    broker = RabbitBroker(rabbit_server.url(password="wrong"))
    with pytest.raises(ConfigError, match="refuses the connection"):
        await broker.open()


async def test_a_queue_with_other_arguments_is_a_configuration_error(url: str, prefix: str) -> None:
    first = RabbitBroker(url, prefix=prefix)
    await first.open()
    await first.publish([envelope("a")])
    await first.close()
    second = RabbitBroker(f"{url}?queue_type=classic", prefix=prefix)
    await second.open()
    with pytest.raises(BatchRefused, match="made otherwise") as caught:
        await second.publish([envelope("b"), envelope("c", queue="other")])
    assert [(place, type(one)) for place, one in caught.value.errors.items()] == [(0, ConfigError)]
    assert (await second.depth())["other"].ready == 1
    await second.close()


async def test_calls_are_remembered_for_a_while_and_no_longer(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1", "2", "1"):
        await broker.publish([envelope("a")], call_id=name)
    assert (await broker.depth())["q"].ready == 2
    monkeypatch.setattr(driver, "CALLS_FOR", 0.0)
    await broker.publish([envelope("a")], call_id="3")
    assert list(broker._calls) == ["3"]


async def test_classic_queues_count_crashes_in_copies(url: str, prefix: str) -> None:
    broker = RabbitBroker(f"{url}?queue_type=classic", prefix=prefix)
    await broker.open()
    await broker.publish([envelope("a")])
    for crashes in range(3):
        consumer = broker.consumer(["q"], name="w", lease=60.0)
        await consumer.open()
        [got] = await consumer.fetch(1, PATIENCE)
        assert got.crashes == crashes
        await consumer.abort()
        await consumer.close()
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    [got] = await consumer.fetch(1, PATIENCE)
    assert got.crashes == 3
    assert not await consumer.settle([Done(got)])
    await consumer.close()
    await broker.close()


@asynccontextmanager
async def held_too_long(server: RabbitServer, broker: RabbitBroker) -> AsyncIterator[Holder]:
    """A consumer, and a message that it may hold for half a second."""
    await broker.publish([envelope("a")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    setting = "application:{}_env(rabbit, consumer_timeout{})"
    was = server.evaluate(setting.format("get", ""))
    server.evaluate(setting.format("set", ", 500"))
    try:
        await consumer.open()  # the server reads the setting when a channel opens
        [got] = await consumer.fetch(1, PATIENCE)
    finally:
        default = was.removeprefix("{ok,").removesuffix("}")
        server.evaluate(setting.format("set", f", {default}"))
    yield consumer, got
    await consumer.close()


async def test_a_consumer_that_holds_a_message_too_long_for_the_server_loses_its_lease(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    async with held_too_long(rabbit_server, broker) as (consumer, got):
        with pytest.raises(LeaseLost):
            await consumer.fetch(1, PATIENCE)
        assert await consumer.settle([Done(got)]) == [got]
    second = broker.consumer(["q"], name="w", lease=60.0)
    await second.open()
    [got] = await second.fetch(1, PATIENCE)
    assert (got.id, got.crashes) == ("a", 1)
    await second.close()


async def test_settling_a_message_that_was_held_too_long_returns_it_as_gone(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    async with held_too_long(rabbit_server, broker) as (consumer, got):
        async with asyncio.timeout(PATIENCE):
            # The two are counted one after the other, and a message may be in neither.
            while not (await broker.depth()).get("q", Depth()).ready:
                await asyncio.sleep(0.05)
        assert await consumer.settle([Done(got)]) == [got]


async def test_a_blocked_event_loop_does_not_cost_the_lease(url: str, prefix: str) -> None:
    broker = RabbitBroker(f"{url}?heartbeat=1", prefix=prefix)
    await broker.open()
    await broker.publish([envelope("a")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    [got] = await consumer.fetch(1, PATIENCE)
    time.sleep(3.2)  # like a task that blocks the loop for longer than the server waits
    assert not await consumer.settle([Done(got)])
    await consumer.close()
    await broker.close()


async def test_messages_beyond_the_limit_of_a_fetch_go_to_other_consumers(
    broker: RabbitBroker,
) -> None:
    busy = broker.consumer(["q", "p"], name="w", lease=60.0)
    await busy.open()
    assert not await busy.fetch(1, 0.05)  # from here on each queue sends its first message at once
    fetching = asyncio.create_task(busy.fetch(1, PATIENCE))
    await asyncio.sleep(0.05)  # it waits

    def stand_still() -> None:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass

    busy._running()._loop.call_soon_threadsafe(stand_still)  # so that it receives both at once
    await broker.publish([envelope("a"), envelope("b", queue="p")])
    [held] = await fetching
    other = broker.consumer(["q", "p"], name="w", lease=60.0)
    await other.open()
    [got] = await other.fetch(1, PATIENCE)
    assert {held.id, got.id} == {"a", "b"}
    await busy.close()
    await other.close()


async def test_a_server_without_memory_pushes_back(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    await broker.publish([envelope("a")])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    watermark = "vm_memory_monitor:set_vm_memory_high_watermark({})"
    rabbit_server.evaluate(watermark.format("0.00001"))
    try:
        with pytest.raises(BrokerFull):
            await _publish_for_ever(broker)
        [got] = await consumer.fetch(1, PATIENCE)  # until the queue is empty
        assert not await consumer.settle([Done(got)])
    finally:
        rabbit_server.evaluate(watermark.format("0.4"))
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await broker.publish([envelope("c")])
            except BrokerFull:
                await asyncio.sleep(0.05)
            else:
                break
    await consumer.close()


async def _publish_for_ever(broker: RabbitBroker) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            await broker.publish([envelope("b", queue="other")])


# --- TLS ----------------------------------------------------------------------------------------


async def test_tls_needs_a_server_with_a_trusted_certificate(
    rabbit_server: RabbitServer, certificates: Certificates, prefix: str
) -> None:
    rabbit_server.start()
    url = rabbit_server.tls_url(f"?cafile={certificates.authority}")
    broker = RabbitBroker(url, prefix=prefix)
    await broker.open()
    await broker.publish([envelope("a")])
    assert (await broker.depth())["q"].ready == 1
    await broker.close()
    stranger = RabbitBroker(rabbit_server.tls_url(), prefix=prefix)
    with pytest.raises(ConfigError, match="certificate"):
        await stranger.open()


async def test_missing_traits_are_refused_where_they_are_asked_for(broker: RabbitBroker) -> None:
    with pytest.raises(BatchRefused) as refusal:
        await broker.publish([Envelope(id="mine", queue="q", body=b"x", unique=True)])
    assert isinstance(refusal.value.errors[0], Unsupported)
    with pytest.raises(Unsupported, match="schedules"):
        broker.schedules()
    assert await broker.depth() == {}


# --- deaths -------------------------------------------------------------------------------------

DEADLY = """
import os, signal
from aiotaskq import TaskQueue

app = TaskQueue("deadly")

@app.task
async def die_once(path: str) -> str:
    if not os.path.exists(path):
        open(path, "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"
"""


async def test_a_task_that_killed_its_worker_runs_again(
    url: str, prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    environment = {
        **os.environ,
        "AIOTASKQ_BROKER_URL": url,
        "AIOTASKQ_PREFIX": prefix,
        "PYTHONPATH": str(tmp_path),
    }
    app = TaskQueue("caller", broker=url, prefix=prefix)
    worker = subprocess.Popen(
        [sys.executable, "-m", "aiotaskq", "worker", "deadly:app", "-l", "critical"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with app:
            handle = await app.send("deadly.die_once", (str(tmp_path / "mark"),))
            assert await handle.result(timeout=PATIENCE) == "alive"
            assert (await app.workers())[0].tasks == ("deadly.die_once",)
    finally:
        worker.terminate()
        worker.wait(PATIENCE)


async def test_a_killed_server_loses_nothing_that_was_confirmed(
    rabbit_server: RabbitServer, url: str, aged: tuple[str, float]
) -> None:
    prefix, durable_from = aged
    broker = RabbitBroker(url, prefix=prefix)
    await broker.open()
    ids = {f"{number}" for number in range(300)}
    await broker.publish([envelope(one) for one in ids])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    held = await consumer.fetch(100, PATIENCE)
    assert not await consumer.settle([Done(one) for one in held[:50]])
    done = {one.id for one in held[:50]}
    await asyncio.sleep(durable_from - time.monotonic())  # nearly always this time is over
    await asyncio.to_thread(rabbit_server.kill)
    with pytest.raises(BrokerUnavailable):
        await consumer.settle([Done(one) for one in held[50:]])
    await asyncio.to_thread(rabbit_server.start)
    await _until_it_is_back(broker)
    assert await consumer.settle([Done(one) for one in held[50:]]) == held[50:]
    with pytest.raises(LeaseLost):
        await consumer.fetch(1, 0)
    await consumer.close()
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    got: dict[str, int] = {}
    end = time.monotonic() + PATIENCE
    while len(got) < 250 and time.monotonic() < end:  # missing ones fail an assertion below
        some = await consumer.fetch(300, 1.0)
        got |= {one.id: one.crashes for one in some}
        assert not await consumer.settle([Done(one) for one in some])
    assert got.keys() == ids - done
    assert not any(got.values()), "a crash was counted, though its consumer lives"
    await consumer.close()
    await broker.close()


async def test_a_stream_that_does_not_run_yet_is_an_outage_and_no_configuration_error(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.publish([envelope("a")])
    answer = RabbitChannel.call
    text = "PRECONDITION_FAILED - stream queue 's' does not have a running replica on the node"
    refusals = [AmqpRefused(406, text)]

    async def call(channel: RabbitChannel, *methods: Frame) -> list[Any]:
        # Like a server that has just started: the stream exists, and cannot be read.
        if refusals and any(isinstance(one, Basic.Consume) and one.arguments for one in methods):
            channel.fail(refusals.pop())
        return await answer(channel, *methods)

    monkeypatch.setattr(RabbitChannel, "call", call)
    with pytest.raises(BrokerUnavailable, match="running replica"):
        await broker.depth()
    assert (await broker.depth())["q"].ready == 1


async def _until_it_is_back(broker: RabbitBroker) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await broker.depth()
            except BrokerUnavailable:
                await asyncio.sleep(0.1)
            else:
                return


async def test_a_refusal_that_nobody_waits_for_is_no_answer_to_the_next_call(
    broker: RabbitBroker,
) -> None:
    connection = broker._connection.get()
    for _ in range(5):
        await connection.ping()
        asking = asyncio.create_task(
            connection.call(Queue.Declare(queue="not there", passive=True))
        )
        await asyncio.sleep(0)  # it is sent
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await connection.ping()


async def test_a_queue_that_vanished_with_the_connection_is_declared_by_the_next_call(
    rabbit_server: RabbitServer, url: str, broker: RabbitBroker
) -> None:
    await broker.publish([envelope("a")])
    transport = await connect(parse_url(url))
    queue = broker._names.ready("q")
    await (await transport.open_channel()).call(Queue.Delete(queue=queue))
    await transport.close()
    connection = broker._connection.get()
    await asyncio.to_thread(rabbit_server.close_connections)
    async with asyncio.timeout(PATIENCE):
        while connection.is_connected:
            await asyncio.sleep(0.01)
    await broker.publish([envelope("b")])
    assert (await broker.depth())["q"].ready == 1
