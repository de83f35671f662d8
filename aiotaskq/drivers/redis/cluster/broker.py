"""The Redis broker over a cluster: its calls, over the shards that they are about."""

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
from aiotaskq.drivers.redis.address import parse_cluster
from aiotaskq.drivers.redis.broker import RedisBroker
from aiotaskq.drivers.redis.cluster.consumer import ClusterConsumer
from aiotaskq.drivers.redis.cluster.lease import ClusterLease
from aiotaskq.drivers.redis.cluster.nodes import Nodes, SlotClient, Topology
from aiotaskq.drivers.redis.cluster.placement import SHARDS, Placement, number_of
from aiotaskq.drivers.redis.cluster.relay import Relay
from aiotaskq.drivers.redis.cluster.results import ClusterBackend
from aiotaskq.drivers.redis.cluster.schedules import ClusterSchedules
from aiotaskq.drivers.redis.cluster.together import together
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import BrokerUnavailable

_STRETCH = 100  # envelopes of one queue in a batch that go to the same shard
_TICK = 1e-6  # seconds: the times of dead letters are told as exactly
_ASKED = 1000  # ids that are looked up at once


class ClusterBroker:
    """Messages in the shards of a Redis cluster.

    Args:
        url: ``redis+cluster://[[user]:password@]host[:port],...[?shards=number]``, or
            ``rediss+cluster://`` for TLS. With several shards a queue's messages are spread over
            as many slots, and the oldest first holds in each of them.
        prefix: What all keys begin with.

    Raises:
        ConfigError: The URL is none of these.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._prefix = prefix
        self._address = parse_cluster(url)
        self._placement = Placement(self._address.shards)
        self._nodes = Nodes(Topology(self._address.nodes), BrokerUnavailable)
        self._clients = [
            SlotClient(self._nodes, self._address.nodes[0], prefix, shard)
            for shard in range(SHARDS)
        ]
        self._stores = [RedisBroker(url, prefix=prefix, client=one) for one in self._clients]
        self._relay = Relay(self._clients, self._stores, self._placement)
        self._turns = itertools.count()

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def _time_shift(self) -> float:
        """Seconds added to the servers' clocks. For test harnesses."""
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
            await together(store.open() for store in self._stores)
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
        turn = next(self._turns) if call_id is None else number_of(call_id)
        if any(envelope.unique for envelope in batch):
            return await self._publish_in_order(batch, call_id, turn)
        shares = self._spread(batch, turn)
        await together(
            self._stores[shard].publish(share, call_id=call_id) for shard, share in shares.items()
        )
        return []

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> ClusterConsumer:
        identity = f"{name}:{uuid.uuid4().hex}"
        parts: dict[str, list[RedisConsumer]] = {
            queue: [
                self._stores[shard].member(
                    identity,
                    [queue],
                    queues,
                    lease=lease,
                    about=about,
                    # Once is enough: the nodes are set up alike.
                    warns=(place, queue) == (0, queues[0]),
                )
                for place, shard in enumerate(self._placement.of(queue))
            ]
            for queue in queues
        }
        return ClusterConsumer(Grant(identity, tuple(queues), lease), parts, self._forward)

    def schedules(self) -> ClusterSchedules:
        shard = self._placement.home("schedules")

        async def forward(queues: Collection[str]) -> None:
            await self._move(shard, queues)

        return ClusterSchedules(self._stores[shard].schedules(), forward)

    def lease(self, grant: Grant) -> ClusterLease:
        return ClusterLease(self._address, self._prefix, self._placement, grant, self._time_shift)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        told = await together(store.consumers() for store in self._stores)
        return list({one.id: one for part in told for one in part}.values())

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        # What was cancelled before stays so, though it is held still. Every shard knows of it.
        before = set() if running or not ids else await self._cancelled_among(list(ids))
        # An id may be in any shard, or come to any.
        told = await together(store.cancel(ids, running=running) for store in self._stores)
        held = {name for part in told for name in part} - before
        if held:  # noted where they are not
            await together(store.uncancel(held) for store in self._stores)
        return held

    async def _cancelled_among(self, ids: Sequence[str]) -> set[str]:
        parts = [ids[start : start + _ASKED] for start in range(0, len(ids), _ASKED)]
        told = await together(self._stores[0].cancelled_among(part) for part in parts)
        return {name for part in told for name in part}

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        rounds = await together(self._maintain(shard, limits) for shard in range(SHARDS))
        return Maintained(
            promoted=sum(one.promoted for one in rounds),
            reclaimed=sum(one.reclaimed for one in rounds),
            trimmed=sum(one.trimmed for one in rounds),
        )

    async def depth(self) -> Mapping[str, Depth]:
        depths: dict[str, Depth] = {}
        for part in await together(store.depth() for store in self._stores):
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
        return sum(await together(store.purge(queue) for store in self._stores))

    # --- dead letters ---------------------------------------------------------------------------

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        told = await together(
            store.dead(queue, limit, before=_before(before, shard))
            for shard, store in enumerate(self._stores)
        )
        letters = [
            (float(letter.key), shard, letter) for shard, part in enumerate(told) for letter in part
        ]
        letters.sort(key=lambda one: one[:2], reverse=True)
        return [_renamed(letter, shard) for _, shard, letter in letters[:limit]]

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        shares: dict[int, list[tuple[str, Envelope]]] = {}
        for key, envelope in letters:
            shares.setdefault(self._shard_of(key, queue), []).append((key, envelope))
        missing: list[str] = []
        for shard, share in shares.items():
            missing += await self._revive(shard, queue, share)
        return missing

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        shares: dict[int, list[str]] = {}
        for key in keys:
            shares.setdefault(self._shard_of(key, queue), []).append(_place_of(key)[1])
        return sum(
            await together(
                self._stores[shard].discard(queue, share) for shard, share in shares.items()
            )
        )

    async def _revive(
        self, shard: int, queue: str, share: Sequence[tuple[str, Envelope]]
    ) -> list[str]:
        envelopes = [envelope for _, envelope in share]
        ids = {envelope.id for envelope in envelopes}
        given = {_place_of(key)[1]: key for key, _ in share}
        await together(store.uncancel(ids) for store in self._stores)
        missing = await self._stores[shard].revive(
            queue, [(_place_of(key)[1], envelope) for key, envelope in share]
        )
        await together(
            self._stores[self._placement.home(one.id)].note_unique(one.id)
            for one in envelopes
            if one.unique
        )
        await self._move(shard, {envelope.queue for envelope in envelopes})
        return [given[key] for key in missing]

    def _shard_of(self, key: str, queue: str) -> int:
        """Return the shard of a dead letter; of one that cannot be, any that will say so."""
        shard, _ = _place_of(key)
        return self._placement.of(queue)[0] if shard is None else shard

    # --- shards ---------------------------------------------------------------------------------

    def _spread(self, batch: Sequence[Envelope], turn: int) -> dict[int, list[Envelope]]:
        """Split a batch by shard; it is the same for the same turn."""
        by_queue: dict[str, list[Envelope]] = {}
        for envelope in batch:
            by_queue.setdefault(envelope.queue, []).append(envelope)
        shares: dict[int, list[Envelope]] = {}
        for queue, share in by_queue.items():
            shards = self._placement.of(queue)
            if len(shards) == 1:
                shares.setdefault(shards[0], []).extend(share)
                continue
            for number, start in enumerate(range(0, len(share), _STRETCH), turn):
                shard = shards[number % len(shards)]
                shares.setdefault(shard, []).extend(share[start : start + _STRETCH])
        return shares

    async def _publish_in_order(
        self, batch: Sequence[Envelope], call_id: str | None, turn: int
    ) -> list[str]:
        """Store unique envelopes in the shard that knows the id, from where they go on."""

        def first(envelope: Envelope) -> int:
            if envelope.unique:
                return self._placement.home(envelope.id)
            shards = self._placement.of(envelope.queue)
            return shards[turn % len(shards)]

        refused: list[str] = []
        for number, (shard, group) in enumerate(itertools.groupby(batch, key=first)):
            share = list(group)
            call = None if call_id is None else f"{call_id}:{number}"
            refused += await self._stores[shard].publish(share, call_id=call)
            await self._move(shard, {envelope.queue for envelope in share})
        return refused

    async def _forward(self, batch: Sequence[Settlement]) -> None:
        """Send on what was put into other queues than it came from."""
        for settlement in batch:
            if isinstance(settlement, Again):
                queue, came_from = settlement.envelope.queue, settlement.delivery.queue
                if queue != came_from:
                    for shard in self._placement.of(came_from):
                        await self._move(shard, [queue])

    async def _maintain(self, shard: int, limits: DeadLimits) -> Maintained:
        tended = await self._stores[shard].maintain(limits)
        await self._relay.move(shard, await self._stores[shard].queues())
        return tended

    async def _move(self, shard: int, queues: Collection[str]) -> None:
        """Send on what was stored; if that fails now, the next `maintain` of anybody does it."""
        with suppress(BrokerUnavailable):
            await self._relay.move(shard, queues)


def _place_of(key: str) -> tuple[int | None, str]:
    """Return the shard of a dead letter and what it is called there."""
    own, slash, shard = key.rpartition("/")
    return (int(shard), own) if slash and shard.isdecimal() and int(shard) < SHARDS else (None, key)


def _renamed(letter: DeadLetter, shard: int) -> DeadLetter:
    return DeadLetter(
        **{name: getattr(letter, name) for name in DeadLetter.__struct_fields__ if name != "key"},
        key=f"{letter.key}/{shard}",
    )


def _before(key: str | None, shard: int) -> str | None:
    """Return the key before which the letters of one shard come before a letter of any."""
    if key is None:
        return None
    its_shard, own = _place_of(key)
    if its_shard is None or shard >= its_shard:
        return own
    try:
        return f"{float(own) + _TICK:.6f}"
    except ValueError:
        return own  # refused by the store, with a word of why
