"""The harness of the Redis drivers: one server, several behind Sentinel, or a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import redis

from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.drivers.redis.cluster import ClusterBackend, ClusterBroker
from tests.servers import RedisServer

# The expiry of keys comes nearer, too.
_PASS_TIME = """
    for _, key in ipairs(redis.call('KEYS', '*')) do
      local left = redis.call('PTTL', key)
      if left >= 0 then
        redis.call('PEXPIRE', key, left - tonumber(ARGV[1]))
      end
    end
"""
# Keys that stay when all messages are gone: some of a size that does not grow with the number of
# messages, and the cancelled ids, which a later `cancel` drops after some days.
_PERMANENT = (":queues", ":wake", ":levels", ":cancelled")


class Servers(Protocol):
    """Servers that are stopped and started together."""

    def start(self) -> None:
        """Start those that do not run."""
        ...

    def stop(self) -> None:
        """Stop all of them; their data stays."""
        ...


class RedisHarness:
    """Drivers on Redis servers that can be stopped and whose time can be moved.

    Args:
        servers: All servers.
        masters: The servers that hold keys.
        url: The URL for the drivers.
    """

    can_cut = True
    can_stall = True

    def __init__(self, servers: Servers, masters: Sequence[RedisServer], url: str) -> None:
        self._servers = servers
        self._url = url
        self._controls = [redis.Redis(host=one.host, port=one.port) for one in masters]
        self._brokers: list[RedisBroker | ClusterBroker] = []
        self._backends: list[RedisBackend | ClusterBackend] = []
        self._shift = 0.0

    async def broker(self) -> RedisBroker | ClusterBroker:
        clustered = self._url.startswith("redis+cluster:")
        broker = ClusterBroker(self._url) if clustered else RedisBroker(self._url)
        broker._time_shift = self._shift
        self._brokers.append(broker)
        await broker.open()
        return broker

    async def backend(self) -> RedisBackend | ClusterBackend:
        clustered = self._url.startswith("redis+cluster:")
        backend = ClusterBackend(self._url) if clustered else RedisBackend(self._url)
        self._backends.append(backend)
        await backend.open()
        return backend

    async def pass_time(self, seconds: float) -> None:
        self._shift += seconds
        for broker in self._brokers:
            broker._time_shift = self._shift
        for control in self._controls:
            control.eval(_PASS_TIME, 0, round(seconds * 1000))

    async def now(self) -> float:
        seconds, micros = self._controls[0].time()
        return float(seconds + micros / 1e6 + self._shift)

    async def cut(self) -> None:
        await asyncio.to_thread(self._servers.stop)

    async def mend(self) -> None:
        await asyncio.to_thread(self._servers.start)

    async def stall(self, seconds: float) -> None:
        await self.pass_time(seconds)
        for control in self._controls:
            for key in control.scan_iter("*:meta"):
                for field in ("beat", "granted", "seen"):
                    if control.hexists(key, field):
                        control.hincrbyfloat(key, field, -seconds)

    async def leaks(self) -> list[str]:
        return [
            key.decode()
            for control in self._controls
            for key in control.scan_iter("*")
            if control.ttl(key) < 0 and not key.decode().endswith(_PERMANENT)
        ]

    async def close(self) -> None:
        for broker in self._brokers:
            await broker.close()
        for backend in self._backends:
            await backend.close()
        refused = []
        for control in self._controls:
            refused += control.acl_log()
            control.acl_log_reset()
            control.flushall()
            control.close()
        assert not refused, f"not permitted as the documentation says: {refused}"
