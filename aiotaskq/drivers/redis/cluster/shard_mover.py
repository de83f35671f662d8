"""Moves misplaced messages on: from the shard where they were stored to a shard of their queue.

A script works within one slot. So a message for a queue of another shard is first stored beside
its cause, in the same step: the run of a schedule, a retry into another queue, a message whose id
is to be unique. From there it is moved on.

Theory of operation
-------------------

Messages move in parcels, in three steps, each of which is a script in one slot:

1. ``pack`` takes messages out of a queue and puts them into its one parcel, with a new id and the
   number of the shard that it goes to. While the queue has a parcel, ``pack`` returns that one.
2. ``unpack`` stores the contents in the other shard, unless it has received a parcel of this id.
3. ``drop_parcel`` deletes the parcel.

Any process may die between two steps, and any number of them may do them at the same time. A
parcel does not change until it is deleted, and it is stored once. So it does not matter which
process sends it, or how often. Each round of `maintain`, of any process, moves on the messages
that others have left.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from aiotaskq.drivers.common.batches import slices
from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.broker import RedisBroker
from aiotaskq.drivers.redis.client import MAX_BYTES, MAX_ENTRIES, MAX_QUEUES, RedisClient
from aiotaskq.drivers.redis.cluster.placement import ShardPlacement
from aiotaskq.drivers.redis.connection import Word


class ShardMover:
    """Moves messages between the shards of a cluster.

    Args:
        clients: The clients of all shards.
        stores: The same shards as brokers.
        placement: The shards of each queue.
    """

    def __init__(
        self,
        clients: Sequence[RedisClient],
        stores: Sequence[RedisBroker],
        placement: ShardPlacement,
    ) -> None:
        self._clients = clients
        self._stores = stores
        self._placement = placement

    async def move(self, shard: int, queues: Collection[str]) -> None:
        """Move on the messages in a shard of those of the queues that belong elsewhere.

        Raises:
            BrokerUnavailable: The next call, by any process, moves on the rest.
        """
        misplaced = [queue for queue in queues if shard not in self._placement.shards_of(queue)]
        for part in slices(misplaced, MAX_QUEUES):
            while parcels := await self._pack(self._clients[shard], part):
                for number, parcel, target, contents in parcels:
                    await self._send(shard, part[number - 1], parcel, int(target), contents)

    async def _pack(
        self, client: RedisClient, queues: Sequence[str]
    ) -> Sequence[tuple[int, bytes, bytes, Sequence[bytes]]]:
        args: list[Word] = [MAX_ENTRIES, MAX_BYTES, len(self._stores)]
        for queue in queues:
            args += (uuid.uuid4().hex, random.choice(self._placement.shards_of(queue)))
        keys = [client.keys.base(queue) for queue in queues]
        reply: Sequence[Any] = await client.connection.script(scripts.PACK, keys, args)
        return reply

    async def _send(
        self, shard: int, queue: str, parcel: bytes, target: int, contents: Sequence[bytes]
    ) -> None:
        there, here = self._clients[target], self._clients[shard]
        await self._stores[target].names.introduce([queue])
        base = there.keys.base(queue)
        await there.connection.script(scripts.UNPACK, [base], [parcel, *contents])
        await here.connection.script(scripts.DROP_PARCEL, [here.keys.base(queue)], [parcel])
