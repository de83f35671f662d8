"""The lease of a consumer over a cluster: one lease in each of its shards."""

from __future__ import annotations

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.redis.cluster.gather import gather_all
from aiotaskq.drivers.redis.cluster.nodes import ClusterNodes, ClusterTopology, SlotClient
from aiotaskq.drivers.redis.cluster.placement import SHARDS, ShardPlacement
from aiotaskq.drivers.redis.lease import RedisLease
from aiotaskq.drivers.redis.url import RedisCluster
from aiotaskq.errors import BrokerUnavailable


class ClusterLease:
    """Renews or ends the leases in all shards. A lease that is lost in one shard is lost.

    Args:
        cluster: The address of the cluster.
        prefix: The beginning of all keys.
        placement: The shards of each queue.
        grant: The grant of the lease.
        time_shift: Seconds added to the servers' clocks.
    """

    def __init__(
        self,
        cluster: RedisCluster,
        prefix: str,
        placement: ShardPlacement,
        grant: Grant,
        time_shift: float,
    ) -> None:
        # It may be used on another event loop than the broker.
        self._nodes = ClusterNodes(ClusterTopology(cluster.nodes), BrokerUnavailable)
        self._leases: list[RedisLease] = []
        for shard in range(SHARDS):
            queues = tuple(queue for queue in grant.queues if shard in placement.shards_of(queue))
            if queues:
                client = SlotClient(self._nodes, cluster.nodes[0], prefix, shard)
                client.time_shift = time_shift
                part = Grant(grant.consumer, queues, grant.seconds)
                self._leases.append(RedisLease(client, part, client.shared_connection()))

    async def renew(self) -> bool:
        return all(await gather_all(lease.renew() for lease in self._leases))

    async def end(self, note: str) -> int:
        return sum(await gather_all(lease.end(note) for lease in self._leases))

    async def close(self) -> None:
        for lease in self._leases:
            await lease.close()
        await self._nodes.close()
