"""The Redis driver over a cluster: a number of small stores, each in one slot.

A shard is a store like that on a single server. All of its keys have one tag, so that each script
works within one slot. Each queue has one shard, or several. The broker, the consumer and the
lease of a cluster are compositions of those of the shards.
"""

from __future__ import annotations

from aiotaskq.drivers.redis.cluster.broker import ClusterBroker
from aiotaskq.drivers.redis.cluster.results import ClusterBackend

__all__ = ["ClusterBackend", "ClusterBroker"]
