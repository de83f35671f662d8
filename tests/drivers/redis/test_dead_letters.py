"""Dead letters in Redis: their stored form, reading and trimming them, and refused keys."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence

import pytest
import redis

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.records import DeadLetter, DeadLimits, Depth
from aiotaskq.contract.settlement import Dead
from aiotaskq.drivers.redis import RedisBroker
from aiotaskq.drivers.redis.cluster import ClusterBroker
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import ConfigError
from tests.drivers.redis.tools import envelope


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
    for first in range(0, 2500, 500):
        await broker.publish([envelope(f"{first + n}") for n in range(500)])
        await consumer.settle([Dead(one, "why") for one in await consumer.fetch(500, 0)])
    letters = await broker.dead("q", 220)
    assert [one.id for one in letters] == [f"{n}" for n in range(2499, 2279, -1)]
    assert len({one.key for one in letters}) == 220
    limits = DeadLimits(most=10)
    rounds = [(await broker.maintain(limits)).trimmed for _ in range(4)]
    assert rounds == [1000, 1000, 490, 0]
    assert [one.id for one in await broker.dead("q")] == [f"{n}" for n in range(2499, 2489, -1)]


NO_KEYS = [
    *("", " ", "x", "no key", "(1", "nan", "inf", "-inf", "1e5", "0x1", "1", "1.0", ".000000"),
    *("-1.000000", "+1.000000", "01.000000", "1.0000000", " 1.000000", "1.000000 ", "1.000000\n"),
    *("9" * 400, "9" * 400 + ".000000", "\u0663.000000", "1.00000\u0663", "\ud800", "\0"),
]


async def test_a_text_that_is_no_key_is_refused(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await bury(broker, consumer, "a")
    wrong = [*NO_KEYS, "1.000000/0"]
    await check_refused(broker, wrong)


async def test_the_key_of_a_letter_that_is_gone_is_accepted(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await bury(broker, consumer, "a")
    assert not await broker.dead("q", before="0.000001")
    assert len(await broker.dead("q", before="999999999999.999999")) == 1


async def test_listing_goes_on_past_letters_with_foreign_keys(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    await bury(broker, consumer, "a", "b")
    control.zadd("aiotaskq:{q}:dead", {"newest": 1e11, "oldest": 1.0, "-inf": "-inf"})
    pages = []
    before = None
    while page := await broker.dead("q", 1, before=before):
        before = page[-1].key
        pages.append(page[0])
    assert [one.id for one in pages] == ["", "b", "a", "", ""]
    assert [one.key for one in pages if not one.id] == ["newest", "oldest", "-inf"]
    assert await broker.discard("q", ["newest", "oldest", "-inf"]) == 3


# --- in a cluster -------------------------------------------------------------------------------


@pytest.fixture
async def cluster(redis_cluster_url: str) -> AsyncIterator[ClusterBroker]:
    broker = ClusterBroker(f"{redis_cluster_url}?shards=3")
    await broker.open()
    yield broker
    await broker.close()


async def test_a_text_that_is_no_key_of_a_cluster_is_refused(cluster: ClusterBroker) -> None:
    consumer = cluster.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    await bury(cluster, consumer, "a")
    await consumer.close()
    [letter] = await cluster.dead("q")
    own, _, shard = letter.key.partition("/")
    wrong = [*NO_KEYS, *(f"{key}/{shard}" for key in NO_KEYS), own, f"{own}/", f"/{shard}"]
    wrong += [
        f"{own}/{end}" for end in ("12", "-1", "00", f"0{shard}", "\u0663", "x", " 1", "9" * 99)
    ]
    await check_refused(cluster, wrong)
    assert not await cluster.dead("q", before=f"0.000001/{shard}")
    assert await cluster.discard("q", [letter.key]) == 1


async def test_a_cluster_lists_letters_of_all_shards_past_foreign_ones(
    cluster: ClusterBroker,
) -> None:
    consumer = cluster.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    await bury(cluster, consumer, *(f"{n}" for n in range(300)))
    await consumer.close()
    client = cluster._clients[cluster._placement.shards_of("q")[0]]
    await client.connection.command("ZADD", f"{client.keys.base('q')}dead", 1.0, "nan")
    found: list[DeadLetter] = []
    before = None
    while page := await cluster.dead("q", 70, before=before):
        before = page[-1].key
        found += page
    assert len({one.key for one in found}) == len(found) == 301
    assert found[-1].key.startswith("nan/")
    assert {one.id for one in found[:-1]} == {f"{n}" for n in range(300)}
    times = [float(one.key.partition("/")[0]) for one in found[:-1]]
    assert times == sorted(times, reverse=True)


async def bury(broker: Broker, consumer: Consumer, *ids: str) -> None:
    await broker.publish([envelope(one) for one in ids])
    left = len(ids)
    while left:
        got = await consumer.fetch(left, 5.0)
        assert not await consumer.settle([Dead(one, "why") for one in got])
        left -= len(got)


async def check_refused(broker: Broker, keys: Sequence[str]) -> None:
    """Check that these are no keys to a broker with one dead letter in the queue."""
    for key in keys:
        with pytest.raises(ConfigError, match="is not the key of a dead letter: give one that"):
            await broker.dead("q", before=key)
    gone = await broker.revive("q", [(key, envelope("b")) for key in keys])
    assert sorted(gone) == sorted(keys)
    assert await broker.discard("q", keys) == 0
    assert await broker.depth() == {"q": Depth(dead=1)}
