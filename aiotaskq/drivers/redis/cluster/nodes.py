"""Nodes of a cluster: the map of its slots, and connections to the masters of slots.

Theory of operation
-------------------

`ClusterTopology` knows which node is the master of each slot. It is trusted or in doubt. In
doubt, the next command first asks a node, any that answers, for the slots of all. Anything that a
failover or a resharding may cause puts it in doubt: a connection that fails, MOVED, CLUSTERDOWN,
a slot without a master. So a wrong map lives no longer than one failed command.

`ClusterNodes` has one connection for each node, which all slots of that node share.
`SlotConnection` is a `RedisConnection` to the master of one slot: before each command it asks for
the transport of the node that has the slot now. If that is another transport than before, it
counts as a new connection (`connects`), as the node may have taken over without the last writes.

Between any two steps a slot may move or its master may die:

* MOVED refuses a command before it is run. So the command is repeated, a few times, at the new
  master.
* ASK is not followed. Some keys of the slot are at one node then and some at another, and the
  scripts touch more keys than they name. The shard is unavailable until all keys have moved.
* After any other failure a command may have been run. It is not repeated here.

`close` may be called while another task waits for the map. `_closings` is compared afterwards, so
that no connection is made that nobody would close.
"""

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

from aiotaskq.drivers.redis.client import RedisClient
from aiotaskq.drivers.redis.cluster.placement import TAGS, slot_of
from aiotaskq.drivers.redis.connection import RedisConnection, Word
from aiotaskq.drivers.redis.keys import RedisKeys
from aiotaskq.drivers.redis.scripts import RedisScript
from aiotaskq.drivers.redis.server import RedisServer, ask
from aiotaskq.drivers.redis.transport import RedisTransport
from aiotaskq.errors import BrokerFull, BrokerUnavailable, Unavailable

Node: TypeAlias = tuple[str, int]
"""Host and port."""

Value = TypeVar("Value")

_REPEATED = 3  # times that one command is sent to another node, as slots move
_PAUSE = 0.05  # seconds before that, for the nodes to agree


class ClusterTopology:
    """The master of each slot, as the cluster says; it belongs to one event loop.

    Args:
        seeds: The nodes that the URL names.
    """

    def __init__(self, seeds: Sequence[RedisServer]) -> None:
        self._seeds = seeds
        self._ranges: list[tuple[int, int, Node]] = []
        self._masters: dict[int, Node] = {}
        self._in_doubt = True
        self._asking = asyncio.Lock()

    async def master_of(self, slot: int) -> Node:
        """Return the master of a slot.

        Raises:
            RedisError: No node answers, or the slot has no master now.
            OSError: No node answers.
        """
        if self._in_doubt:
            await self._refresh()
        node = self._masters.get(slot)
        if node is None:
            found = [node for first, last, node in self._ranges if first <= slot <= last]
            if not found:
                self._in_doubt = True
                raise Disconnected(f"slot {slot} of the cluster has no master now")
            node = self._masters[slot] = found[0]
        return node

    def doubt(self) -> None:
        """Ask the cluster again before the next command."""
        self._in_doubt = True

    def server(self, node: Node) -> RedisServer:
        """Return the address of a node."""
        return self._seeds[0].at(*node)

    async def connect(self) -> AbstractConnection:
        """Return a connection to any master."""
        await self.master_of(slot_of(TAGS[0]))
        try:
            return await self.server(random.choice(self._ranges)[2]).connect()
        except (RedisError, OSError):
            self.doubt()
            raise

    async def _refresh(self) -> None:
        async with self._asking:
            if not self._in_doubt:  # another task has asked meanwhile
                return
            known = [self.server(node) for node in {node for _, _, node in self._ranges}]
            seeds = random.sample(self._seeds, len(self._seeds))
            failure: Exception | None = None
            for server in (*random.sample(known, len(known)), *seeds):
                try:
                    self._ranges = await _ask_slots(server)
                except (RedisError, OSError) as error:
                    failure = error
                    continue
                self._masters.clear()
                self._in_doubt = False
                return
            assert failure is not None  # there is one seed at least
            raise failure


async def _ask_slots(server: RedisServer) -> list[tuple[int, int, Node]]:
    connection = await server.connect()
    try:
        reply = await ask(connection, "CLUSTER", "SLOTS", within=server.timeout)
    finally:
        await connection.disconnect(nowait=True)
    # A node that does not know its own host leaves it out.
    return [
        (first, last, ((master[0] or b"").decode() or server.options["host"], master[1]))
        for first, last, master, *_ in reply
    ]


class ClusterNodes:
    """A connection to each node, for all slots that it has.

    Args:
        topology: The topology of the cluster.
        unavailable: The error to raise when a node cannot be reached.
    """

    def __init__(self, topology: ClusterTopology, unavailable: type[Unavailable]) -> None:
        self.topology = topology
        self._unavailable = unavailable
        self._connections: dict[Node, RedisConnection] = {}
        self._closings = 0

    async def transport(self, slot: int) -> RedisTransport:
        """Return a live transport to the master of a slot.

        Raises:
            RedisError: The master cannot be reached.
            OSError: The master cannot be reached.
        """
        closings = self._closings
        node = await self.topology.master_of(slot)
        if closings != self._closings:  # closed meanwhile: nobody would close a new connection
            raise Disconnected("the driver is closed")
        connection = self._connections.get(node)
        if connection is None:
            connection = RedisConnection(self.topology.server(node), self._unavailable)
            self._connections[node] = connection
        try:
            return await connection.transport()
        except (RedisError, OSError):
            self.topology.doubt()
            raise

    async def close(self) -> None:
        """Disconnect."""
        self._closings += 1
        connections = list(self._connections.values())
        self._connections.clear()
        for connection in connections:
            await connection.close()


class SlotConnection(RedisConnection):
    """A connection to the master of one slot, whichever node that is.

    Args:
        nodes: Connections to nodes, which it shares with other slots.
        slot: The number of the slot.
        server: The options of connections to nodes.
        unavailable: As of `RedisConnection`.
        full: As of `RedisConnection`.
        owns: Whether `nodes` is used by nothing else, and closed with it.
    """

    mode = "cluster"

    def __init__(
        self,
        nodes: ClusterNodes,
        slot: int,
        server: RedisServer,
        unavailable: type[Unavailable],
        *,
        full: type[Unavailable] | None = None,
        owns: bool = False,
    ) -> None:
        super().__init__(server, unavailable, full=full)
        self._nodes = nodes
        self._slot = slot
        self._owns = owns

    async def command(self, *words: Word, timeout: float | None = None) -> Any:
        run = super().command
        return await self._follow(lambda: run(*words, timeout=timeout))

    async def script(self, script: RedisScript, keys: Sequence[Word], args: Sequence[Word]) -> Any:
        run = super().script
        return await self._follow(lambda: run(script, keys, args))

    async def transport(self) -> RedisTransport:
        if self._closed:
            raise Disconnected("the driver is closed")
        transport = await self._nodes.transport(self._slot)
        if transport is not self._transport:
            self._transport = transport
            self.connects += 1
        return transport

    async def close(self) -> None:
        await super().close()
        if self._owns:
            await self._nodes.close()

    async def _follow(self, run: Callable[[], Awaitable[Value]]) -> Value:
        """Run a command, and again if the slot has moved: a refused command was not run."""
        for _ in range(_REPEATED):
            try:
                return await run()
            except Unavailable as error:
                self.failed_at = asyncio.get_running_loop().time()
                if not isinstance(error.__cause__, MovedError):
                    raise
            await asyncio.sleep(_PAUSE)
        return await run()

    def _note_error(self, transport: RedisTransport, error: Exception) -> None:
        super()._note_error(transport, error)
        if transport.error is not None or isinstance(error, (MovedError, ClusterDownError)):
            self._nodes.topology.doubt()


class SlotClient(RedisClient):
    """A client of the shard in one slot.

    Args:
        nodes: Connections for commands that do not block.
        server: The options of connections to nodes.
        prefix: The beginning of all keys.
        shard: The number of the shard.
    """

    def __init__(self, nodes: ClusterNodes, server: RedisServer, prefix: str, shard: int) -> None:
        super().__init__(server, RedisKeys(prefix, TAGS[shard]))
        self._nodes = nodes
        self._slot = slot_of(TAGS[shard])

    def shared_connection(self) -> RedisConnection:
        return self._connection_over(self._nodes, owns=False)

    def new_connection(self) -> RedisConnection:
        own = ClusterNodes(self._nodes.topology, BrokerUnavailable)
        return self._connection_over(own, owns=True)

    def _connection_over(self, nodes: ClusterNodes, *, owns: bool) -> RedisConnection:
        return SlotConnection(
            nodes, self._slot, self.server, BrokerUnavailable, full=BrokerFull, owns=owns
        )
