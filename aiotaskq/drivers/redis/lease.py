"""The lease of a consumer at the Redis broker, which any process can renew or end."""

from __future__ import annotations

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.client import MAX_ENTRIES, RedisClient
from aiotaskq.drivers.redis.connection import RedisConnection, Word

_LONGEST_NOTE = 500  # characters: it is kept with every message that is taken back


class RedisLease:
    """Renews or ends a consumer's lease over a connection that the consumer does not use.

    Args:
        client: The client of the broker, open or not.
        grant: The grant of the lease.
        connection: A connection of its own.
    """

    def __init__(self, client: RedisClient, grant: Grant, connection: RedisConnection) -> None:
        self._client = client
        self._grant = grant
        self._bases = [client.keys.base(queue) for queue in grant.queues]
        self._connection = connection

    async def renew(self) -> bool:
        args: list[Word] = [
            self._client.time_shift,
            self._grant.consumer,
            self._grant.seconds,
        ]
        return bool(await self._connection.script(scripts.RENEW, self._bases, args))

    async def end(self, note: str) -> int:
        keys = [*self._bases, self._client.keys.cancelled]
        packed = note[:_LONGEST_NOTE].encode(errors="replace")
        args: list[Word] = [self._client.time_shift, self._grant.consumer, MAX_ENTRIES, packed]
        count: int = await self._connection.script(scripts.END, keys, args)
        return count

    async def close(self) -> None:
        await self._connection.close()
