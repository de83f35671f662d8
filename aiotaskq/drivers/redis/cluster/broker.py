"""The Redis broker over a cluster: each call goes to the shards that it concerns.

Theory of operation
-------------------

A shard is a complete store in one slot, with a `RedisBroker` of its own, and keeps the invariants
of one server. There is no atomic step over two shards. So each call is made of steps in single
shards, such that it may break off after any of them:

* *Placement.* A queue has one shard or several (`placement.py`). A plain message is stored in one
  of them. The same `call_id` leads to the same shards, so a repeated call finds the messages
  that it has stored.
* *Unique ids.* The shard that is the home of an id remembers it. A unique message is stored
  there, in the same step, and moved on to a shard of its queue afterwards (`shard_mover.py`). The
  runs of a schedule, retries into another queue and revived letters are stored beside their
  cause, and moved on likewise. If the process dies in between, the next `maintain` of any process
  moves them on.
* *Cancelling.* A message may be in any shard, or come to any. So all shards know all cancelled ids.
* *Leases.* A consumer has a lease in each shard of its queues. One that is lost anywhere is lost.
* *Dead letters.* The key of a letter is its key in its shard, a slash and the number of the
  shard. Letters of all shards are merged by the time of their death, and then by shard.

Counts are sums over the shards. These do not count at the same moment, so a sum is exact only while
no message moves.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, Self

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.contract.settlement import Again, Settlement
from aiotaskq.drivers.common.batches import slices
from aiotaskq.drivers.common.dead_letter_keys import not_a_key
from aiotaskq.drivers.redis.broker import RedisBroker
from aiotaskq.drivers.redis.cluster.consumer import ClusterConsumer
from aiotaskq.drivers.redis.cluster.gather import gather_all, gather_batches
from aiotaskq.drivers.redis.cluster.lease import ClusterLease
from aiotaskq.drivers.redis.cluster.nodes import ClusterNodes, ClusterTopology, SlotClient
from aiotaskq.drivers.redis.cluster.placement import SHARDS, ShardPlacement, hash_of
from aiotaskq.drivers.redis.cluster.results import ClusterBackend
from aiotaskq.drivers.redis.cluster.schedules import ClusterSchedules
from aiotaskq.drivers.redis.cluster.shard_mover import ShardMover
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.dead_letters import unstorable_letters
from aiotaskq.drivers.redis.url import parse_cluster_url
from aiotaskq.errors import BatchRefused, BrokerUnavailable

_STRETCH = 100  # successive envelopes of one queue in a batch that go to the same shard
_TICK = 1e-6  # seconds: the resolution of the times of dead letters


class ClusterBroker:
    """Messages in the shards of a Redis cluster.

    Args:
        url: ``redis+cluster://[[user]:password@]host[:port],...[?shards=number]``, or
            ``rediss+cluster://`` for TLS. With several shards a queue's messages are spread over
            as many slots, and the oldest first holds in each of them.
        prefix: The beginning of all keys.

    Raises:
        ConfigError: The URL has another form.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._prefix = prefix
        self._cluster = parse_cluster_url(url)
        self._placement = ShardPlacement(self._cluster.shards)
        self._nodes = ClusterNodes(ClusterTopology(self._cluster.nodes), BrokerUnavailable)
        self._clients = [
            SlotClient(self._nodes, self._cluster.nodes[0], prefix, shard)
            for shard in range(SHARDS)
        ]
        self._stores = [RedisBroker(url, prefix=prefix, client=one) for one in self._clients]
        self._mover = ShardMover(self._clients, self._stores, self._placement)
        self._turns = itertools.count()

    @property
    def url(self) -> str:
        return self._cluster.url

    @property
    def _time_shift(self) -> float:
        """Seconds added to the servers' clocks; for test harnesses."""
        return self._clients[0].time_shift

    @_time_shift.setter
    def _time_shift(self, seconds: float) -> None:
        for client in self._clients:
            client.time_shift = seconds

    def clone(self) -> Self:
        clone = type(self)(self._given_url, prefix=self._prefix)
        clone._time_shift = self._time_shift
        return clone

    def backend(self) -> ClusterBackend:
        return ClusterBackend(self._given_url, prefix=self._prefix)

    async def open(self) -> None:
        try:
            await gather_all(store.open() for store in self._stores)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        await self._nodes.close()

    # --- messages -------------------------------------------------------------------------------

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        turn = next(self._turns) if call_id is None else hash_of(call_id)
        if any(envelope.unique for envelope in batch):
            return await self._publish_in_order(batch, call_id, turn)
        shares = self._spread(batch, turn)
        calls = (
            self._stores[shard].publish(share, call_id=call_id) for shard, share in shares.items()
        )
        _, errors = await gather_batches(list(shares.values()), calls, batch)
        if errors:
            raise BatchRefused(errors)
        return []

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> ClusterConsumer:
        identity = f"{name}:{uuid.uuid4().hex}"
        parts: dict[str, list[RedisConsumer]] = {
            queue: [
                self._stores[shard].part_of_consumer(
                    identity,
                    [queue],
                    queues,
                    lease=lease,
                    about=about,
                    # One warning is enough: the nodes are set up alike.
                    warns=(place, queue) == (0, queues[0]),
                )
                for place, shard in enumerate(self._placement.shards_of(queue))
            ]
            for queue in queues
        }
        return ClusterConsumer(Grant(identity, tuple(queues), lease), parts, self._forward)

    def schedules(self) -> ClusterSchedules:
        shard = self._placement.home_of("schedules")

        async def forward(queues: Collection[str]) -> None:
            await self._move(shard, queues)

        return ClusterSchedules(self._stores[shard].schedules(), forward)

    def lease(self, grant: Grant) -> ClusterLease:
        return ClusterLease(self._cluster, self._prefix, self._placement, grant, self._time_shift)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        found = await gather_all(store.consumers() for store in self._stores)
        return list({one.id: one for part in found for one in part}.values())

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        # An id that was cancelled before stays so, though it is held now. All shards know it.
        before = set() if running else await self.cancelled_among(ids)
        found = await gather_all(store.cancel(ids, running=running) for store in self._stores)
        held = {name for part in found for name in part} - before
        if held:  # the shards that do not hold them have cancelled them
            await gather_all(store.uncancel(held) for store in self._stores)
        return held

    async def cancelled_among(self, ids: Collection[str]) -> set[str]:
        return await self._stores[0].cancelled_among(ids)  # all shards know the same

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        rounds = await gather_all(self._maintain(shard, limits) for shard in range(SHARDS))
        return Maintained(
            promoted=sum(one.promoted for one in rounds),
            reclaimed=sum(one.reclaimed for one in rounds),
            trimmed=sum(one.trimmed for one in rounds),
            aside=sum(one.aside for one in rounds),
        )

    async def depth(self) -> Mapping[str, Depth]:
        depths: dict[str, Depth] = {}
        for part in await gather_all(store.depth() for store in self._stores):
            for queue, found in part.items():
                known = depths.get(queue, Depth())
                depths[queue] = Depth(
                    ready=known.ready + found.ready,
                    delayed=known.delayed + found.delayed,
                    held=known.held + found.held,
                    dead=known.dead + found.dead,
                )
        return depths

    async def purge(self, queue: str) -> int:
        return sum(await gather_all(store.purge(queue) for store in self._stores))

    # --- dead letters ---------------------------------------------------------------------------

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        edges = await self._edges(queue, before)
        parts = await gather_all(
            store.letters.read_timed(queue, limit, edge)
            for store, edge in zip(self._stores, edges, strict=True)
        )
        letters = [
            (died_at, shard, letter) for shard, part in enumerate(parts) for died_at, letter in part
        ]
        letters.sort(key=lambda one: one[:2], reverse=True)
        return [_with_shard(letter, shard) for _, shard, letter in letters[:limit]]

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        missing: list[str] = []
        shares: dict[int, list[tuple[str, Envelope]]] = {}
        refused = unstorable_letters(letters)
        for place, (key, envelope) in enumerate(letters):
            if place in refused:
                continue
            shard, own = _split_key(key)
            if shard is None:
                missing.append(key)
            else:
                shares.setdefault(shard, []).append((own, envelope))
        if not shares and missing:
            await self._check_reachable(queue)
        for shard, share in shares.items():
            missing += await self._revive(shard, queue, share)
        if refused:
            raise BatchRefused(refused, answer=missing)
        return missing

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        shares: dict[int, list[str]] = {}
        for key in keys:
            shard, own = _split_key(key)
            if shard is not None:
                shares.setdefault(shard, []).append(own)
        if not shares and keys:
            await self._check_reachable(queue)
        return sum(
            await gather_all(
                self._stores[shard].discard(queue, share) for shard, share in shares.items()
            )
        )

    async def _check_reachable(self, queue: str) -> None:
        """Ask a server, so that a call about impossible keys fails as any other if it is away."""
        await self._clients[self._placement.shards_of(queue)[0]].connection.command("PING")

    async def _edges(self, queue: str, before: str | None) -> Sequence[float | None]:
        """Return for each shard the time before which its letters are older than `before`."""
        if before is None:
            return [None] * SHARDS
        shard, own = _split_key(before)
        died_at = None if shard is None else await self._stores[shard].letters.time_of(queue, own)
        if shard is None or died_at is None:
            raise not_a_key(before)
        # Of letters with the same time, that of the shard with the lower number counts as older.
        return [died_at + _TICK if one < shard else died_at for one in range(SHARDS)]

    async def _revive(
        self, shard: int, queue: str, share: Sequence[tuple[str, Envelope]]
    ) -> list[str]:
        """Revive letters of one shard, given by their keys there; return the missing keys."""
        envelopes = [envelope for _, envelope in share]
        ids = {envelope.id for envelope in envelopes}
        await gather_all(store.uncancel(ids) for store in self._stores)
        missing = await self._stores[shard].revive(queue, share)
        await gather_all(
            self._stores[self._placement.home_of(one.id)].note_unique(one.id)
            for one in envelopes
            if one.unique
        )
        await self._move(shard, {envelope.queue for envelope in envelopes})
        return [f"{own}/{shard}" for own in missing]

    # --- shards ---------------------------------------------------------------------------------

    def _spread(self, batch: Sequence[Envelope], turn: int) -> dict[int, list[Envelope]]:
        """Split a batch by shard, in the same way for the same turn."""
        by_queue: dict[str, list[Envelope]] = {}
        for envelope in batch:
            by_queue.setdefault(envelope.queue, []).append(envelope)
        shares: dict[int, list[Envelope]] = {}
        for queue, share in by_queue.items():
            shards = self._placement.shards_of(queue)
            if len(shards) == 1:
                shares.setdefault(shards[0], []).extend(share)
                continue
            for number, stretch in enumerate(slices(share, _STRETCH), turn):
                shares.setdefault(shards[number % len(shards)], []).extend(stretch)
        return shares

    async def _publish_in_order(
        self, batch: Sequence[Envelope], call_id: str | None, turn: int
    ) -> list[str]:
        """Store unique envelopes in the home shard of their id, and move them on from there."""

        def first(envelope: Envelope) -> int:
            if envelope.unique:
                return self._placement.home_of(envelope.id)
            shards = self._placement.shards_of(envelope.queue)
            return shards[turn % len(shards)]

        refused: list[str] = []
        errors: dict[int, Exception] = {}
        for number, (shard, group) in enumerate(itertools.groupby(batch, key=first)):
            share = list(group)
            call = None if call_id is None else f"{call_id}:{number}"
            calls = [self._stores[shard].publish(share, call_id=call)]
            [told], found = await gather_batches([share], calls, batch)
            refused += told
            errors |= found
            await self._move(shard, {envelope.queue for envelope in share})
        if errors:
            raise BatchRefused(errors, answer=refused)
        return refused

    async def _forward(self, batch: Sequence[Settlement]) -> None:
        """Move on the messages that were put into other queues than they came from."""
        for settlement in batch:
            if isinstance(settlement, Again):
                queue, came_from = settlement.envelope.queue, settlement.delivery.queue
                if queue != came_from:
                    for shard in self._placement.shards_of(came_from):
                        await self._move(shard, [queue])

    async def _maintain(self, shard: int, limits: DeadLimits) -> Maintained:
        store = self._stores[shard]
        queues = await store.some_queues()
        maintained = await store.maintain_some(queues, limits)
        await self._mover.move(shard, queues)
        return maintained

    async def _move(self, shard: int, queues: Collection[str]) -> None:
        """Move messages on; if that fails now, the next `maintain` of any process does it."""
        with suppress(BrokerUnavailable):
            await self._mover.move(shard, queues)


_SHARD_NUMBERS = {f"{shard}": shard for shard in range(SHARDS)}


def _split_key(key: str) -> tuple[int | None, str]:
    """Return the shard of a dead letter, and its key there; None if no letter can have the key."""
    own, slash, shard = key.rpartition("/")
    return _SHARD_NUMBERS.get(shard) if slash else None, own


def _with_shard(letter: DeadLetter, shard: int) -> DeadLetter:
    return DeadLetter(
        **{name: getattr(letter, name) for name in DeadLetter.__struct_fields__ if name != "key"},
        key=f"{letter.key}/{shard}",
    )
