"""Subscriptions to the notices of stored results.

A notice is a JSON array of ids, or empty where an id is too long for a notice. A subscription that
loses its connection ends with an error; `PostgresBackend.subscribe` begins another one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Self

import msgspec

from aiotaskq.drivers.postgres.connection import PING_EVERY, Connection, PostgresPool
from aiotaskq.errors import BackendUnavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.drivers.postgres")

_decode_ids = msgspec.json.Decoder(list[str]).decode


class PostgresSubscription:
    """Notices of results, over a connection of its own, from `__aenter__` to `__aexit__`.

    Args:
        pool: The pool of the backend.
        channel: The channel of the notices.
    """

    def __init__(self, pool: PostgresPool, channel: str) -> None:
        self._pool = pool
        self._channel = channel
        self._connection: Connection | None = None
        self._notices: deque[str] = deque()
        self._received = asyncio.Event()
        self._told = False  # whether a notice that cannot be read was logged

    async def __aenter__(self) -> Self:
        self._connection = await self._pool.listen({self._channel: self._receive}, ended=self._end)
        return self

    async def __aexit__(self, *_: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._pool.disconnect(connection)

    async def next(self) -> Sequence[str]:
        """Wait for notices; return the ids, or an empty list if subscribers have to look.

        Raises:
            BackendUnavailable: The connection is lost.
        """
        while not self._notices:
            self._received.clear()
            try:
                async with asyncio.timeout(PING_EVERY):
                    await self._received.wait()
            except TimeoutError:
                assert self._connection is not None
                await self._pool.ping(self._connection)
            if self._connection is None or self._connection.is_closed():
                raise BackendUnavailable(f"the connection to {self._pool.url.shown} is lost")
        notices, self._notices = self._notices, deque()
        with_ids = [notice for notice in notices if notice]
        ids = [one for notice in with_ids for one in self._read(notice)]
        if ids and len(with_ids) < len(notices):
            self._notices.append("")  # makes the next item an empty one
        return ids

    def _read(self, notice: str) -> list[str]:
        try:
            return _decode_ids(notice)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            # Every role of the database may send notices. Without ids, subscribers have to look.
            if not self._told:
                self._told = True
                logger.warning("a notice of results is none of ours: %.100r", notice)
            return []

    def _receive(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._notices.append(str(payload))
        self._received.set()

    def _end(self, _connection: object) -> None:
        self._received.set()
