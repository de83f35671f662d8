"""The sign of life of a consumer, in each of its shards."""

from __future__ import annotations

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.redis.address import ClusterAddress
from aiotaskq.drivers.redis.cluster.nodes import Nodes, SlotClient, Topology
from aiotaskq.drivers.redis.cluster.placement import SHARDS, Placement
from aiotaskq.drivers.redis.cluster.together import together
from aiotaskq.drivers.redis.lease import RedisLease
from aiotaskq.errors import BrokerUnavailable


class ClusterLease:
    """See `aiotaskq.contract.broker.Lease`. One that is lost in one shard is lost.

    Args:
        address: Of the cluster.
        prefix: What all keys begin with.
        placement: Where the queues are.
        grant: Whose.
        time_shift: Of the broker.
    """

    def __init__(
        self,
        address: ClusterAddress,
        prefix: str,
        placement: Placement,
        grant: Grant,
        time_shift: float,
    ) -> None:
        # It may be used on another event loop than the broker.
        self._nodes = Nodes(Topology(address.nodes), BrokerUnavailable)
        self._leases: list[RedisLease] = []
        for shard in range(SHARDS):
            queues = tuple(queue for queue in grant.queues if shard in placement.of(queue))
            if queues:
                client = SlotClient(self._nodes, address.nodes[0], prefix, shard)
                client.time_shift = time_shift
                part = Grant(grant.consumer, queues, grant.seconds)
                self._leases.append(RedisLease(client, part, client.shared_link()))

    async def renew(self) -> bool:
        return all(await together(lease.renew() for lease in self._leases))

    async def end(self, note: str) -> int:
        return sum(await together(lease.end(note) for lease in self._leases))

    async def close(self) -> None:
        for lease in self._leases:
            await lease.close()
        await self._nodes.close()
