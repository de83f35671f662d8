"""Moves what waits in a shard where its queue is not at home.

A script works within one slot, so what it stores for a queue of another one it stores beside, in
the same step: the run of a schedule, a retry into another queue, a message whose id is to be
unique. From there it goes on in parcels. A parcel does not change until it has arrived, and arrives
once, so that it does not matter who sends it, how often, or who dies in between.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.broker import RedisBroker
from aiotaskq.drivers.redis.client import MOST, MOST_BYTES, Client
from aiotaskq.drivers.redis.cluster.placement import Placement
from aiotaskq.drivers.redis.link import Word

_QUEUES = 50  # in one call of a script


class Relay:
    """Knows all shards.

    Args:
        clients: One for each.
        stores: The same, as brokers.
        placement: Where queues are at home.
    """

    def __init__(
        self, clients: Sequence[Client], stores: Sequence[RedisBroker], placement: Placement
    ) -> None:
        self._clients = clients
        self._stores = stores
        self._placement = placement

    async def move(self, shard: int, queues: Collection[str]) -> None:
        """Move on what waits in one shard, of those of the queues that are not at home there.

        Raises:
            BrokerUnavailable: What has not arrived is moved by the next call, of whomever.
        """
        strays = [queue for queue in queues if shard not in self._placement.of(queue)]
        for start in range(0, len(strays), _QUEUES):
            part = strays[start : start + _QUEUES]
            while parcels := await self._pack(self._clients[shard], part):
                for number, parcel, target, items in parcels:
                    await self._send(shard, part[number - 1], parcel, int(target), items)

    async def _pack(
        self, client: Client, queues: Sequence[str]
    ) -> Sequence[tuple[int, bytes, bytes, Sequence[bytes]]]:
        words: list[Word] = [MOST, MOST_BYTES]
        for queue in queues:
            words += (uuid.uuid4().hex, random.choice(self._placement.of(queue)))
        keys = [client.keys.base(queue) for queue in queues]
        reply: Sequence[Any] = await client.link.script(scripts.PACK, keys, words)
        return reply

    async def _send(
        self, shard: int, queue: str, parcel: bytes, target: int, items: Sequence[bytes]
    ) -> None:
        there, here = self._clients[target], self._clients[shard]
        await self._stores[target].introduce([queue])
        await there.link.script(scripts.UNPACK, [there.keys.base(queue)], [parcel, *items])
        await here.link.script(scripts.ARRIVED, [here.keys.base(queue)], [parcel])
