"""The master that Redis Sentinel names: asked for whenever a connection is made."""

from __future__ import annotations

import random

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import NoPermissionError, RedisError

from aiotaskq.drivers.redis.server import Address, ask
from aiotaskq.errors import ConfigError


class SentinelAddress(Address, frozen=True, kw_only=True):
    """The master of a service.

    Attributes:
        service: What the sentinels call it.
        sentinels: Where they are, in no order.
    """

    service: str
    sentinels: tuple[Address, ...]

    async def connect(self) -> AbstractConnection:
        host, port = await self._master()
        connection = await self.at(host, port).connect()
        try:
            # A sentinel may not have heard yet that another has taken over.
            role = await ask(connection, "ROLE", within=self.timeout)
            if role[0] != b"master":
                raise Disconnected(f"{host}:{port} is no master; the sentinels are not agreed yet")
        except NoPermissionError:
            return connection  # a replica would refuse the first write
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _master(self) -> tuple[str, int]:
        """Ask one sentinel after the other."""
        trouble: Exception | None = None
        strangers = 0
        for sentinel in random.sample(self.sentinels, len(self.sentinels)):
            try:
                found = await self._ask(sentinel)
            except (RedisError, OSError) as error:
                trouble = error
                continue
            if found is not None:
                return found
            strangers += 1
        if strangers:
            told = (
                f"{self.url}: the sentinels know no master {self.service!r};"
                " name the right one with ?service="
            )
            if trouble is None:
                raise ConfigError(told)
            raise Disconnected(f"{told}; of others there is no answer: {trouble}")
        assert trouble is not None  # there is one sentinel at least
        if not isinstance(trouble, RedisError):
            raise Disconnected(f"no sentinel answers: {trouble}") from trouble
        raise trouble

    async def _ask(self, sentinel: Address) -> tuple[str, int] | None:
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
