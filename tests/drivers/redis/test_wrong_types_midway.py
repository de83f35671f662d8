"""Scripts that meet a key of another type behind the first of their writes, and are run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import redis

from aiotaskq.contract.records import DeadLimits, Depth, StoredSchedule
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.redis import RedisBackend, RedisBroker, scripts
from aiotaskq.drivers.redis.connection import RedisConnection
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import BrokerUnavailable
from tests.drivers.redis.tools import envelope, outcome

BASE = "aiotaskq:{q}:"
OTHER = "aiotaskq:{p}:"


def connection_of(broker: RedisBroker) -> RedisConnection:
    return broker._client.connection


def stored(control: redis.Redis, base: str = BASE) -> Counter[str]:
    """Return how often each id waits in a queue."""
    levels = (*range(1, 10), "suspects", "odd")
    lists = [f"{base}ready", *(f"{base}ready:{level}" for level in levels)]
    entries = [str(one) for key in lists for one in control.lrange(key, 0, -1)]
    entries += map(str, control.zrange(f"{base}delayed", 0, -1))
    return Counter(one.partition("\n")[2] for one in entries)


# --- parcels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["delayed", "ready", "ready:3", "levels"])
async def test_no_message_is_lost_by_a_parcel_that_cannot_be_filled(
    broker: RedisBroker, control: redis.Redis, wrong: str
) -> None:
    await broker.publish([envelope("a", priority=7), envelope("b", priority=7)])
    control.delete(BASE + wrong)
    control.set(BASE + wrong, "x")
    [[_, _, _, contents]] = await connection_of(broker).script(
        scripts.PACK, [BASE], [1000, 10**6, 4, "parcel", 2]
    )
    assert [one.partition(b"\n")[2] for one in contents[1::2]] == [b"a", b"b"]
    assert not stored(control)


@pytest.mark.parametrize("wrong", ["delayed", "ready:7", "ready:odd"])
async def test_a_parcel_is_unpacked_once(
    broker: RedisBroker, control: redis.Redis, wrong: str
) -> None:
    control.set(BASE + wrong, "x")
    where = ("0", "7", "odd", "d9999999999")
    contents = [word for one in where for word in (one, f"0 0 - {one}\n{one}")]
    await connection_of(broker).script(scripts.UNPACK, [BASE], ["parcel", *contents])
    assert stored(control) == Counter(where)


# --- sending ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["delayed", "ready:5", "ready", "levels"])
@pytest.mark.parametrize("call_id", ["c1", None])
async def test_a_call_of_publish_stores_each_message_once(
    broker: RedisBroker, control: redis.Redis, wrong: str, call_id: str | None
) -> None:
    control.set(BASE + wrong, "x")
    batch = [
        envelope("a"),
        envelope("b", delay=600.0),
        envelope("c", priority=5),
        envelope("d"),
        envelope("e", expires_in=60.0),
        envelope("f", expires_in=60.0, priority=5),
        envelope("g", unique=True),
    ]
    assert not await broker.publish(batch, call_id=call_id)
    assert stored(control) == Counter("abcdefg")


@pytest.mark.parametrize("wrong", ["ready:5", "delayed"])
async def test_messages_of_one_kind_are_stored_once(
    broker: RedisBroker, control: redis.Redis, wrong: str
) -> None:
    control.set(BASE + wrong, "x")
    fields = {"expires_in": 60.0} if wrong == "ready:5" else {"unique": True}
    last = {"priority": 5} if wrong == "ready:5" else {"delay": 600.0}
    assert not await broker.publish([envelope("a", **fields), envelope("b", **fields, **last)])
    assert stored(control) == Counter("ab")


async def test_the_runs_of_a_schedule_are_stored_once(
    broker: RedisBroker, control: redis.Redis
) -> None:
    control.set(f"{OTHER}ready", "x")
    new = StoredSchedule(id="s", body=b"", due_at=1.0, revision="r")
    runs = [envelope("r1"), envelope("r2", queue="p")]
    assert await broker.schedules().compare_and_swap("s", None, new, runs)
    assert stored(control) == Counter(["r1"])
    assert stored(control, OTHER) == Counter(["r2"])


async def test_a_unique_id_may_have_the_name_of_a_key(
    broker: RedisBroker, control: redis.Redis
) -> None:
    batch = [envelope("ready", unique=True), envelope("levels", unique=True)]
    assert not await broker.publish(batch)
    control.delete(f"{BASE}ready")
    control.set(f"{BASE}ready", "x")
    assert set(await broker.publish([*batch, envelope("new", unique=True)])) == {"ready", "levels"}
    await broker.publish([envelope("a", unique=True)])
    assert set(await broker.publish(batch)) == {"ready", "levels"}


# --- fetching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [f"{BASE}ready", f"{OTHER}ready", f"{OTHER}delayed"])
@pytest.mark.parametrize("limit", [1, 5])
async def test_messages_handed_out_before_a_key_of_a_wrong_type_are_not_lost(
    broker: RedisBroker, control: redis.Redis, wrong: str, limit: int
) -> None:
    consumer = broker.consumer(["q", "p"], name="w", lease=60.0)
    await consumer.open()
    await broker.publish([envelope(name, priority=7) for name in "abc"])
    control.set(wrong, "x")
    got: list[str] = []
    while deliveries := await consumer.fetch(limit, 0.0):
        got += [one.id for one in deliveries]
        assert not await consumer.settle([Done(one) for one in deliveries])
    assert got == ["a", "b", "c"]
    assert not await broker.depth()
    await consumer.close()


async def test_messages_of_a_priority_are_found_though_the_levels_were_set_aside(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    await broker.publish([envelope("a", priority=7)])
    control.delete(f"{BASE}levels")
    control.set(f"{BASE}levels", "x")
    [got] = await consumer.fetch(1, 0.0)
    assert not await consumer.settle([Done(got)])


async def test_held_items_of_a_wrong_type_are_set_aside_after_a_reconnect(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    control.set(f"{BASE}held:{consumer.id}", "x")
    connection_of(broker).drop()
    await broker.publish([envelope("a")])
    [got] = await consumer.fetch(1, 0.0)
    assert not await consumer.settle([Done(got)])


@pytest.mark.parametrize("field", ["9" * 5000, "007", "1x", "-1"])
async def test_fields_that_are_no_receipts_do_not_stop_a_consumer_after_a_reconnect(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis, field: str
) -> None:
    control.hset(f"{BASE}held:{consumer.id}", field, "x")
    await broker.publish([envelope("a")])
    [first] = await consumer.fetch(1, 0.0)
    connection_of(broker).drop()
    await broker.publish([envelope("b")])  # it connects again, and the consumer compares
    [second] = await consumer.fetch(1, 0.0)
    assert (first.id, second.id) == ("a", "b")
    assert not await consumer.settle([Done(first), Done(second)])


# --- settling -----------------------------------------------------------------------------------


async def test_what_a_call_of_settle_has_settled_is_not_reported_as_lost(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    await broker.publish([envelope("x"), envelope("y")])
    x, y = await consumer.fetch(2, 0.0)
    control.set(f"{OTHER}ready", "x")
    assert not await consumer.settle([Done(x), Again(y, envelope("y", queue="p"))])
    assert await broker.depth() == {"p": Depth(ready=1)}


@pytest.mark.parametrize("wrong", ["letters", "dead", "ready", "ready:5", "levels"])
async def test_settlements_of_several_kinds_are_applied_once(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis, wrong: str
) -> None:
    await broker.publish([envelope("x"), envelope("y"), envelope("z", priority=5)])
    held = {one.id: one for one in await consumer.fetch(3, 0.0)}
    control.delete(BASE + wrong)
    control.set(BASE + wrong, "x")
    settlements: list[Settlement] = [
        Again(held["x"], envelope("x", queue="p")),
        Dead(held["y"], "why"),
        Release(held["z"]),
    ]
    assert not await consumer.settle(settlements)
    assert await broker.depth() == {"p": Depth(ready=1), "q": Depth(ready=1, dead=1)}


async def test_letters_that_a_call_has_revived_are_not_reported_as_missing(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    await broker.publish([envelope("x"), envelope("y")])
    await consumer.settle([Dead(one, "why") for one in await consumer.fetch(2, 0.0)])
    control.set(f"{OTHER}ready", "x")
    letters = [(one.key, envelope(one.id, queue="p")) for one in await broker.dead("q")]
    letters[0] = (letters[0][0], envelope("y"))
    assert not await broker.revive("q", letters)
    assert await broker.depth() == {"p": Depth(ready=1), "q": Depth(ready=1)}


# --- the end of a consumer ----------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["meta", "levels", "ready:5"])
async def test_all_messages_of_a_dead_consumer_are_counted(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis, wrong: str
) -> None:
    await broker.publish([envelope("a", priority=5), envelope("b")])
    assert len(await consumer.fetch(2, 0.0)) == 2
    control.delete(BASE + wrong)
    control.set(BASE + wrong, "x")
    lease = broker.lease(consumer.grant)
    assert await lease.end("killed") == 2
    await lease.close()


async def test_all_dropped_messages_are_counted(broker: RedisBroker, control: redis.Redis) -> None:
    await broker.publish([envelope("a", priority=7), envelope("b", priority=2), envelope("c")])
    control.set(f"{BASE}ready:5", "x")
    assert await broker.purge("q") == 3


# --- numbers ------------------------------------------------------------------------------------


async def test_times_of_any_length_are_taken(
    broker: RedisBroker, backend: RedisBackend, control: redis.Redis
) -> None:
    longest = 1e300
    assert not await backend.store([outcome("a")], longest)
    assert 0 < control.pttl("aiotaskq:result:a") <= 100 * 366 * 86_400_000
    batch = [
        envelope("delayed", delay=longest),
        envelope("late", not_before=longest),
        envelope("expiring", expires_in=longest, unique=True),
    ]
    assert not await broker.publish(batch, call_id="c")
    new = StoredSchedule(id="s", body=b"", due_at=longest, revision="r")
    assert await broker.schedules().compare_and_swap("s", None, new)
    assert (await broker.schedules().due(1)).next_at == longest
    consumer = broker.consumer(["q"], name="w", lease=longest)
    await consumer.open()
    lease = broker.lease(consumer.grant)
    assert await lease.renew()
    await lease.close()
    [got] = await consumer.fetch(5, 0.0)
    assert got.id == "expiring"
    assert not got.expired
    assert not await consumer.settle([Dead(got, "why")])
    await broker.maintain(DeadLimits(age=longest))
    assert (await broker.depth())["q"] == Depth(delayed=2, dead=1)
    await consumer.close()


# --- senders ------------------------------------------------------------------------------------


async def test_a_sender_that_may_set_nothing_aside_stores_nothing_of_a_call_that_fails(
    broker: RedisBroker, control: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: RedisConnection, error: Exception, keys: Sequence[object]) -> bool:
        return False

    monkeypatch.setattr(RedisConnection, "_set_aside", refuse)
    control.set(f"{BASE}delayed", "x")
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        await broker.publish([envelope("a"), envelope("b", delay=600.0)])
    control.delete(f"{BASE}delayed")
    assert not stored(control)
