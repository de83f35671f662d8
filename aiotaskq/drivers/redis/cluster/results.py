"""Outcomes over the shards of a cluster, each with that of its id."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.redis.address import parse_cluster
from aiotaskq.drivers.redis.cluster.nodes import Nodes, SlotLink, Topology
from aiotaskq.drivers.redis.cluster.placement import TAGS, Placement, slot_of
from aiotaskq.drivers.redis.cluster.together import together
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.outcomes import Outcomes
from aiotaskq.drivers.redis.results import arrivals
from aiotaskq.errors import BackendUnavailable


class ClusterBackend:
    """Outcomes as strings of JSON, under ``<prefix>:{<tag>}:result:<id>``.

    Args:
        url: As of `ClusterBroker`.
        prefix: What all keys begin with.

    Raises:
        ConfigError: The URL is none that there is.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._address = parse_cluster(url)
        self._prefix = prefix
        self._placement = Placement(self._address.shards)
        self._nodes: Nodes | None = None
        self._stores: list[Outcomes] = []

    @property
    def url(self) -> str:
        return self._address.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._prefix)

    async def open(self) -> None:
        if self._nodes is not None:
            return
        nodes = Nodes(Topology(self._address.nodes), BackendUnavailable)
        links = [
            SlotLink(nodes, slot_of(tag), self._address.nodes[0], BackendUnavailable)
            for tag in TAGS
        ]
        try:
            await together(link.open() for link in links)
        except BaseException:
            await nodes.close()
            raise
        if self._nodes is None:
            self._nodes = nodes
            self._stores = [
                Outcomes(link, Keys(self._prefix, tag))
                for link, tag in zip(links, TAGS, strict=True)
            ]
        else:  # two tasks opened it at once
            await nodes.close()

    async def close(self) -> None:
        nodes, self._nodes, self._stores = self._nodes, None, []
        if nodes is not None:
            await nodes.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        by_shard: dict[int, list[Outcome]] = {}
        for outcome in batch:
            by_shard.setdefault(self._placement.home(outcome.task_id), []).append(outcome)
        stores = self._opened()
        try:
            refused = await together(
                stores[shard].store(part, ttl) for shard, part in by_shard.items()
            )
        except BaseException:  # what succeeded is repeated as well, and nobody hears of it here
            for shard, part in by_shard.items():
                stores[shard].doubt(part)
            raise
        return [task_id for part in refused for task_id in part]

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        stores = self._opened()
        parts = await together(
            stores[shard].load(part) for shard, part in self._by_shard(ids).items()
        )
        return {task_id: outcome for part in parts for task_id, outcome in part.items()}

    def subscribe(self) -> AsyncGenerator[Sequence[str | Outcome], None]:
        # Whatever node is told something tells all others.
        topology = Topology(self._address.nodes)
        return arrivals(topology.connect, Keys(self._prefix).results, self.url)

    async def forget(self, ids: Collection[str]) -> int:
        stores = self._opened()
        return sum(
            await together(
                stores[shard].forget(part) for shard, part in self._by_shard(ids).items()
            )
        )

    def _by_shard(self, ids: Collection[str]) -> dict[int, list[str]]:
        by_shard: dict[int, list[str]] = {}
        for task_id in ids:
            by_shard.setdefault(self._placement.home(task_id), []).append(task_id)
        return by_shard

    def _opened(self) -> list[Outcomes]:
        if self._nodes is None:
            raise BackendUnavailable(f"{self._address.url}: the result backend is not open")
        return self._stores
