"""Opening of a Redis driver: refused servers, failed openings, and the warnings of a worker."""

from __future__ import annotations

import asyncio

import pytest
import redis

from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.drivers.redis.connection import RedisConnection
from aiotaskq.drivers.redis.url import parse_url
from aiotaskq.errors import BrokerUnavailable, ConfigError
from tests.drivers.redis.tools import PATIENCE, envelope
from tests.servers import RedisServer, Watchdog


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


async def test_a_missing_database_is_refused_at_once(redis_server: RedisServer) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        await RedisBroker(redis_server.url(redis_server.databases)).open()


def test_a_server_that_is_too_old_is_refused() -> None:
    connection = RedisConnection(parse_url("redis://h"), BrokerUnavailable)
    with pytest.raises(ConfigError, match=r"is Redis 6\.0\.16; at least 6\.2 is needed"):
        connection._check_server("# Server\r\nredis_version:6.0.16\r\n")
    connection._check_server("# Server\r\nredis_version:6.2.0\r\n")
    connection._check_server("# Server\r\nredis_version:7.4.1\r\n")


async def test_an_opening_that_fails_leaves_no_connection(
    redis_server: RedisServer, control: redis.Redis
) -> None:
    control.acl_setuser(
        "timeless", enabled=True, passwords=["+word"], commands=["+@all", "-time"], keys="*"
    )
    broker = RedisBroker(f"redis://timeless:word@{redis_server.host}:{redis_server.port}/0")
    try:
        with pytest.raises(BrokerUnavailable, match="permission"):
            await broker.open()
        await until_connections(control, "timeless", 0)
        control.acl_setuser("timeless", enabled=True, commands=["+time"])
        await broker.open()
        await until_connections(control, "timeless", 1)
    finally:
        await broker.close()
        control.acl_deluser("timeless")


async def test_tasks_that_open_a_driver_at_the_same_time_share_one_connection(
    redis_server: RedisServer, control: redis.Redis
) -> None:
    control.acl_setuser("shared", enabled=True, passwords=["+word"], commands=["+@all"], keys="*")
    url = f"redis://shared:word@{redis_server.host}:{redis_server.port}/0"
    try:
        for driver in (RedisBroker(url), RedisBackend(url)):
            await asyncio.gather(*(driver.open() for _ in range(3)))
            await until_connections(control, "shared", 1)
            await driver.close()
            await until_connections(control, "shared", 0)
    finally:
        control.acl_deluser("shared")


async def until_connections(control: redis.Redis, user: str, count: int) -> None:
    """Wait until a user has this number of connections."""
    async with asyncio.timeout(PATIENCE):
        while [one["user"] for one in control.client_list()].count(user) != count:
            await asyncio.sleep(0.01)


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
async def test_a_worker_warns_once_of_settings_that_may_lose_messages(
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
        assert not caplog.records  # a process that only sends is not bothered
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


async def test_a_user_without_permission_for_info_is_served_without_warnings(
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


async def test_a_closed_broker_raises(redis_url: str) -> None:
    broker = RedisBroker(redis_url)
    with pytest.raises(BrokerUnavailable, match="not open"):
        await broker.publish([envelope("a")])
    await broker.open()
    await broker.close()
    with pytest.raises(BrokerUnavailable, match="not open"):
        await broker.depth()


async def test_a_unix_socket_works(watchdog: Watchdog) -> None:
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
