"""What only the Redis driver has: keys, what rests in them, addresses."""

from __future__ import annotations

import json

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.contract.records import Depth, Maintained
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.drivers.redis import RedisBackend, RedisBroker, items
from aiotaskq.drivers.redis.address import parse
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.link import Link
from aiotaskq.errors import BrokerUnavailable, ConfigError, LeaseLost
from tests.drivers.redis.tools import envelope, outcome
from tests.servers import RedisServer, Watchdog

# --- what rests on the server -------------------------------------------------------------------


async def test_what_stays_without_a_time_to_live_is_what_is_meant_to_stay(
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


async def test_a_result_is_readable_and_goes_by_itself(
    backend: RedisBackend, control: redis.Redis
) -> None:
    await backend.store([outcome("a")], 86_400.0)
    stored = json.loads(str(control.get("aiotaskq:result:a")))
    assert (stored["task_id"], stored["status"], stored["result"]) == ("a", "SUCCESS", [1])
    assert 86_300 < control.ttl("aiotaskq:result:a") <= 86_400


async def test_the_prefix_goes_before_every_key(redis_url: str, control: redis.Redis) -> None:
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


async def test_what_is_not_of_our_making_is_handed_out_and_buried_as_it_is(
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
def test_any_bytes_are_unpacked_somehow(item: bytes) -> None:
    assert items.unpack(item, "q", 1).queue == "q"
    assert items.unpack_dead(b"key", item, "q").queue == "q"


@given(identifiers, identifiers)
def test_the_slot_of_a_queue_is_its_own(one: str, other: str) -> None:
    keys = Keys("p")
    assert (keys.base(one) == keys.base(other)) is (one == other)
    assert keys.base(one).count("{") == keys.base(one).count("}") == 1


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "redis://"),
        ("redis://host:1/2", "redis://host:1/2"),
        ("redis://user:s%40crt@host/1?db=3", "redis://user:***@host/1?db=3"),
        ("rediss://:secret@[::1]:1", "rediss://:***@[::1]:1"),
        ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
        ("unix://:secret@/run/redis.sock?db=2", "unix://:***@/run/redis.sock?db=2"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert RedisBroker(url).url == RedisBackend(url).url == shown


def test_the_parts_of_a_url_are_understood() -> None:
    options = parse("rediss://us%3Aer:p%40ss@host:1/2?ssl_cert_reqs=CERT_NONE").options
    assert options["username"] == "us:er"
    assert options["password"] == "p@ss"
    assert (options["host"], options["port"], options["db"]) == ("host", 1, 2)
    assert options["ssl_cert_reqs"] == "none"
    assert parse("redis://h/1?socket_timeout=0.5&db=7").timeout == 0.5
    assert parse("redis://h/1?db=7").options["db"] == 7
    assert parse("unix:///a%20b?db=1").options["path"] == "/a b"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("amqp://host", "begins with amqp://, and may begin with redis://, rediss://, unix://"),
        ("redis://host/one", "'one' is not the number of a Redis database"),
        ("redis://host:port", "it names hosts as host:port, with a port from 1 to 65535"),
        ("redis://u:p\u2100ss@host", "it has odd characters, or brackets, in it"),
        ("redis://h?socket_timeout=x", "'x' is not a value of the option 'socket_timeout'"),
        ("redis://h?socket_timeout=-1", "'-1' is not a value of the option 'socket_timeout'"),
        ("redis://h?ssl_ca_certs=x", "has no option 'ssl_ca_certs'; it may have client_name, db,"),
        ("rediss://h?ssl_check_hostname=maybe", "'maybe' is not a value"),
        ("unix://", "names the path of a socket"),
    ],
)
def test_a_url_that_will_never_do_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        RedisBroker(url)
    assert reason in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel"])
@pytest.mark.parametrize("sign", "/?#")
@pytest.mark.parametrize("half", ["s3c", "7"])
def test_a_password_that_is_not_quoted_is_told_of_and_not_shown(
    scheme: str, sign: str, half: str
) -> None:
    with pytest.raises(ConfigError, match="the password, before the @, are quoted") as caught:
        RedisBroker(f"{scheme}://user:{half}{sign}r3t@host:1/0")
    assert half not in str(caught.value)
    assert "r3t" not in str(caught.value)


async def test_a_wrong_password_is_refused_at_once(
    redis_server: RedisServer, control: redis.Redis
) -> None:
    control.acl_setuser("guarded", enabled=True, passwords=["+right"], commands=["+@all"], keys="*")
    place = f"{redis_server.host}:{redis_server.port}"
    for driver in (RedisBroker, RedisBackend):
        with pytest.raises(ConfigError) as caught:
            await driver(f"redis://guarded:wr0ng@{place}/0").open()
        assert "wr0ng" not in str(caught.value)
        assert f"redis://guarded:***@{place}/0 refuses the connection" in str(caught.value)
        assert "\n" not in str(caught.value)
    right = RedisBroker(f"redis://guarded:right@{place}/0")
    await right.open()
    assert await right.depth() == {}
    await right.close()
    control.acl_deluser("guarded")


async def test_a_database_that_there_is_not_is_refused_at_once(redis_server: RedisServer) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        await RedisBroker(redis_server.url(redis_server.databases)).open()


def test_a_server_that_is_too_old_is_refused() -> None:
    link = Link(parse("redis://h"), BrokerUnavailable)
    with pytest.raises(ConfigError, match=r"is Redis 6\.0\.16; at least 6\.2 is needed"):
        link._check_server("# Server\r\nredis_version:6.0.16\r\n")
    link._check_server("# Server\r\nredis_version:6.2.0\r\n")
    link._check_server("# Server\r\nredis_version:7.4.1\r\n")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"maxmemory": "0", "maxmemory-policy": "allkeys-lru"}, ()),
        ({"maxmemory": "1gb", "maxmemory-policy": "noeviction"}, ()),
        ({"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"}, ("redis_evicts",)),
        ({"maxmemory": "1gb", "maxmemory-policy": "volatile-ttl"}, ("redis_evicts",)),
        ({"appendonly": "no", "save": "3600 1"}, ()),
        ({"appendonly": "no", "save": ""}, ("redis_not_persistent",)),
    ],
)
async def test_a_server_that_may_lose_what_is_queued_is_told_of_once_by_a_worker(
    redis_url: str,
    control: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, str],
    told: tuple[str, ...],
) -> None:
    before = {name: str(control.config_get(name)[name]) for name in settings}
    for name, value in settings.items():
        control.config_set(name, value)
    try:
        broker = RedisBroker(redis_url)
        await broker.open()
        await broker.publish([envelope("a")])
        assert not caplog.records  # whoever only sends is not to be bothered
        for _ in range(2):
            consumer = broker.consumer(["q"], name="w", lease=60.0)
            await consumer.open()
            await consumer.close()
        await broker.close()
    finally:
        for name, value in before.items():
            control.config_set(name, value)
    events = tuple(record.__dict__["event"] for record in caplog.records)
    assert events == told


async def test_who_may_not_ask_what_the_server_is_like_is_served_all_the_same(
    redis_server: RedisServer,
    redis_url: str,
    control: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    control.acl_setuser(
        "meek",
        enabled=True,
        passwords=["+word"],
        commands=["+@all", "-info", "-config"],
        keys="*",
        channels="*",
    )
    broker = RedisBroker(f"redis://meek:word@{redis_server.host}:{redis_server.port}/0")
    try:
        await broker.open()
        await broker.publish([envelope("a")])
        consumer = broker.consumer(["q"], name="w", lease=60.0)
        await consumer.open()
        assert [one.id for one in await consumer.fetch(1, 0)] == ["a"]
        await consumer.close()
    finally:
        await broker.close()
        control.acl_deluser("meek")
    assert not caplog.records


async def test_a_closed_driver_says_so(redis_url: str) -> None:
    broker = RedisBroker(redis_url)
    with pytest.raises(BrokerUnavailable, match="not open"):
        await broker.publish([envelope("a")])
    await broker.open()
    await broker.close()
    with pytest.raises(BrokerUnavailable, match="not open"):
        await broker.depth()


async def test_a_unix_socket_will_do(watchdog: Watchdog) -> None:
    class SocketServer(RedisServer):
        def _command(self) -> list[str]:
            return [*super()._command(), "--unixsocket", str(self.folder / "socket")]

    server = SocketServer(watchdog)
    try:
        server.start()
        broker = RedisBroker(f"unix://{server.folder}/socket?db=3")
        await broker.open()
        await broker.publish([envelope("a")])
        consumer = broker.consumer(["q"], name="w", lease=60.0)
        await consumer.open()
        assert [one.id for one in await consumer.fetch(1, 0)] == ["a"]
        await consumer.close()
        await broker.close()
        assert server.command("SELECT 3", "DBSIZE")[1] != ":0"
    finally:
        server.close()


# --- odd contents -------------------------------------------------------------------------------


async def test_a_server_that_lost_everything_is_used_again(
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


async def test_many_cancelled_ones_do_not_hide_what_is_behind_them(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(5000)])
    await broker.cancel([f"{n}" for n in range(5000)])
    await broker.publish([envelope("a")])
    assert [one.id for one in await consumer.fetch(10, 0)] == ["a"]


async def test_a_limit_above_what_one_script_takes_is_reached(
    broker: RedisBroker, consumer: RedisConsumer
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(2500)])
    assert [one.id for one in await consumer.fetch(2300, 0)] == [f"{n}" for n in range(2300)]
    assert len(await consumer.fetch(2300, 0)) == 200
