"""The server, keys, clock and connection that a broker, its consumers and its schedules share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiotaskq.drivers.common.opening import OpenOnce
from aiotaskq.drivers.redis.connection import RedisConnection
from aiotaskq.drivers.redis.items import SerialNumbers
from aiotaskq.drivers.redis.keys import RedisKeys
from aiotaskq.drivers.redis.server import RedisServer
from aiotaskq.errors import BrokerFull, BrokerUnavailable

MAX_ENTRIES = 1000
"""Entries in one call of a script: Lua's stack has room for some 8000 values."""

MAX_BYTES = 4 * 2**20
"""Bytes in one call of a script, about: the server serves no other client meanwhile."""

MAX_QUEUES = 50
"""Queues in one call of a script that goes over all of them."""


class RedisClient:
    """A client of one store, with one connection for ordinary commands.

    Attributes:
        server: The address of the store.
        keys: The names of its keys.
        serials: The serial numbers of delayed items.
        time_shift: Seconds added to the server's clock. Only a test harness changes it.
    """

    def __init__(self, server: RedisServer, keys: RedisKeys) -> None:
        self.server = server
        self.keys = keys
        self.serials = SerialNumbers()
        self.time_shift = 0.0
        self._connection = OpenOnce[RedisConnection](
            lambda: BrokerUnavailable(f"{server.url}: the broker is not open")
        )

    @property
    def connection(self) -> RedisConnection:
        """The connection for ordinary commands.

        Raises:
            BrokerUnavailable: The broker is not open.
        """
        connection = self._connection.resource  # without a call, as each command comes this way
        return self._connection.get() if connection is None else connection

    async def open(self, prepare: Callable[[RedisConnection], Awaitable[None]]) -> None:
        """Connect, and check that the server can be used. Does nothing if it is open.

        Args:
            prepare: Uses the connection before any other caller does.

        Raises:
            ConfigError: The server cannot be used as the URL says.
            BrokerUnavailable: It cannot be reached now.
        """

        async def connect() -> RedisConnection:
            connection = self.shared_connection()
            await connection.open(prepare)
            return connection

        await self._connection.open(connect)

    async def close(self) -> None:
        """Disconnect."""
        connection = self._connection.release()
        if connection is not None:
            await connection.close()

    def shared_connection(self) -> RedisConnection:
        """Return a connection for commands that do not block."""
        return self.new_connection()

    def new_connection(self) -> RedisConnection:
        """Return a connection that nothing else uses, for commands that block."""
        return RedisConnection(self.server, BrokerUnavailable, full=BrokerFull)
