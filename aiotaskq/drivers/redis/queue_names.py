"""The set of all queues that were ever used.

A queue is added before anything is stored in it. `_known` holds the queues that this process has
added, for as long as the connection lasts: after a reconnect the server may be another one. The
server may also lose its data and come back empty. Then a queue that was added once is missing in
the set. This is logged once, and the broker goes on with new messages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from aiotaskq.drivers.redis.client import RedisClient
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.redis")

_SCANNED = 500  # queues, about, that one round of maintenance goes over, beside the caller's own
_MOST_UNREADABLE = 100  # names that are remembered, so that each is logged once


class RedisQueueNames:
    """The names of the queues in one store.

    Args:
        client: The client of the store.
    """

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._known: set[str] = set()  # queues that are in the set of queues
        self._known_at = 0  # `connects` of the connection to which `_known` applies
        self._introduced: set[str] = set()  # queues that were in the set of queues once
        self._unreadable: set[bytes] = set()  # names of queues that are no text
        self._cursor = "0"  # in the set of queues, for the next round of maintenance

    async def some(self, own: Collection[str]) -> list[str]:
        """Return the queues for a round of maintenance: the caller's own, and others.

        The others change from call to call, so that all queues have their turn. There may be any
        number of names, for most of which there is nothing to do.
        """
        if own:
            there = await self._client.connection.command(
                "SMISMEMBER", self._client.keys.queues, *own
            )
            if not all(there):
                self._known.clear()
                await self.introduce(own)
        cursor, names = await self._client.connection.command(
            "SSCAN", self._client.keys.queues, self._cursor, "COUNT", _SCANNED
        )
        self._cursor = cursor.decode()
        return sorted(self._readable(names).union(own))

    def _readable(self, names: Sequence[bytes]) -> set[str]:
        """Return the names of queues that are text; the others were written by nobody of us."""
        readable: set[str] = set()
        for name in names:
            try:
                readable.add(name.decode())
            except UnicodeDecodeError:
                if name not in self._unreadable and len(self._unreadable) < _MOST_UNREADABLE:
                    self._unreadable.add(name)
                    logger.error("the name of a queue is no text, and it is skipped: %.200r", name)
        return readable

    async def all(self) -> list[str]:
        """Return all queues that were ever used."""
        names = await self._client.connection.command("SMEMBERS", self._client.keys.queues)
        stored = self._readable(names)
        if not self._introduced <= stored:
            self._known_at = 0
            await self.introduce(self._introduced - stored)
        return sorted(stored | self._introduced)

    async def introduce(self, queues: Collection[str]) -> None:
        """Add queues to the set of all queues, before anything is stored in them."""
        connection = self._client.connection
        if self._known_at != connection.connects:  # another server, or one that lost its data
            self._known.clear()
        if self._known.issuperset(queues):
            return
        asked = list(queues)
        held = await connection.command("SMISMEMBER", self._client.keys.queues, *asked)
        # Asked first: a server without memory refuses SADD, even of a member that is there.
        if not all(held):
            missing = {queue for queue, there in zip(asked, held, strict=True) if not there}
            if not missing.isdisjoint(self._introduced):
                self._log_lost_data()
            await connection.command("SADD", self._client.keys.queues, *asked)
        self._known.update(asked)
        self._introduced.update(asked)
        self._known_at = connection.connects

    def _log_lost_data(self) -> None:
        logger.critical(
            "The Redis server has lost its data: it was emptied, or another server has taken its"
            " place. All queued tasks are gone; new ones are accepted",
            extra={"event": "redis_lost_data", "url": self._client.server.url},
        )
        self._introduced.clear()  # so that it is logged once
