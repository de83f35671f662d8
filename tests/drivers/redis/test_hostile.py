"""Keys, members and messages that no program of this package has written."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
import redis as redis_sync

from aiotaskq.contract.records import DeadLimits
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.redis import RedisBackend, RedisBroker, queue_names
from aiotaskq.drivers.redis import connection as connections
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import BatchRefused, BrokerUnavailable, DecodeError, EncodeError
from tests.drivers.quiet import quiet_proxy
from tests.drivers.redis.tools import PATIENCE, envelope, outcome
from tests.servers import RedisServer

BASE = "aiotaskq:{q}:"


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisBroker]:
    broker = RedisBroker(redis_url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def backend(redis_url: str) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend(redis_url)
    await backend.open()
    yield backend
    await backend.close()


async def run(url: str, *commands: tuple[Any, ...]) -> None:
    """Run commands as another program does."""

    def go() -> None:
        with redis_sync.Redis.from_url(url) as client:
            for words in commands:
                client.execute_command(*words)

    await asyncio.to_thread(go)


async def renew(broker: RedisBroker, consumer: RedisConsumer) -> None:
    lease = broker.lease(consumer.grant)
    assert await lease.renew()
    await lease.close()


async def works(broker: RedisBroker, *, count: int = 1) -> None:
    """Use everything of a queue once."""
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    once = uuid.uuid4().hex
    for name in range(count):
        await broker.publish([envelope(f"plain {name}"), envelope("late", delay=0.001)])
        await broker.publish([envelope("urgent", priority=7), envelope(once, unique=True)])
    await broker.maintain()
    ended: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while not {"plain 0", "late", "urgent", once} <= ended:
            got = await consumer.fetch(10, 0.2)
            ended |= {one.id for one in got}
            assert not await consumer.settle([Dead(one, "why") for one in got])
    await renew(broker, consumer)
    await consumer.news()
    await broker.depth()
    await broker.consumers()
    await broker.cancel(["x"], running=False)
    assert (await broker.schedules().due(10)).now
    letters = await broker.dead("q")
    assert {"plain 0", "late", "urgent", once} <= {one.id for one in letters}
    assert not await broker.revive("q", [(letters[0].key, envelope("again"))])
    assert await broker.discard("q", [one.key for one in letters[1:]])
    [got_again] = await consumer.fetch(1, 1.0)
    assert not await consumer.settle([Done(got_again)])
    await consumer.close()


OF_QUEUE = [
    *("ready", "ready:7", "ready:suspects", "levels", "delayed", "consumers", "fenced", "dead"),
    *("letters", "wake", "meta"),
]
OF_PREFIX = ["queues", "cancelled", "schedules", "schedules:due"]
KEYS = [BASE + one for one in OF_QUEUE] + [f"aiotaskq:{one}" for one in OF_PREFIX]


@pytest.mark.parametrize("key", KEYS)
async def test_a_key_of_a_wrong_type_is_set_aside(
    broker: RedisBroker, redis_url: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number, words in enumerate(
        [("SET", key, "x"), ("HSET", key, "a", "b"), ("RPUSH", key, "x"), ("SADD", key, "x")]
    ):
        await run(redis_url, ("SADD", f"{BASE}levels", "7"), ("DEL", key), words)
        await works(broker)
        told = [one for one in caplog.records if "was renamed" in one.getMessage()]
        assert len(told) <= number + 1
    if not key.endswith((":suspects", ":wake", ":schedules")):  # which nobody came to read
        assert any("was renamed" in one.getMessage() for one in caplog.records)


@pytest.mark.parametrize("key", ["aiotaskq:cancelled", f"{BASE}wake", f"{BASE}levels"])
async def test_a_waiting_message_is_not_lost_by_a_key_of_a_wrong_type(
    broker: RedisBroker, redis_url: str, key: str
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    await broker.publish([envelope("a"), envelope("b")])
    await run(redis_url, ("DEL", key), ("HSET", key, "a", "b"))
    got = await consumer.fetch(1, 1.0)
    await run(redis_url, ("DEL", key), ("HSET", key, "a", "b"))
    assert not await consumer.settle([Release(one) for one in got])
    await run(redis_url, ("DEL", key), ("HSET", key, "a", "b"))
    assert [one.id for one in await consumer.fetch(10, 1.0)] == ["a", "b"]
    await consumer.close()


async def test_keys_of_one_consumer_of_a_wrong_type_are_set_aside(
    broker: RedisBroker, redis_url: str
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    for name in ("held", "floor", "nudge"):
        kind = ("LPUSH", f"{BASE}{name}:{consumer.id}", "x")
        await run(redis_url, kind if name != "nudge" else ("SET", *kind[1:]))
        await broker.publish([envelope(name)])
        async with asyncio.timeout(PATIENCE):
            while not (got := await consumer.fetch(1, 0.01)):
                pass
        assert [one.id for one in got] == [name]
        assert not await consumer.settle([Done(got[0])])
    await consumer.close()


META = ["x", "nan", "inf", "-inf", "", "0x10", "1e999", "\xff"]


@pytest.mark.parametrize("value", META)
async def test_numbers_that_are_none_harm_nobody(
    broker: RedisBroker, redis_url: str, value: str
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    await broker.publish([envelope("held")])
    [held] = await consumer.fetch(1, 1.0)
    await run(
        redis_url,
        *(("HSET", f"{BASE}meta", field, value) for field in ("beat", "granted", "seen")),
        ("HSET", f"{BASE}meta", f"lease:{consumer.id}", value),
        ("SET", f"{BASE}floor:{consumer.id}", value),
        *(("HSET", f"{BASE}held:{consumer.id}", field, "x") for field in (value, "007", "9" * 40)),
    )
    await renew(broker, consumer)
    await works(broker)
    assert not await consumer.settle([Release(held)])
    await consumer.close()
    other = broker.consumer(["q"], name="w", lease=60)
    await other.open()
    assert "held" in {one.id for one in await other.fetch(10, 1.0)}
    await other.close()


async def test_scores_without_an_end_overwrite_no_dead_letter(
    broker: RedisBroker, redis_url: str
) -> None:
    await run(
        redis_url,
        ("ZADD", f"{BASE}dead", "inf", "odd", "9e15", b"\xff", "-inf", ""),
        ("ZADD", "aiotaskq:cancelled", "inf", "odd", "9e15", b"\xff"),
        ("ZADD", f"{BASE}consumers", "inf", b"\xff", "9e15", "forged", "-inf", "old"),
        ("HSET", f"{BASE}meta", b"about:\xff", "[" * 100_000, "about:forged", b'["q"]\n\xff'),
        ("ZADD", f"{BASE}fenced", "1", b"\xff", "inf", "x"),
        ("HSET", f"{BASE}held:x", "1", "garbage", "2", "99999999999999999999999 0 - crash\nbody"),
        ("ZADD", f"{BASE}delayed", "-inf", "garbage", "inf", "never"),
    )
    await broker.maintain()
    await works(broker)
    burying = broker.consumer(["q"], name="w", lease=60)
    await burying.open()
    await broker.publish([envelope(f"{n}") for n in range(3)])
    assert not await burying.settle([Dead(one, "") for one in await burying.fetch(3, 1.0)])
    await burying.close()
    letters = await broker.dead("q")
    assert {"0", "1", "2"} <= {one.id for one in letters}
    assert len({one.key for one in letters}) == len(letters)
    assert await broker.discard("q", [one.key for one in letters]) == len(letters)
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    await broker.cancel(["new"])
    assert set((await consumer.news()).cancelled) == {"new"}
    await consumer.close()


async def test_names_of_queues_that_are_no_text_are_skipped_and_logged_once(
    broker: RedisBroker, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    await run(redis_url, ("SADD", "aiotaskq:queues", b"\xff", "", "x" * 100_000, "a{b}:c"))
    for _ in range(3):
        await works(broker)
    assert sum("is no text" in one.getMessage() for one in caplog.records) == 1


async def test_maintenance_goes_over_some_of_very_many_queues(
    broker: RedisBroker, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_names, "_SCANNED", 10)
    await run(redis_url, ("SADD", "aiotaskq:queues", *(f"idle {n}" for n in range(2000))))
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    rounds = [await broker.some_queues() for _ in range(3)]
    assert all("q" in one for one in rounds)
    assert max(map(len, rounds)) < 200
    seen: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while len(seen) < 2001:
            seen.update(await broker.some_queues())
    await consumer.close()


async def test_very_many_dead_letters_are_dropped_in_few_rounds(
    broker: RedisBroker, redis_url: str
) -> None:
    members = [word for n in range(3000) for word in (str(n), f"key {n}")]
    await run(redis_url, ("SADD", "aiotaskq:queues", "q"), ("ZADD", f"{BASE}dead", *members))
    rounds = [(await broker.maintain(DeadLimits(most=10))).trimmed for _ in range(3)]
    assert sum(rounds) == 2990


async def test_odd_schedules_hide_no_other(broker: RedisBroker, redis_url: str) -> None:
    await run(
        redis_url,
        ("HSET", "aiotaskq:schedules", b"\xff", "x", "good", b"r\xff\nbody", "late", "r\nbody"),
        ("ZADD", "aiotaskq:schedules:due", "1", b"\xff", "2", "missing", "3", "good"),
        ("ZADD", "aiotaskq:schedules:due", "inf", "late"),
    )
    schedules = broker.schedules()
    [good] = (await schedules.due(10)).schedules
    assert [one.id for one in await schedules.load()] == ["good", "late"]
    assert await schedules.compare_and_swap("good", good.revision, None)
    assert not (await schedules.due(10)).schedules


# --- results ------------------------------------------------------------------------------------

PUBLISHED = [
    b"",
    b"garbage",
    b"\xff",
    b"{}",
    b"[" * 100_000 + b"]" * 100_000,
    b'[{"task_id":"a","status":"SUCCESS","result":' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
    b'[{"task_id":"a","status":"ODD","result":1}]',
    b"[1]",
    b'["\\ud800"]',
]


async def test_what_others_publish_ends_no_subscription(
    backend: RedisBackend, redis_url: str
) -> None:
    async with aclosing(backend.subscribe()) as arrivals:
        assert await anext(arrivals) == []
        await run(redis_url, *(("PUBLISH", "aiotaskq:results", one) for one in PUBLISHED))
        await backend.store([outcome("a")], None)
        async with asyncio.timeout(PATIENCE):
            while "a" not in {getattr(one, "task_id", one) for one in await anext(arrivals)}:
                pass


async def test_a_key_that_holds_no_outcome_gives_way_to_one(
    backend: RedisBackend, redis_url: str
) -> None:
    await run(
        redis_url,
        ("RPUSH", "aiotaskq:result:list", "x"),
        ("HSET", "aiotaskq:state:list", "a", "b"),
        ("SET", "aiotaskq:result:deep", "[" * 100_000),
    )
    assert not await backend.store([outcome("list")], None)
    assert set(await backend.load(["list"])) == {"list"}
    with pytest.raises(DecodeError):
        await backend.load(["deep"])


# --- refusals -----------------------------------------------------------------------------------


async def test_entries_that_redis_does_not_take_are_refused_alone(
    broker: RedisBroker, backend: RedisBackend, redis_url: str
) -> None:
    await run(redis_url, ("CONFIG", "SET", "proto-max-bulk-len", str(1024 * 1024)))
    try:
        large = bytes(2 * 1024 * 1024)
        batch = [
            envelope("a"),
            envelope("large", body=large),
            envelope("\ud800"),
            envelope("b", unique=True),
        ]
        for _ in range(2):
            with pytest.raises(BatchRefused) as refused:
                await broker.publish(batch, call_id="call")
            assert list(refused.value.errors) == [1, 2]
            assert all(isinstance(one, EncodeError) for one in refused.value.errors.values())
        assert (await broker.depth())["q"].ready == 2
        consumer = broker.consumer(["q"], name="w", lease=60)
        await consumer.open()
        await broker.publish([envelope("c"), envelope("d")])
        a, b, c, d = await consumer.fetch(4, 1.0)
        settlements: list[Settlement] = [
            Done(a),
            Again(b, envelope("b", body=large)),
            Again(c, envelope("\ud800")),
            Release(d),
        ]
        with pytest.raises(BatchRefused) as refused:
            await consumer.settle(settlements)
        assert list(refused.value.errors) == [1, 2]
        assert not refused.value.answer
        assert not await consumer.settle([Dead(b, "\ud800"), Dead(c, "refused")])
        depth = (await broker.depth())["q"]
        assert (depth.ready, depth.held, depth.dead) == (1, 0, 2)
        await consumer.close()
        with pytest.raises(BatchRefused) as refused:
            await backend.store([outcome("a"), outcome("\ud800"), outcome("b")], None)
        assert list(refused.value.errors) == [1]
        assert set(await backend.load(["a", "b", "\ud800"])) == {"a", "b"}
    finally:
        await run(redis_url, ("CONFIG", "SET", "proto-max-bulk-len", str(512 * 1024 * 1024)))


async def test_the_first_call_after_a_connection_was_dropped_without_a_word_can_be_repeated(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_QUIET", 0.0)
    async with quiet_proxy(redis_server.host, redis_server.port) as proxy:
        url = redis_url.replace(f":{redis_server.port}", f":{proxy.port}")
        broker = RedisBroker(f"{url}?socket_timeout=60")
        await broker.open()
        await broker.publish([envelope("a")])
        monkeypatch.setattr(broker._client.connection, "_server", _impatient(broker))
        proxy.swallow()
        with pytest.raises(BrokerUnavailable, match="no answer in time"):
            await broker.publish([envelope("b")], call_id="b")
        await broker.publish([envelope("b")], call_id="b")
        assert (await broker.depth())["q"].ready == 2
        await broker.close()


def _impatient(broker: RedisBroker) -> Any:
    return msgspec.structs.replace(broker._client.connection._server, timeout=1.0)
