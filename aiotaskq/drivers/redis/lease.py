"""The sign of life of a consumer at the Redis broker, which any process can give, or end."""

from __future__ import annotations

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.client import MOST, Client
from aiotaskq.drivers.redis.link import Link, Word

_LONGEST_NOTE = 500  # characters: it is kept with every message that was taken back


class RedisLease:
    """Renews or ends a consumer's lease over a connection that the consumer does not use.

    Args:
        client: Where; it need not be open.
        grant: Whose.
        link: Its connection.
    """

    def __init__(self, client: Client, grant: Grant, link: Link) -> None:
        self._client = client
        self._grant = grant
        self._bases = [client.keys.base(queue) for queue in grant.queues]
        self._link = link

    async def renew(self) -> bool:
        words: list[Word] = [
            self._client.time_shift,
            self._grant.consumer,
            self._grant.seconds,
        ]
        return bool(await self._link.script(scripts.RENEW, self._bases, words))

    async def end(self, note: str) -> int:
        keys = [*self._bases, self._client.keys.cancelled]
        packed = note[:_LONGEST_NOTE].encode(errors="replace")
        words: list[Word] = [self._client.time_shift, self._grant.consumer, MOST, packed]
        count: int = await self._link.script(scripts.END, keys, words)
        return count

    async def close(self) -> None:
        await self._link.close()
