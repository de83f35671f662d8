"""Data that Redis keeps for long, many messages, and data that others changed or lost."""

from __future__ import annotations

import asyncio

import pytest
import redis

from aiotaskq.contract.records import Depth, Maintained
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import BrokerUnavailable, LeaseLost
from tests.drivers.redis.tools import PATIENCE, envelope
from tests.servers import RedisServer

DAY = 86_400.0


# --- cancelled and many messages ----------------------------------------------------------------


async def test_a_cancelled_message_never_runs_however_long_it_is_delayed(
    broker: RedisBroker, control: redis.Redis
) -> None:
    names = [f"{n}" for n in range(700)]  # more than one step looks at
    await broker.publish([envelope(name, delay=30 * DAY) for name in [*names, "kept"]])
    await broker.cancel(names)
    broker._time_shift = 8.5 * DAY
    await broker.cancel(["other"])  # which drops old notes
    assert control.zcard("aiotaskq:cancelled") == 1
    assert await broker.depth() == {"q": Depth(delayed=1)}
    broker._time_shift = 31 * DAY
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    assert [one.id for one in await consumer.fetch(1000, 0)] == ["kept"]
    await consumer.close()


async def test_many_held_messages_are_searched_in_steps(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(2600)])
    assert len(await consumer.fetch(2500, 0)) == 2500
    spared = await broker.cancel(["0", "1234", "2499", "2500", "2599"], running=False)
    assert spared == {"0", "1234", "2499"}
    rest = await consumer.fetch(1000, 0)
    assert [one.id for one in rest] == [f"{n}" for n in range(2501, 2599)]


async def test_messages_fetched_during_a_cancel_are_either_held_or_cancelled(
    broker: RedisBroker, redis_url: str
) -> None:
    other = RedisBroker(redis_url)
    await other.open()
    consumer = other.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    names = [f"{n}" for n in range(3000)]
    await broker.publish([envelope(name) for name in names])
    got = set[str]()

    async def work() -> None:
        while batch := await consumer.fetch(7, 0):
            got.update(one.id for one in batch)
            await consumer.settle([Done(one) for one in batch[:3]])

    working = asyncio.create_task(work())
    spared = set[str]()
    for name in reversed(names):
        if working.done():
            break
        spared |= set(await broker.cancel([name], running=False))
        told = (await consumer.news()).cancelled
        assert name in told or name in spared
    await working
    assert spared <= got
    await consumer.close()
    await other.close()


async def test_many_cancelled_messages_do_not_hide_those_behind_them(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(5000)])
    await broker.cancel([f"{n}" for n in range(5000)])
    await broker.publish([envelope("a")])
    assert [one.id for one in await consumer.fetch(10, 0)] == ["a"]


async def test_a_fetch_takes_more_than_one_script_can_return(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(2500)])
    assert [one.id for one in await consumer.fetch(2300, 0)] == [f"{n}" for n in range(2300)]
    assert len(await consumer.fetch(2300, 0)) == 200


# --- malformed and lost data ---------------------------------------------------------------------


async def test_a_server_that_lost_its_data_is_used_again(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    await broker.publish([envelope("a")])
    [got] = await consumer.fetch(1, 0)
    control.flushall()
    assert [one.id for one in await consumer.settle([Done(got)])] == ["a"]
    with pytest.raises(LeaseLost):
        await consumer.fetch(1, 0)
    await broker.publish([envelope("b")])
    assert await broker.depth() == {"q": Depth(ready=1)}
    assert control.smembers("aiotaskq:queues") == {"q"}


async def test_a_key_of_a_wrong_type_stops_no_queue(
    broker: RedisBroker, control: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.publish([envelope(f"{q}{n}", queue=q, delay=5.0) for q in "abc" for n in range(2)])
    control.delete("aiotaskq:{b}:delayed")
    control.set("aiotaskq:{b}:delayed", "junk")
    broker._time_shift = 6.0
    assert (await broker.maintain()).aside == 1
    assert await broker.depth() == {"a": Depth(ready=2), "c": Depth(ready=2)}
    await broker.publish([envelope(f"{q}2", queue=q, delay=1.0) for q in "ab"])
    broker._time_shift = 8.0
    assert await broker.maintain() == Maintained(promoted=2)
    [record] = caplog.records
    assert "{b}:delayed" in record.getMessage()


async def test_a_server_that_refuses_writes_is_not_taken_for_malformed_data(
    broker: RedisBroker, control: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.publish([envelope("a", delay=5.0)])
    control.replicaof("127.0.0.1", 1)
    broker._time_shift = 6.0
    try:
        with pytest.raises(BrokerUnavailable):
            await broker.maintain()
    finally:
        control.replicaof("NO", "ONE")
    assert not caplog.records


@pytest.mark.parametrize("key", ["delayed", "held", "fenced", "consumers", "levels", "dead"])
async def test_a_foreign_element_in_a_key_stops_nothing(
    broker: RedisBroker, control: redis.Redis, key: str
) -> None:
    base = "aiotaskq:{q}:"
    dying = broker.consumer(["q"], name="w", lease=60.0)
    await dying.open()
    await broker.publish([envelope("a"), envelope("b", delay=5.0)])
    await dying.fetch(1, 0)
    match key:
        case "held":
            control.hset(f"{base}held:{dying.id}", "junk", "junk")
        case "levels":
            control.sadd(f"{base}levels", "junk")
        case _:
            control.zadd(f"{base}{key}", {"junk": 1.0})
    broker._time_shift = 61.0
    for _ in range(2):
        await broker.maintain()
    await broker.depth()
    await broker.dead("q")
    await broker.consumers()
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    got = await consumer.fetch(10, 0)
    assert {"a", "b"} <= {one.id for one in got}
    await consumer.close()


@pytest.mark.parametrize("restarted", [False, True])
async def test_lost_data_is_logged_once_and_ends_the_lease(
    redis_server: RedisServer,
    broker: RedisBroker,
    consumer: RedisConsumer,
    control: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    restarted: bool,
) -> None:
    await broker.maintain()
    assert not caplog.records
    control.flushall()
    if restarted:
        control.client_kill_filter(_type="normal", skipme=True)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await consumer.news()
            except LeaseLost:
                break
            except BrokerUnavailable:
                await asyncio.sleep(0.01)
    for _ in range(3):
        await broker.maintain()
        await broker.publish([envelope("a")])
    [record] = caplog.records
    assert (record.levelname, record.__dict__["event"]) == ("CRITICAL", "redis_lost_data")


async def test_the_description_of_a_consumer_is_removed_with_it(
    broker: RedisBroker, control: redis.Redis
) -> None:
    ends = []
    for number in range(3):
        consumer = broker.consumer(["q", "p"], name="w", lease=60.0, about=b"\n%d" % number)
        await consumer.open()
        ends.append(consumer)
    found = {one.id: one for one in await broker.consumers()}
    assert [found[one.id].about for one in ends] == [b"\n0", b"\n1", b"\n2"]
    assert {one.queues for one in found.values()} == {("q", "p")}
    await ends[0].close()
    lease = broker.lease(ends[1].grant)
    await lease.end("killed")
    await lease.close()
    assert {one.id for one in await broker.consumers()} == {ends[2].id}
    broker._time_shift = 61.0
    assert not await broker.consumers()
    await broker.maintain()
    assert {*control.hkeys("aiotaskq:{q}:meta"), *control.hkeys("aiotaskq:{p}:meta")} == {"beat"}


async def test_an_outcome_of_an_earlier_release_is_read(
    backend: RedisBackend, control: redis.Redis
) -> None:
    control.set("aiotaskq:result:a", '{"task_id":"a","status":"SUCCESS","result":[1]}')
    assert (await backend.load(["a"]))["a"].history == ()
