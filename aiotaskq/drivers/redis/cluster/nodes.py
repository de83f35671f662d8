"""The nodes of a cluster: who has which slot, and connections to them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    ClusterDownError,
    MovedError,
    RedisError,
)
from redis.exceptions import ConnectionError as Disconnected

from aiotaskq.drivers.redis.client import Client
from aiotaskq.drivers.redis.cluster.placement import TAGS, slot_of
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.link import Link, Word
from aiotaskq.drivers.redis.scripts import Script
from aiotaskq.drivers.redis.server import Address, ask
from aiotaskq.drivers.redis.wire import Wire
from aiotaskq.errors import BrokerFull, BrokerUnavailable, Unavailable

Node: TypeAlias = tuple[str, int]
Value = TypeVar("Value")

_FOLLOWED = 3  # times that one command is sent elsewhere, as slots move
_BREATH = 0.05  # seconds until a node is asked again where a slot has gone


class Topology:
    """Which node has which slot, as the cluster tells it. It belongs to one event loop.

    Args:
        seeds: Nodes that are known beforehand.
    """

    def __init__(self, seeds: Sequence[Address]) -> None:
        self._seeds = seeds
        self._ranges: list[tuple[int, int, Node]] = []
        self._owners: dict[int, Node] = {}
        self._stale = True
        self._asking = asyncio.Lock()

    async def owner(self, slot: int) -> Node:
        """Return the master of a slot.

        Raises:
            RedisError: No node answers, or it has none now.
            OSError: No node answers.
        """
        if self._stale:
            await self._refresh()
        node = self._owners.get(slot)
        if node is None:
            found = [node for first, last, node in self._ranges if first <= slot <= last]
            if not found:
                self._stale = True
                raise Disconnected(f"slot {slot} of the cluster has no master now")
            node = self._owners[slot] = found[0]
        return node

    def doubt(self) -> None:
        """Ask the cluster again before the next command."""
        self._stale = True

    def address(self, node: Node) -> Address:
        """Return how a node is talked to."""
        return self._seeds[0].at(*node)

    async def connect(self) -> AbstractConnection:
        """Return a connection to any master."""
        await self.owner(slot_of(TAGS[0]))
        try:
            return await self.address(random.choice(self._ranges)[2]).connect()
        except (RedisError, OSError):
            self.doubt()
            raise

    async def _refresh(self) -> None:
        async with self._asking:
            if not self._stale:
                return
            known = [self.address(node) for node in {node for _, _, node in self._ranges}]
            seeds = random.sample(self._seeds, len(self._seeds))
            trouble: Exception | None = None
            for address in (*random.sample(known, len(known)), *seeds):
                try:
                    self._ranges = await _ask_slots(address)
                except (RedisError, OSError) as error:
                    trouble = error
                    continue
                self._owners.clear()
                self._stale = False
                return
            assert trouble is not None  # there is one seed at least
            raise trouble


async def _ask_slots(address: Address) -> list[tuple[int, int, Node]]:
    connection = await address.connect()
    try:
        reply = await ask(connection, "CLUSTER", "SLOTS", within=address.timeout)
    finally:
        await connection.disconnect(nowait=True)
    # A node that does not know its own name leaves it out.
    return [
        (first, last, ((master[0] or b"").decode() or address.options["host"], master[1]))
        for first, last, master, *_ in reply
    ]


class Nodes:
    """A connection to each node, for all slots that it has.

    Args:
        topology: Of the cluster.
        unavailable: What a node that cannot be reached raises.
    """

    def __init__(self, topology: Topology, unavailable: type[Unavailable]) -> None:
        self.topology = topology
        self._unavailable = unavailable
        self._links: dict[Node, Link] = {}
        self._closings = 0

    async def wire(self, slot: int) -> Wire:
        """Return a live connection to the master of a slot.

        Raises:
            RedisError: There is none.
            OSError: There is none.
        """
        closings = self._closings
        node = await self.topology.owner(slot)
        if closings != self._closings:  # meanwhile: a new connection would stay for good
            raise Disconnected("the driver is closed")
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = Link(self.topology.address(node), self._unavailable)
        try:
            return await link.wire()
        except (RedisError, OSError):
            self.topology.doubt()
            raise

    async def close(self) -> None:
        """Disconnect."""
        self._closings += 1
        links = list(self._links.values())
        self._links.clear()
        for link in links:
            await link.close()


class SlotLink(Link):
    """What is said to the master of one slot, whichever node that is.

    Args:
        nodes: Connections, which it shares with the links to other slots.
        slot: Its number.
        address: How nodes are talked to.
        unavailable: As of `Link`.
        full: As of `Link`.
        owns: Whether the connections are its own, and closed with it.
    """

    mode = "cluster"

    def __init__(
        self,
        nodes: Nodes,
        slot: int,
        address: Address,
        unavailable: type[Unavailable],
        *,
        full: type[Unavailable] | None = None,
        owns: bool = False,
    ) -> None:
        super().__init__(address, unavailable, full=full)
        self._nodes = nodes
        self._slot = slot
        self._owns = owns

    async def command(self, *words: Word, patience: float | None = None) -> Any:
        run = super().command
        return await self._follow(lambda: run(*words, patience=patience))

    async def script(self, script: Script, keys: Sequence[Word], args: Sequence[Word]) -> Any:
        run = super().script
        return await self._follow(lambda: run(script, keys, args))

    async def wire(self) -> Wire:
        if self._closed:
            raise Disconnected("the driver is closed")
        wire = await self._nodes.wire(self._slot)
        if wire is not self._wire:
            self._wire = wire
            self.connects += 1
        return wire

    async def close(self) -> None:
        await super().close()
        if self._owns:
            await self._nodes.close()

    async def _follow(self, run: Callable[[], Awaitable[Value]]) -> Value:
        """Run a command, again if the slot has moved: what was refused so has done nothing."""
        for _ in range(_FOLLOWED):
            try:
                return await run()
            except Unavailable as error:
                self.failed_at = asyncio.get_running_loop().time()
                if not isinstance(error.__cause__, MovedError):
                    raise
            await asyncio.sleep(_BREATH)
        return await run()

    def _note(self, wire: Wire, error: Exception) -> None:
        super()._note(wire, error)
        # An ASK is not followed: part of the slot's keys are here and part are there, and the
        # scripts touch more of them than they name. The shard is away until all have moved.
        if wire.error is not None or isinstance(error, (MovedError, ClusterDownError)):
            self._nodes.topology.doubt()


class SlotClient(Client):
    """A client of the store in one slot.

    Args:
        nodes: Connections for ordinary commands.
        address: How nodes are talked to.
        prefix: What all keys begin with.
        shard: Its number.
    """

    def __init__(self, nodes: Nodes, address: Address, prefix: str, shard: int) -> None:
        super().__init__(address, Keys(prefix, TAGS[shard]))
        self._nodes = nodes
        self._slot = slot_of(TAGS[shard])

    def shared_link(self) -> Link:
        return self._to(self._nodes, owns=False)

    def new_link(self) -> Link:
        return self._to(Nodes(self._nodes.topology, BrokerUnavailable), owns=True)

    def _to(self, nodes: Nodes, *, owns: bool) -> Link:
        return SlotLink(
            nodes, self._slot, self.address, BrokerUnavailable, full=BrokerFull, owns=owns
        )
