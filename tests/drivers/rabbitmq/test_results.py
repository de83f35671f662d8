"""Results over RabbitMQ, and RabbitMQ beside other result backends."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from pamqp.base import Frame

from aiotaskq import TaskQueue
from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.rabbitmq import RabbitBackend
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.errors import BackendUnavailable, ConfigError
from aiotaskq.testing.conformance.result_listener import outcome, value
from tests.servers import RabbitServer

PATIENCE = 120.0


@pytest.mark.parametrize("which", ["rpc", "none", "redis and rpc", "redis", "postgresql"])
async def test_each_combination_of_broker_and_results_returns_values(
    which: str, url: str, prefix: str, redis_url: str, postgres_url: str
) -> None:
    brokers = {"redis and rpc": redis_url}
    backends = {
        "rpc": "rpc://",
        "none": None,
        "redis and rpc": url,
        "redis": redis_url,
        "postgresql": postgres_url,
    }
    app = TaskQueue("t", broker=brokers.get(which, url), backend=backends[which], prefix=prefix)

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    @app.task
    async def fail() -> None:
        raise ZeroDivisionError("by zero")

    await asyncio.to_thread(app.drivers)  # imports them, which reads files
    async with app, app.worker(concurrency=10):
        handles = await app.kiq_many([double.s(number) for number in range(50)])
        values = [await handle.result(timeout=PATIENCE) for handle in handles]
        assert values == [2 * number for number in range(50)]
        with pytest.raises(ZeroDivisionError):
            await (await fail.kiq()).result(timeout=PATIENCE)
        later = await double.with_options(countdown=0.05).kiq(4)
        assert await later.result(timeout=PATIENCE) == 8


async def test_a_result_is_for_the_process_that_sent_and_outlives_its_connection(
    rabbit_server: RabbitServer, url: str, prefix: str
) -> None:

    sender = RabbitBackend(url, prefix=prefix)
    await sender.open()
    address = await sender.reply_address()
    rabbit_server.close_connections()

    worker = RabbitBackend(url, prefix=prefix)
    await worker.open()
    sent = msgspec.structs.replace(outcome("a", value=1), reply_to=address)
    assert not await worker.store([sent], 60.0)
    async with asyncio.timeout(PATIENCE):
        while "a" not in (found := await sender.load(["a"])):
            await asyncio.sleep(0.01)
    assert value(found["a"]) == 1
    await worker.close()
    await sender.close()


def _listening() -> set[asyncio.Task[Any]]:
    return {one for one in asyncio.all_tasks() if one.get_name() == "aiotaskq-replies"}


async def test_concurrent_calls_of_reply_address_start_one_receiver(url: str, prefix: str) -> None:
    backend = RabbitBackend(url, prefix=prefix)
    await backend.open()
    addresses = await asyncio.gather(*(backend.reply_address() for _ in range(4)))
    assert len(set(addresses)) == len(_listening()) == 1
    await backend.close()
    assert not _listening()


async def test_a_backend_that_is_closed_during_reply_address_starts_no_receiver(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = RabbitBackend(url, prefix=prefix)
    await backend.open()
    declare = RabbitConnection.declare

    async def declare_and_close(connection: RabbitConnection, *declarations: Frame) -> list[Any]:
        replies = await declare(connection, *declarations)
        await backend.close()
        return replies

    monkeypatch.setattr(RabbitConnection, "declare", declare_and_close)
    with pytest.raises(BackendUnavailable):
        await backend.reply_address()
    assert not _listening()


async def test_results_are_received_again_when_only_their_channel_was_lost(
    url: str, prefix: str
) -> None:
    sender, worker = RabbitBackend(url, prefix=prefix), RabbitBackend(url, prefix=prefix)
    await sender.open()
    await worker.open()
    arriving = sender.subscribe()
    assert await anext(arriving) == []
    address = await sender.reply_address()
    assert await anext(arriving) == []  # it listens
    connection = sender._connection.get()
    channels = (await connection.transport())._connection.channels.values()
    [channel] = [one for one in channels if "replies" in one._consumers]  # type: ignore[union-attr]  # our own
    channel.ack([999])  # type: ignore[union-attr]  # which the server refuses: there is no such delivery
    assert await anext(arriving) == []  # it listens again
    sent = msgspec.structs.replace(outcome("a", value=1), reply_to=address)
    assert not await worker.store([sent], 60.0)
    async with asyncio.timeout(PATIENCE):
        [got] = await anext(arriving)
    assert isinstance(got, Outcome)
    assert got.task_id == "a"
    await arriving.aclose()
    await worker.close()
    await sender.close()


def test_rpc_without_rabbitmq_is_refused() -> None:
    app = TaskQueue("t", broker="memory://", backend="rpc://")
    with pytest.raises(ConfigError, match="amqp://"):
        app.drivers()


@pytest.mark.may_leave("the thread of plain code, once started, stays for good")
async def test_plain_code_gets_results_over_rabbitmq(url: str, prefix: str) -> None:
    app = TaskQueue("t", broker=url, prefix=prefix)

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    async with app.worker():
        result = await asyncio.to_thread(add.delay, 2, 8)
        assert await asyncio.to_thread(result.get, timeout=PATIENCE) == 10
