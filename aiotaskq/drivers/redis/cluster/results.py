"""The result backend over a cluster: each outcome lies in the shard of its id.

For one store see `aiotaskq.drivers.redis.results`. A batch is stored in several shards at
once, and some of them may fail. The caller repeats the whole batch then, so the whole batch is
marked as uncertain, also where storing succeeded. Subscribers connect to any node: a message
published at one node reaches the subscribers of all.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.opening import OpenOnce
from aiotaskq.drivers.redis.cluster.gather import gather_all, gather_batches
from aiotaskq.drivers.redis.cluster.nodes import ClusterNodes, ClusterTopology, SlotConnection
from aiotaskq.drivers.redis.cluster.placement import TAGS, ShardPlacement, slot_of
from aiotaskq.drivers.redis.keys import RedisKeys
from aiotaskq.drivers.redis.notify import subscribe_to_outcomes
from aiotaskq.drivers.redis.outcomes import RedisOutcomes
from aiotaskq.drivers.redis.url import parse_cluster_url
from aiotaskq.errors import BackendUnavailable, BatchRefused


class ClusterBackend:
    """Outcomes as strings of JSON, under ``<prefix>:{<tag>}:result:<id>``.

    Args:
        url: As for `ClusterBroker`.
        prefix: The beginning of all keys.

    Raises:
        ConfigError: The URL is wrong.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._cluster = parse_cluster_url(url)
        self._prefix = prefix
        self._placement = ShardPlacement(self._cluster.shards)
        self._nodes = OpenOnce[ClusterNodes](
            lambda: BackendUnavailable(f"{self.url}: the result backend is not open")
        )
        self._stores: list[RedisOutcomes] = []  # one for each shard, while there are nodes

    @property
    def url(self) -> str:
        return self._cluster.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._prefix)

    async def open(self) -> None:
        await self._nodes.open(self._connect)

    async def close(self) -> None:
        nodes = self._nodes.release()
        if nodes is not None:
            await nodes.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        by_shard: dict[int, list[Outcome]] = {}
        for outcome in batch:
            by_shard.setdefault(self._placement.home_of(outcome.task_id), []).append(outcome)
        stores = self._opened()
        try:
            calls = (stores[shard].store(part, ttl) for shard, part in by_shard.items())
            refused, errors = await gather_batches(list(by_shard.values()), calls, batch)
        except BaseException:  # the caller repeats all parts, also those that succeeded
            for shard, part in by_shard.items():
                stores[shard].mark_uncertain(part)
            raise
        answer = [task_id for part in refused for task_id in part]
        if errors:
            raise BatchRefused(errors, answer=answer)
        return answer

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        stores = self._opened()
        parts = await gather_all(
            stores[shard].load(part) for shard, part in self._by_shard(ids).items()
        )
        return {task_id: outcome for part in parts for task_id, outcome in part.items()}

    def subscribe(self) -> AsyncGenerator[Sequence[str | Outcome], None]:
        topology = ClusterTopology(self._cluster.nodes)
        channel = RedisKeys(self._prefix).results
        return subscribe_to_outcomes(topology.connect, channel, self.url)

    async def forget(self, ids: Collection[str]) -> int:
        stores = self._opened()
        return sum(
            await gather_all(
                stores[shard].forget(part) for shard, part in self._by_shard(ids).items()
            )
        )

    def _by_shard(self, ids: Collection[str]) -> dict[int, list[str]]:
        by_shard: dict[int, list[str]] = {}
        for task_id in ids:
            by_shard.setdefault(self._placement.home_of(task_id), []).append(task_id)
        return by_shard

    async def _connect(self) -> ClusterNodes:
        nodes = ClusterNodes(ClusterTopology(self._cluster.nodes), BackendUnavailable)
        connections = [
            SlotConnection(nodes, slot_of(tag), self._cluster.nodes[0], BackendUnavailable)
            for tag in TAGS
        ]
        try:
            await gather_all(connection.open() for connection in connections)
        except BaseException:  # some of them may be open, over connections of `nodes`
            await nodes.close()
            raise
        self._stores = [
            RedisOutcomes(connection, RedisKeys(self._prefix, tag))
            for connection, tag in zip(connections, TAGS, strict=True)
        ]
        return nodes

    def _opened(self) -> list[RedisOutcomes]:
        self._nodes.get()  # or the error that it is not open
        return self._stores
