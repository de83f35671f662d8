"""Calls of the PostgreSQL broker whose answers are lost, or that are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import pytest

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Dead, Done, Release
from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.errors import BrokerUnavailable
from tests.drivers.postgres.tools import (
    PATIENCE,
    Join,
    envelope,
    ids,
    losing,
    losing_commit,
)
from tests.servers import PostgresServer


async def test_messages_of_a_fetch_without_an_answer_come_with_the_next(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    await broker.publish([envelope(one) for one in "abcde"])
    losing(broker, monkeypatch, messages_sql.TAKE)
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    assert await broker.depth() == {"q": Depth(ready=2, held=3)}
    first = await consumer.fetch(2, 0)
    second = await consumer.fetch(5, 0)
    third = await consumer.fetch(5, 0)
    assert [ids(first), ids(second), ids(third)] == [["a", "b"], ["c"], ["d", "e"]]
    assert not await consumer.settle([Done(one) for one in (*first, *second, *third)])
    assert await broker.depth() == {}


async def test_messages_of_a_lost_answer_come_in_the_order_of_queues_and_priorities(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join("q", "p")
    await broker.publish([envelope("p1", queue="p"), envelope("q1"), envelope("q2", priority=9)])
    losing(broker, monkeypatch, messages_sql.TAKE)
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    assert ids(await consumer.fetch(3, 0)) == ["q2", "q1", "p1"]


async def test_messages_of_a_lost_answer_come_though_others_were_written_to_the_consumer(
    broker: PostgresBroker,
    join: Join,
    database: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = await join()
    await broker.publish([envelope("a"), envelope("b")])
    losing(broker, monkeypatch, messages_sql.TAKE)
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(2, 0)
    await database.execute(
        "INSERT INTO aiotaskq_messages (id, queue, priority, body, consumer, token)"
        " VALUES ('odd', 'elsewhere', 0, '', $1, $2)",
        consumer._number,
        consumer._token,
    )
    got = await consumer.fetch(5, 0)
    assert ids(got) == ["a", "b"]
    assert not await consumer.settle([Done(one) for one in got])


async def test_a_fetch_that_is_cancelled_while_it_wakes_others_loses_nothing(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    await broker.publish([envelope(name, delay=0.0001) for name in "ab"])
    await asyncio.sleep(0.01)
    wakes = asyncio.Event()

    async def wake(work: object) -> None:
        wakes.set()
        await asyncio.sleep(PATIENCE)

    with monkeypatch.context() as patched:
        patched.setattr(broker._notifier, "wake", wake)
        fetching = asyncio.create_task(consumer.fetch(1, PATIENCE))
        await asyncio.wait_for(wakes.wait(), PATIENCE)
        fetching.cancel()
        await asyncio.wait([fetching])
    assert ids(await consumer.fetch(2, 0)) == ["a"]
    assert ids(await consumer.fetch(2, 0)) == ["b"]


async def test_a_cancelled_message_is_deleted_though_the_server_was_away(
    broker: PostgresBroker,
    join: Join,
    database: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held for good it would keep its consumer from ever being given a suspect."""
    consumer = await join()
    await broker.publish([envelope("a")])
    await database.execute("INSERT INTO aiotaskq_cancelled VALUES ('a', 1e10)")
    fetch = broker._pool.fetch

    async def failing(template: str, *arguments: Any, repeat: bool = True) -> Any:
        if template == messages_sql.DONE:
            raise BrokerUnavailable("away")
        return await fetch(template, *arguments, repeat=repeat)

    with monkeypatch.context() as patched:
        patched.setattr(broker._pool, "fetch", failing)
        with pytest.raises(BrokerUnavailable):
            await consumer.fetch(1, 0)
    assert not await consumer.fetch(1, 0)
    assert await broker.depth() == {}


async def test_a_fetch_that_comes_too_late_takes_nothing(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    losing(broker, monkeypatch, messages_sql.TAKE)
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    lost = consumer._token
    assert not await consumer.fetch(3, 0)
    await broker.publish([envelope("a")])
    late = await broker._pool.fetch(messages_sql.TAKE, 0.0, consumer._number, lost, ["q"], 3, True)
    assert late == []
    assert ids(await consumer.fetch(3, 0)) == ["a"]


@pytest.mark.parametrize("kind", [Done, Release, Dead])
async def test_a_settlement_whose_answer_was_lost_may_be_repeated(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    consumer = await join()
    await broker.publish([envelope("a"), envelope("b")])
    a, b = await consumer.fetch(2, 0)
    batch = [kind(a, "bad") if kind is Dead else kind(a)]
    pool = broker._pool
    transact = pool.transact

    async def failing(*arguments: Any, **more: Any) -> Any:
        await transact(*arguments, **more)
        monkeypatch.setattr(pool, "transact", transact)
        raise BrokerUnavailable("the answer was lost")

    if kind is Done:
        losing(broker, monkeypatch, messages_sql.DONE)
    else:
        monkeypatch.setattr(pool, "transact", failing)
    with pytest.raises(BrokerUnavailable):
        await consumer.settle(batch)
    assert await consumer.settle(batch) == []
    assert ids(await consumer.settle(batch)) == ["a"]  # by now it is known
    assert await consumer.settle([Done(b)]) == []
    assert (await broker.depth()).get("q", Depth()).held == 0


async def test_a_lease_that_began_without_an_answer_is_begun_once(
    broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    losing_commit(broker, monkeypatch)
    with pytest.raises(BrokerUnavailable):
        await consumer.open()
    await consumer.open()
    assert [one.id for one in await broker.consumers()] == [consumer.id]
    await consumer.close()
    assert not await broker.consumers()


async def test_after_a_lost_lease_nothing_counts_as_settled_by_a_lost_answer(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    [got] = await consumer.fetch(1, 0)
    losing(broker, monkeypatch, messages_sql.DONE)
    with pytest.raises(BrokerUnavailable):
        await consumer.settle([Done(got)])
    lease = broker.lease(consumer.grant)
    await lease.end("killed")
    await lease.close()
    assert ids(await consumer.settle([Done(got)])) == ["a"]


async def test_a_server_that_is_killed_keeps_stored_and_held_messages(
    broker: PostgresBroker, join: Join, postgres_server: PostgresServer
) -> None:
    consumer = await join()
    batch = [envelope(f"{number}") for number in range(50)]
    await broker.publish(batch, call_id="call")
    held = await consumer.fetch(20, 0)
    postgres_server.kill()  # blocks the loop, so that nobody can have seen it
    postgres_server.start()
    await broker.publish(batch, call_id="call")
    assert await broker.depth() == {"q": Depth(ready=30, held=20)}
    assert not await _patiently(lambda: consumer.settle([Done(one) for one in held]))
    assert len(await _patiently(lambda: consumer.fetch(50, 0))) == 30


async def _patiently(call: Callable[[], Awaitable[Sequence[Delivery]]]) -> Sequence[Delivery]:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                await asyncio.sleep(0.05)
