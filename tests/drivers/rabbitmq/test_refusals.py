"""Entries that the server never takes, or has no room for: they are told, and stop no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from aiotaskq import RetryLater, Snooze, TaskQueue
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.rabbitmq import RabbitBackend, RabbitBroker, delays, messages
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.errors import BatchRefused, BrokerFull, PayloadTooLarge
from tests.servers import RabbitServer

PATIENCE = 30.0


def envelope(name: str, **fields: object) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"x", **fields})  # type: ignore[arg-type]  # any field


async def consume(broker: RabbitBroker, *queues: str) -> RabbitConsumer:
    consumer = broker.consumer(queues or ("q",), name="w", lease=60.0)
    await consumer.open()
    return consumer


@contextmanager
def largest_message(server: RabbitServer, size: int) -> Iterator[None]:
    """Have the server refuse messages that are larger, on channels that are opened from now on."""
    setting = "application:{}_env(rabbit, max_message_size{})"
    was = server.evaluate(setting.format("get", ""))
    server.evaluate(setting.format("set", f", {size}"))
    try:
        yield
    finally:
        default = was.removeprefix("{ok,").removesuffix("}")
        server.evaluate(setting.format("set", f", {default}"))


@contextmanager
def full_at(server: RabbitServer, prefix: str, queue: str, length: int) -> Iterator[None]:
    """Have a queue refuse messages beyond a length, by a policy as an operator sets it."""
    name = f"<<{','.join(str(one) for one in f'full-{prefix}'.encode())}>>"
    pattern = f"<<{','.join(str(one) for one in f'^{prefix}[.]queue[.]{queue}$'.encode())}>>"
    server.evaluate(
        f'rabbit_policy:set(<<"/">>, {name}, {pattern},'
        f' [{{<<"max-length">>, {length}}}, {{<<"overflow">>, <<"reject-publish">>}}],'
        ' 0, <<"queues">>, <<"a test">>)'
    )
    try:
        yield
    finally:
        server.evaluate(f'rabbit_policy:delete(<<"/">>, {name}, <<"a test">>)')


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 100_000])
async def test_a_message_that_is_too_large_for_the_server_is_the_only_one_refused(
    rabbit_server: RabbitServer, broker: RabbitBroker, prefix: str, size: int
) -> None:
    second = broker.clone()
    with largest_message(rabbit_server, size):
        await second.open()
        for name in ("a", "b"):  # the second time the limit is known
            batch = [envelope(f"{name}{number}") for number in range(5)]
            batch[2] = envelope("large", body=b"y" * (size + 1))
            batch[4] = envelope(f"{name}4", body=b"y" * size)
            refused, other = await asyncio.gather(
                second.publish(batch),
                second.publish([envelope(f"{name} other")]),
                return_exceptions=True,
            )
            assert isinstance(refused, BatchRefused)
            [(place, error)] = refused.errors.items()
            assert place == 2
            assert isinstance(error, PayloadTooLarge)
            assert (error.size, error.limit) == (size + 1, size)
            assert f"max_message_size is {size}" in str(error)
            assert other == ()
    await second.close()
    consumer = await consume(broker)
    got = [one.id for one in await consumer.fetch(100, PATIENCE)]
    assert sorted(got) == sorted(
        f"{name}{one}" for name in "ab" for one in ("0", "1", "3", "4", " other")
    ), "each good one is stored once"
    await consumer.close()


async def test_a_body_of_a_growing_series_is_stored_in_its_order(broker: RabbitBroker) -> None:
    sizes = [10, 2000, 5, 70_000, 3, 300_000, 1]
    await broker.publish([envelope(str(one), body=b"x" * one) for one in sizes])
    consumer = await consume(broker)
    got = await consumer.fetch(100, PATIENCE)
    assert [(one.id, len(one.body)) for one in got] == [(str(one), one) for one in sizes]
    await consumer.close()


async def test_a_settlement_that_is_too_large_for_the_server_leaves_the_others(
    rabbit_server: RabbitServer, broker: RabbitBroker
) -> None:
    await broker.publish([envelope(one) for one in "abcde"])
    with largest_message(rabbit_server, 2000):
        consumer = await consume(broker)
        a, b, c, d, e = await consumer.fetch(5, PATIENCE)
        batch: list[Settlement] = [
            Done(a),
            Again(b, envelope("b", body=b"y" * 3000)),
            Dead(c, "why", b"z" * 3000),
            Release(d),
            Again(e, envelope("e", body=b"y" * 1500)),
        ]
        with pytest.raises(BatchRefused) as caught:
            await consumer.settle(batch)
        errors = caught.value.errors
        assert {place: type(one) for place, one in errors.items()} == {
            1: PayloadTooLarge,
            2: PayloadTooLarge,
        }
        depth = (await broker.depth())["q"]
        assert (depth.ready, depth.held, depth.dead) == (2, 2, 0)
        assert not await consumer.settle([Dead(b, "too large"), Dead(c, "why")])
        assert (await broker.depth())["q"].dead == 2
        await consumer.close()


def outcome(name: str, reply_to: str, size: int = 1) -> Outcome:
    return Outcome(
        task_id=name,
        status=TaskStatus.SUCCESS,
        result=msgspec.Raw(b'"' + b"x" * size + b'"'),
        reply_to=reply_to,
    )


async def test_a_result_that_is_too_large_for_the_server_leaves_the_others(
    rabbit_server: RabbitServer, url: str, prefix: str
) -> None:
    with largest_message(rabbit_server, 2000):
        backend = RabbitBackend(url, prefix=prefix)
        await backend.open()
        address = await backend.reply_address()
        batch = [
            outcome("a", address),
            outcome("large", address, 3000),
            outcome("nobody's", RabbitNames(prefix, "quorum").replies("0" * 32)),
            outcome("b", address),
        ]
        with pytest.raises(BatchRefused) as caught:
            await backend.store(batch, 60.0)
        assert [(one, type(error)) for one, error in caught.value.errors.items()] == [
            (1, PayloadTooLarge)
        ]
        async with asyncio.timeout(PATIENCE):
            while len(await backend.load(["a", "b"])) < 2:
                await asyncio.sleep(0.01)
        assert not await backend.load(["large"])
        await backend.close()


async def test_a_result_that_cannot_be_written_leaves_the_others(url: str, prefix: str) -> None:
    backend = RabbitBackend(url, prefix=prefix)
    await backend.open()
    address = await backend.reply_address()
    odd = msgspec.structs.replace(outcome("odd", address), traceback="\udcff")
    with pytest.raises(BatchRefused) as caught:
        await backend.store([outcome("a", address), odd, outcome("b", address)], 60.0)
    assert list(caught.value.errors) == [1]
    async with asyncio.timeout(PATIENCE):
        while len(await backend.load(["a", "b"])) < 2:
            await asyncio.sleep(0.01)
    await backend.close()


async def test_results_may_be_kept_for_years(url: str, prefix: str) -> None:
    backend = RabbitBackend(url, prefix=prefix)
    await backend.open()
    address = await backend.reply_address()
    assert not await backend.store([outcome("a", address)], 10.0 * 365 * 86_400)
    async with asyncio.timeout(PATIENCE):
        while not await backend.load(["a"]):
            await asyncio.sleep(0.01)
    await backend.close()


# --- full queues --------------------------------------------------------------------------------


async def test_only_the_messages_of_a_full_queue_are_refused(
    rabbit_server: RabbitServer, broker: RabbitBroker, prefix: str
) -> None:
    await broker.publish([envelope("first", queue="full"), envelope("first")])
    with full_at(rabbit_server, prefix, "full", 1):
        async with asyncio.timeout(PATIENCE):
            while True:  # the policy takes a moment
                try:
                    await broker.publish([envelope("second", queue="full")])
                except BrokerFull:
                    break
        before = (await broker.depth())["full"].ready
        batch = [envelope(f"{number}") for number in range(8)]
        batch.insert(3, envelope("no room", queue="full"))
        with pytest.raises(BatchRefused) as caught:
            await broker.publish(batch)
        assert [(one, type(error)) for one, error in caught.value.errors.items()] == [
            (3, BrokerFull)
        ]
        depth = await broker.depth()
        assert (depth["q"].ready, depth["full"].ready) == (9, before)
        consumer = await consume(broker)
        a, b, *_ = await consumer.fetch(9, PATIENCE)
        with pytest.raises(BatchRefused) as caught:
            await consumer.settle([Again(a, envelope("a", queue="full")), Done(b)])
        assert [(one, type(error)) for one, error in caught.value.errors.items()] == [
            (0, BrokerFull)
        ]
        assert (await broker.depth())["q"].held == 8
        assert not await consumer.settle([Done(a)])
        await consumer.close()


# --- delays -------------------------------------------------------------------------------------


async def test_a_delay_of_years_is_stored_and_an_endless_expiry_too(broker: RabbitBroker) -> None:
    years = 730 * 86_400.0
    await broker.publish(
        [
            envelope("a", delay=years),
            envelope("b", not_before=time.time() + 100 * years),
            envelope("c", delay=1e15),
            envelope("d", expires_in=1e300),
        ]
    )
    consumer = await consume(broker)
    [got] = await consumer.fetch(10, PATIENCE)
    assert (got.id, got.expired) == ("d", False)
    assert not await consumer.settle([Again(got, envelope("d", delay=years))])
    assert not await consumer.fetch(10, 0.1)
    await consumer.close()


async def test_a_message_whose_way_is_shorter_than_its_delay_goes_it_again(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delays, "LONGEST_DELAY", 0.2)
    monkeypatch.setattr(messages, "LONGEST_DELAY", 0.2)
    consumer = await consume(broker)
    published_at = time.time()
    await broker.publish([envelope("a", delay=1.0), envelope("b")])
    got: dict[str, float] = {}
    async with asyncio.timeout(PATIENCE):
        while len(got) < 2:
            got |= {one.id: time.time() for one in await consumer.fetch(10, 1.0)}
    assert got["a"] - published_at >= 1.0
    assert (await broker.depth())["q"].held == 2
    await consumer.close()


async def test_a_task_that_asks_for_years_stops_no_other(url: str, prefix: str) -> None:
    app = TaskQueue("t", broker=url, prefix=prefix)

    @app.task
    async def later(kind: str) -> None:
        raise Snooze(730 * 86_400.0) if kind == "snooze" else RetryLater(500 * 86_400.0)

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    async with app, app.worker():
        await later.kiq("snooze")
        await later.kiq("retry")
        handles = [await double.kiq(number) for number in range(5)]
        assert [await one.result(timeout=PATIENCE) for one in handles] == [0, 2, 4, 6, 8]


async def test_a_name_that_is_too_long_in_bytes_is_announced_to_nobody(
    url: str, prefix: str
) -> None:
    app = TaskQueue("t", broker=url, prefix=prefix)

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    async with app, app.worker():
        with pytest.raises(Exception, match="too long for RabbitMQ"):
            await double.with_options(queue="é" * 45).kiq(1)
        broker = await app.broker()
        for _ in range(2):
            await broker.maintain()
        handle = await double.kiq(1)
        assert await handle.result(timeout=PATIENCE) == 2
