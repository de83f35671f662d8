"""The Redis driver over a cluster: a number of small stores, each in one slot.

A shard is a store like that on a single server, whose keys all have one tag, so that each of the
scripts works within one slot. Each queue has its shard, or several; what is above composes them.
"""

from __future__ import annotations

from aiotaskq.drivers.redis.cluster.broker import ClusterBroker
from aiotaskq.drivers.redis.cluster.results import ClusterBackend

__all__ = ["ClusterBackend", "ClusterBroker"]
