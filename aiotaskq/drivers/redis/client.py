"""The server, keys, clock and connection that a broker, its consumers and its schedules share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from aiotaskq.drivers.redis.connection import RedisConnection
from aiotaskq.drivers.redis.items import SerialNumbers
from aiotaskq.drivers.redis.keys import RedisKeys
from aiotaskq.drivers.redis.server import RedisServer
from aiotaskq.errors import BrokerFull, BrokerUnavailable

Value = TypeVar("Value")

MAX_ENTRIES = 1000
"""Entries in one call of a script: Lua's stack has room for some 8000 values."""

MAX_BYTES = 4 * 2**20
"""Bytes in one call of a script, about: the server serves no other client meanwhile."""


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
        self._connection: RedisConnection | None = None

    @property
    def connection(self) -> RedisConnection:
        """The connection for ordinary commands.

        Raises:
            BrokerUnavailable: The broker is not open.
        """
        if self._connection is None:
            raise BrokerUnavailable(f"{self.server.url}: the broker is not open")
        return self._connection

    @property
    def is_open(self) -> bool:
        """Whether `open` succeeded, and `close` was not called since."""
        return self._connection is not None

    async def open(self) -> None:
        """Connect, and check that the server will do."""
        connection = self.shared_connection()
        try:
            await connection.open()
        except BaseException:
            await connection.close()
            raise
        if self._connection is None:
            self._connection = connection
        else:  # two tasks opened it at once
            await connection.close()

    async def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def shared_connection(self) -> RedisConnection:
        """Return a connection for commands that do not block."""
        return self.new_connection()

    def new_connection(self) -> RedisConnection:
        """Return a connection that nothing else uses, for commands that block."""
        return RedisConnection(self.server, BrokerUnavailable, full=BrokerFull)


def portions(values: Sequence[Value], sizes: Sequence[int]) -> Iterator[Sequence[Value]]:
    """Split values, given their sizes in bytes, into portions for one call of a script each."""
    if len(values) <= MAX_ENTRIES and sum(sizes) <= MAX_BYTES:
        if values:
            yield values
        return
    portion: list[Value] = []
    total = 0
    for value, size in zip(values, sizes, strict=True):
        if len(portion) == MAX_ENTRIES or (portion and total + size > MAX_BYTES):
            yield portion
            portion, total = [], 0
        portion.append(value)
        total += size
    if portion:
        yield portion
