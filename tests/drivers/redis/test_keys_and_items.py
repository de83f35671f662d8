"""The keys of the Redis driver: their layout, their names, and the items in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import redis
from hypothesis import given
from hypothesis import strategies as st

from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.contract.records import Depth, Maintained, StoredSchedule
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.drivers.common.retention import CALLS_FOR, UNIQUE_IDS_FOR
from aiotaskq.drivers.redis import RedisBackend, RedisBroker, items, scripts
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.dead_letters import unpack_letter
from aiotaskq.drivers.redis.keys import PREFIX_KEYS, QUEUE_KEYS, RedisKey, RedisKeys
from tests.drivers.redis.tools import envelope, outcome


def test_the_layout_has_the_keys_that_the_scripts_use() -> None:
    folder = Path(scripts.__file__).parent / "lua"
    text = "\n".join(path.read_text() for path in sorted(folder.glob("*.lua")))
    used = set(re.findall(r"(?:base|KEYS\[\w+\]) \.\. '([a-z:]+)'", text))
    listed = {key.name.partition("<")[0] for key in QUEUE_KEYS}
    # It stands in for a base in a script that has none.
    assert used - listed == {":none"}
    assert listed <= used


async def test_the_layout_has_every_key_on_the_server_and_its_type(
    broker: RedisBroker, backend: RedisBackend, control: redis.Redis
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    batch = [envelope("a", unique=True), *(envelope(f"{n}", priority=n) for n in range(10))]
    await broker.publish(batch, call_id="call")
    await broker.publish([envelope("late", delay=60.0), envelope("p", queue="p")])
    await consumer.settle([Dead(one, "why") for one in await consumer.fetch(1, 0)])
    await consumer.fetch(1, 0)
    await broker.cancel(["x"])
    await consumer.notifier.wake()
    await backend.store([outcome("b"), outcome("c", TaskStatus.STARTED)], 60.0)
    one = StoredSchedule(id="s", body=b"", due_at=1.0, revision="1")
    await broker.schedules().compare_and_swap("s", None, one)
    connection, base = broker._client.connection, broker._client.keys.base("p")
    await connection.script(scripts.PACK, [base], [10, 1000, 1, "parcel", 0])
    await connection.script(scripts.UNPACK, [base], ["parcel", "0", "0 0 - b\n"])
    layout = {_pattern("aiotaskq:{.+}:", key): key.type for key in QUEUE_KEYS} | {
        _pattern("aiotaskq:", key): key.type for key in PREFIX_KEYS
    }
    found = [str(name) for name in control.scan_iter()]
    assert len(found) > 20
    for name in found:
        [type_of] = {kind for pattern, kind in layout.items() if re.fullmatch(pattern, name)}
        assert type_of.replace("sorted set", "zset") == control.type(name)


def _pattern(start: str, key: RedisKey) -> str:
    return start + re.sub("<[^>]+>", "[^{}]+", key.name)


async def test_only_lasting_keys_have_no_time_to_live(
    broker: RedisBroker, backend: RedisBackend, control: redis.Redis
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    batch = [envelope(f"{n}", priority=n, unique=n % 2 == 0) for n in range(10)]
    await broker.publish(batch, call_id="call")
    await broker.publish([envelope("late", not_before=1.0)])
    await broker.cancel(["3"])
    held = list(await consumer.fetch(100, 0))
    assert len(held) == 10
    again = Again(held[0], envelope("again"))
    await consumer.settle([again, Dead(held[1], "why"), Release(held[2]), *map(Done, held[3:])])
    await consumer.settle([Done(one) for one in await consumer.fetch(100, 0)])
    await backend.store([outcome("a"), outcome("b", TaskStatus.STARTED)], 60.0)
    lease = broker.lease(consumer.grant)
    assert await lease.renew()
    await lease.close()
    await broker.maintain()
    await consumer.close()
    assert await broker.depth() == {"q": Depth(dead=1)}
    lasting = {key for key in control.scan_iter() if control.ttl(key) == -1}
    assert lasting == {
        "aiotaskq:queues",
        "aiotaskq:cancelled",
        "aiotaskq:{q}:dead",
        "aiotaskq:{q}:letters",
        "aiotaskq:{q}:wake",
    }


async def test_calls_and_unique_ids_are_remembered_as_long_as_in_all_drivers(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    unique = envelope("a", unique=True)
    assert await broker.publish([unique], call_id="c") == []
    assert CALLS_FOR - 10 < control.ttl("aiotaskq:{q}:call:c:0") <= CALLS_FOR
    assert UNIQUE_IDS_FOR - 10 < control.ttl("aiotaskq:ids:a") <= UNIQUE_IDS_FOR
    control.expire("aiotaskq:{q}:call:c:0", 1)
    control.delete("aiotaskq:ids:a")
    assert await broker.publish([unique], call_id="c") == []
    assert CALLS_FOR - 10 < control.ttl("aiotaskq:{q}:call:c:0") <= CALLS_FOR
    await consumer.settle([Dead(one, "why") for one in await consumer.fetch(1, 0)])
    [letter] = await broker.dead("q")
    assert await broker.revive("q", [(letter.key, unique)]) == []
    assert UNIQUE_IDS_FOR - 10 < control.ttl("aiotaskq:ids:a") <= UNIQUE_IDS_FOR


async def test_a_result_is_readable_and_expires(
    backend: RedisBackend, control: redis.Redis
) -> None:
    await backend.store([outcome("a")], 86_400.0)
    stored = json.loads(str(control.get("aiotaskq:result:a")))
    assert (stored["task_id"], stored["status"], stored["result"]) == ("a", "SUCCESS", [1])
    assert 86_300 < control.ttl("aiotaskq:result:a") <= 86_400


async def test_the_prefix_begins_every_key(redis_url: str, control: redis.Redis) -> None:
    broker = RedisBroker(redis_url, prefix="theirs")
    backend = broker.backend()
    await broker.open()
    await backend.open()
    await broker.publish([envelope("a", unique=True)], call_id="c")
    await backend.store([outcome("a")], None)
    assert {str(key).split(":")[0] for key in control.scan_iter()} == {"theirs"}
    await backend.close()
    await broker.close()


async def test_a_message_is_readable_on_the_server(
    broker: RedisBroker, control: redis.Redis
) -> None:
    await broker.publish([envelope("a b", body=b'{"task":"add"}')])
    assert control.lrange("aiotaskq:{q}:ready", 0, -1) == ['0 0 - a b\n{"task":"add"}']


async def test_foreign_items_and_letters_are_handed_out_and_buried_unchanged(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    control.rpush("aiotaskq:{q}:ready", "junk", "x y\nz")
    await broker.publish([envelope("a")])
    got = await consumer.fetch(10, 0)
    assert [one.body for one in got] == [b"junk", b"x y\nz", b"a"]
    broker._time_shift = 61.0
    assert await broker.maintain() == Maintained(reclaimed=3)
    assert [one.body for one in await broker.dead("q")] == [b"junk", b"x y\nz"]
    control.zadd("aiotaskq:{q}:dead", {"key": 1e11})
    control.hset("aiotaskq:{q}:letters", "key", "junk")
    [letter, *_] = await broker.dead("q")
    assert (letter.key, letter.body) == ("key", b"junk")


identifiers = st.text(st.characters(exclude_categories=["Cs"]))


@given(identifiers, st.binary(), st.integers(0, 9), st.none() | st.floats(0, 1e11, allow_nan=False))
def test_an_item_is_unpacked_as_it_was_packed(
    name: str, body: bytes, priority: int, expires_at: float | None
) -> None:
    one = envelope(name, body=body, priority=priority, expires_at=expires_at)
    item = items.pack(one)
    assert b"\n" not in item.removesuffix(b"\n" + body)
    got = items.unpack(item, "q", 1)
    assert (got.id, got.body, got.priority, got.crashes) == (name, body, priority, 0)
    crashed = items.unpack(b"12" + item[1:], "q", 1)
    assert (crashed.id, crashed.crashes) == (name, 12)


@given(st.binary())
def test_any_bytes_can_be_unpacked(item: bytes) -> None:
    assert items.unpack(item, "q", 1).queue == "q"
    assert unpack_letter(b"key", item, "q").queue == "q"


@given(identifiers, identifiers)
def test_each_queue_has_a_base_of_its_own(one: str, other: str) -> None:
    keys = RedisKeys("p")
    assert (keys.base(one) == keys.base(other)) is (one == other)
    assert keys.base(one).count("{") == keys.base(one).count("}") == 1
