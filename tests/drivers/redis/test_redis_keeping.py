"""What Redis keeps for long, and what becomes of it when the server is not as it was left."""

from __future__ import annotations

import asyncio
import json

import pytest
import redis

from aiotaskq.contract.records import DeadLimits, Depth, Maintained
from aiotaskq.contract.settlement import Dead, Done
from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import BrokerUnavailable, LeaseLost
from tests.drivers.redis.tools import PATIENCE, envelope
from tests.servers import RedisServer

DAY = 86_400.0


# --- what was cancelled -------------------------------------------------------------------------


async def test_what_is_delayed_for_longer_than_its_cancelling_is_known_never_runs(
    broker: RedisBroker, control: redis.Redis
) -> None:
    names = [f"{n}" for n in range(700)]  # more than one step looks at
    await broker.publish([envelope(name, delay=30 * DAY) for name in [*names, "kept"]])
    await broker.cancel(names)
    broker._time_shift = 8.5 * DAY
    await broker.cancel(["other"])  # which drops what is out of date
    assert control.zcard("aiotaskq:cancelled") == 1
    assert await broker.depth() == {"q": Depth(delayed=1)}
    broker._time_shift = 31 * DAY
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    assert [one.id for one in await consumer.fetch(1000, 0)] == ["kept"]
    await consumer.close()


async def test_what_many_hold_is_looked_through_in_steps(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(2600)])
    assert len(await consumer.fetch(2500, 0)) == 2500
    spared = await broker.cancel(["0", "1234", "2499", "2500", "2599"], running=False)
    assert spared == {"0", "1234", "2499"}
    rest = await consumer.fetch(1000, 0)
    assert [one.id for one in rest] == [f"{n}" for n in range(2501, 2599)]


async def test_what_is_settled_and_taken_meanwhile_is_spared_or_cancelled_and_never_lost(
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


# --- dead letters -------------------------------------------------------------------------------


async def test_a_dead_letter_is_readable_on_the_server(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    await broker.publish([envelope("a", body=b'{"task":"add"}')])
    [got] = await consumer.fetch(1, 0)
    await consumer.settle([Dead(got, "why", b'{"worker":"w"}')])
    [letter] = await broker.dead("q")
    [key] = control.zrange("aiotaskq:{q}:dead", 0, -1)
    assert key == letter.key
    stored = str(control.hget("aiotaskq:{q}:letters", letter.key))
    head, rest = stored.split("\n", 1)
    assert json.loads(head)["reason"] == "why"
    assert rest == '{"worker":"w"}0 0 - a\n{"task":"add"}'


async def test_many_dead_letters_are_read_and_trimmed_in_steps(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(250)])
    await consumer.settle([Dead(one, "why") for one in await consumer.fetch(250, 0)])
    letters = await broker.dead("q", 220)
    assert [one.id for one in letters] == [f"{n}" for n in range(249, 29, -1)]
    assert len({one.key for one in letters}) == 220
    limits = DeadLimits(most=10)
    rounds = [(await broker.maintain(limits)).trimmed for _ in range(4)]
    assert rounds == [100, 100, 40, 0]
    assert [one.id for one in await broker.dead("q")] == [f"{n}" for n in range(249, 239, -1)]


async def test_what_is_no_key_of_a_letter_is_refused(broker: RedisBroker) -> None:
    with pytest.raises(ValueError, match="'x' is not the key of a dead letter: give one that"):
        await broker.dead("q", before="x")


# --- what others did to the server --------------------------------------------------------------


async def test_a_key_of_a_wrong_type_stops_its_own_queue_only(
    broker: RedisBroker, control: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.publish([envelope(f"{q}{n}", queue=q, delay=5.0) for q in "abc" for n in range(2)])
    control.delete("aiotaskq:{b}:delayed")
    control.set("aiotaskq:{b}:delayed", "junk")
    broker._time_shift = 6.0
    await broker.maintain()
    assert await broker.depth() == {"a": Depth(ready=2), "c": Depth(ready=2)}
    await broker.publish([envelope("a2", queue="a", delay=1.0)])
    broker._time_shift = 8.0
    assert await broker.maintain() == Maintained(promoted=1)
    [record] = caplog.records
    assert record.__dict__["event"] == "redis_odd_data"
    assert "'b'" in record.getMessage()


async def test_a_server_that_refuses_is_not_taken_for_odd_data(
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
async def test_an_element_that_is_none_stops_nothing(
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
async def test_a_server_that_lost_its_data_is_told_of_once_and_found_out_by_asking_for_news(
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


async def test_what_a_consumer_tells_of_itself_goes_with_it(
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
