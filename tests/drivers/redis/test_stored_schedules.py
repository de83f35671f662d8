"""Schedules in Redis: their keys, and a server that has no memory, or malformed keys."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import redis

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import Depth, StoredSchedule
from aiotaskq.drivers.redis import RedisBroker
from aiotaskq.errors import BrokerFull
from tests.drivers.redis.tools import envelope

HASH, DUE = "aiotaskq:schedules", "aiotaskq:schedules:due"


def schedule(name: str, revision: str, due_at: float | None = None) -> StoredSchedule:
    return StoredSchedule(id=name, body=b"{}", due_at=due_at, revision=revision)


async def test_a_schedule_is_readable_on_the_server(
    broker: RedisBroker, control: redis.Redis
) -> None:
    store = broker.schedules()
    assert await store.compare_and_swap(
        "nightly: 5%", None, schedule("nightly: 5%", "r1", 1795255200.125)
    )
    assert await store.compare_and_swap("paused", None, schedule("paused", "r%\n2"))
    assert control.hgetall(HASH) == {"nightly: 5%": "r1\n{}", "paused": "r%25%0A2\n{}"}
    assert control.zrange(DUE, 0, -1, withscores=True) == [("nightly: 5%", 1795255200.125)]
    assert not control.exists("aiotaskq:queues")


async def test_foreign_schedules_are_left_out_or_read_unchanged(
    broker: RedisBroker, control: redis.Redis
) -> None:
    store = broker.schedules()
    control.hset(HASH, mapping={"odd": "no line", "ours": "1\nbody"})
    control.zadd(DUE, {"gone": 1.0, "ours": 2.0})
    found = await store.due(10)
    assert [one.id for one in found.schedules] == ["ours"]
    assert [(one.id, one.revision, one.body, one.due_at) for one in await store.load()] == [
        ("odd", "no line", b"", None),
        ("ours", "1", b"body", 2.0),
    ]
    assert await store.compare_and_swap("odd", "no line", None)
    assert await store.compare_and_swap("gone", None, schedule("gone", "1"))
    assert control.zrange(DUE, 0, -1) == ["ours"]


async def test_a_full_server_removes_and_reads_schedules_and_stores_none(
    broker: RedisBroker, control: redis.Redis
) -> None:
    store = broker.schedules()
    kept, other = schedule("kept", "1", 1000.0), schedule("other", "1", 2000.0)
    for one in (kept, other):
        assert await store.compare_and_swap(one.id, None, one)
    refused: Sequence[tuple[str, str | None, StoredSchedule | None, Sequence[Envelope]]] = [
        ("new", None, schedule("new", "1", 1.0), []),
        ("kept", "1", schedule("kept", "2"), []),
        ("kept", "1", schedule("kept", "2"), [envelope("a")]),
        ("kept", "1", None, [envelope("a", priority=3), envelope("b")]),
        ("kept", "1", None, [envelope("a", delay=60.0)]),
    ]
    await broker.publish([envelope("known")])
    control.config_set("maxmemory", "1mb")
    try:
        for name, seen, new, batch in refused:
            with pytest.raises(BrokerFull, match="maxmemory"):
                await store.compare_and_swap(name, seen, new, batch)
        assert await store.load() == [kept, other]
        assert (await store.due(10)).schedules == [kept, other]
        assert await store.compare_and_swap("other", "1", None)
        assert not await store.compare_and_swap("other", "1", None)
    finally:
        control.config_set("maxmemory", "0")
    assert await store.load() == [kept]
    assert await broker.depth() == {"q": Depth(ready=1)}
    assert await store.compare_and_swap("kept", "1", None, [envelope("a")])
    assert await broker.depth() == {"q": Depth(ready=2)}


@pytest.mark.parametrize("key", [HASH, DUE, "aiotaskq:{q}:ready"])
async def test_a_key_of_a_wrong_type_is_set_aside_for_a_change(
    broker: RedisBroker, control: redis.Redis, key: str
) -> None:
    store = broker.schedules()
    assert await store.compare_and_swap("s", None, schedule("s", "1"))
    control.rename(HASH, "saved")
    control.copy("saved", HASH)
    control.delete(key)
    control.set(key, "text")
    seen = None if key == HASH else "1"
    assert await store.compare_and_swap("s", seen, schedule("s", "2", 1000.0), [envelope("a")])
    assert await store.load() == [schedule("s", "2", 1000.0)]
    assert (await broker.depth()) == {"q": Depth(ready=1)}
    [aside] = control.keys(f"{key}:aside:*")
    assert control.get(aside) == "text"


async def test_ten_thousand_envelopes_fit_in_one_swap(broker: RedisBroker) -> None:
    batch = [envelope(f"{n}", queue=f"q{n % 50}") for n in range(10_000)]
    assert await broker.schedules().compare_and_swap("s", None, schedule("s", "1"), batch)
    assert await broker.depth() == {f"q{n}": Depth(ready=200) for n in range(50)}
