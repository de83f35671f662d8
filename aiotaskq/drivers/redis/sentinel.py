"""The master that Redis Sentinel names; the sentinels are asked whenever a connection is made."""

from __future__ import annotations

import random

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import NoPermissionError, RedisError

from aiotaskq.drivers.redis.server import RedisServer, ask
from aiotaskq.errors import ConfigError


class RedisSentinelMaster(RedisServer, frozen=True, kw_only=True):
    """The master of a service, whichever server that is at the time.

    Attributes:
        service: The name of the service at the sentinels.
        sentinels: The sentinels, in no order.
    """

    service: str
    sentinels: tuple[RedisServer, ...]

    async def connect(self) -> AbstractConnection:
        host, port = await self._master()
        connection = await self.at(host, port).connect()
        try:
            # A sentinel may not know yet that another server has taken over.
            role = await ask(connection, "ROLE", within=self.timeout)
            if role[0] != b"master":
                raise Disconnected(f"{host}:{port} is no master; the sentinels do not agree yet")
        except NoPermissionError:
            return connection  # a replica would refuse the first write
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _master(self) -> tuple[str, int]:
        """Return the host and the port of the master; ask one sentinel after the other."""
        failure: Exception | None = None
        ignorant = 0  # sentinels that know no such service
        for sentinel in random.sample(self.sentinels, len(self.sentinels)):
            try:
                found = await self._ask(sentinel)
            except (RedisError, OSError) as error:
                failure = error
                continue
            if found is not None:
                return found
            ignorant += 1
        if ignorant:
            reason = (
                f"{self.url}: the sentinels know no master {self.service!r};"
                " name the right one with ?service="
            )
            if failure is None:
                raise ConfigError(reason)
            raise Disconnected(f"{reason}; other sentinels do not answer: {failure}")
        assert failure is not None  # there is one sentinel at least
        if not isinstance(failure, RedisError):
            raise Disconnected(f"no sentinel answers: {failure}") from failure
        raise failure

    async def _ask(self, sentinel: RedisServer) -> tuple[str, int] | None:
        connection = await sentinel.connect()
        try:
            found = await ask(
                connection,
                "SENTINEL",
                "GET-MASTER-ADDR-BY-NAME",
                self.service,
                within=sentinel.timeout,
            )
        finally:
            await connection.disconnect(nowait=True)
        return None if found is None else (found[0].decode(), int(found[1]))
