"""The queues and exchanges that messages need, declared before their first use.

Theory of operation
-------------------
Messages of each priority of a task queue have a queue of their own, which is declared when the
first of them is sent: a lane. `ensure` declares the missing ones and remembers them for one
transport, for `_REMEMBERED` seconds. On a new transport, and after a message was returned because
its queue is gone, everything is declared again when it is next needed. Declaring is idempotent, and
another process completes the work of one that dies in the middle.

A quorum queue is known to the server before its process runs. In between, RabbitMQ answers the
declaration of a second process at once, and closes the connection of a consumer that believes it
(seen with 3.10: "noproc", INTERNAL_ERROR). So the queues of a lane are made under a lock at the
server, until a mark says that they are there; the lock is needed once in the life of a lane, and
again when a queue was deleted. It is not waited for longer than `_MAKING`: its holder may hang.

Invariant: a lane is on the list of queues (`membership/`) before it is declared here. So every
queue that is used is found by `RabbitMembership.queues`, though AMQP itself cannot list queues, and
consumers find the lanes of their queues. A queue that was not used for long may be forgotten
(`queue_watch.py`); the next use lists it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from pamqp.commands import Exchange, Queue

from aiotaskq.drivers.rabbitmq.channel import AmqpError, AmqpRefused
from aiotaskq.drivers.rabbitmq.connection import ACCESS_REFUSED, NOT_FOUND, RabbitConnection
from aiotaskq.drivers.rabbitmq.delays import DIGIT_HEADER, POSITIONS, Hop
from aiotaskq.drivers.rabbitmq.lock import server_lock
from aiotaskq.drivers.rabbitmq.membership import RabbitMembership
from aiotaskq.drivers.rabbitmq.names import Lane
from aiotaskq.errors import ConfigError

_REMEMBERED = 1800.0  # seconds; a queue is forgotten after a longer time without use
_MAKING = 5.0  # seconds


class RabbitTopology:
    """The declarations made over one connection.

    Args:
        connection: The connection to declare on; this object takes its callbacks.
        membership: It has the list of queues.
    """

    def __init__(self, connection: RabbitConnection, membership: RabbitMembership) -> None:
        self._connection = connection
        self._names = connection.names
        self._membership = membership
        self._declaring = asyncio.Lock()
        self._making = asyncio.Lock()  # not the same: others need not wait while a holder hangs
        self._declared: set[str] = set()  # names, on this transport
        self._made: set[Lane] = set()  # those that have the mark
        self._doubted: set[Lane] = set()  # those that had it, and may be deleted since
        self._remembered_until = 0.0
        connection.on_connected = self._declared.clear
        connection.on_returned = self.on_deleted

    async def ensure(
        self, lanes: Iterable[Lane] = (), paths: Iterable[Sequence[Hop]] = ()
    ) -> Mapping[Lane, ConfigError]:
        """Declare lanes, and the queues of delays before them, unless that was done.

        Returns:
            The lanes that cannot be used, with the reasons: they exist with other arguments, or
            the user has no right to declare them.

        Raises:
            ConfigError: A name is too long, or there is a queue of delays with other arguments.
            Unavailable: The server cannot be reached.
        """
        names = self._names
        now = asyncio.get_running_loop().time()
        if now >= self._remembered_until:
            self._forget()
            self._remembered_until = now + _REMEMBERED
        if not self._connection.is_connected:
            await self._connection.transport()  # which clears `_declared`
        missing = [one for one in lanes if names.ready(*one) not in self._declared]
        hops = {names.delay_queue(hop.position, hop.digit): hop for path in paths for hop in path}
        hops = {name: hop for name, hop in hops.items() if name not in self._declared}
        unusable: dict[Lane, ConfigError] = {}
        if not missing and not hops:
            return unusable
        # Those of priority 0 first: others need their queues of suspects and of dead letters.
        wanted = sorted({*missing, *((queue, 0) for queue, _ in missing)}, key=lambda one: one[1])
        new: list[Lane] = []
        async with self._declaring:
            for lane in wanted:
                if lane not in self._doubted and await self._is_made(lane):
                    await self._declare_lane(lane, self._declare_queues, unusable)
                else:
                    new.append(lane)
            for hop in hops.values():
                await self._declare_hop(hop)
        if new:
            async with self._making, self._making_lock():
                for lane in new:
                    await self._declare_lane(lane, self._make, unusable)
        return {
            one: error
            for one in missing
            if (error := unusable.get(one) or unusable.get((one[0], 0))) is not None
        }

    def _forget(self) -> None:
        self._declared.clear()
        self._made.clear()

    def on_deleted(self) -> None:
        """Take note that a queue was deleted, whichever: each is made again before its next use."""
        self._doubted |= self._made
        self._forget()

    async def _declare_lane(
        self,
        lane: Lane,
        declare: Callable[[Lane], Awaitable[None]],
        unusable: dict[Lane, ConfigError],
    ) -> None:
        """Declare a lane unless that was done, or note why it cannot be used."""
        name = self._names.ready(*lane)
        if name in self._declared:
            return
        try:
            await declare(lane)
        except ConfigError as error:
            # A user without the right to make it may still send to it.
            if not await self._is_usable(lane):
                unusable[lane] = error
                return
        self._declared.add(name)

    async def _is_made(self, lane: Lane) -> bool:
        """Return whether a lane has its mark and, unless that was seen before, its queues."""
        if lane in self._made:
            return True
        queue, priority = lane
        names = [self._names.ready(*lane)]
        if not priority:
            names.append(self._names.suspects(queue))
        try:
            await self._connection.call(
                Exchange.Declare(exchange=self._names.mark(*lane), passive=True),
                *(Queue.Declare(queue=name, passive=True) for name in names),
            )
        except AmqpRefused as error:
            if error.code != NOT_FOUND:
                self._connection.raise_mapped(error)
            return False
        self._made.add(lane)
        return True

    @asynccontextmanager
    async def _making_lock(self) -> AsyncIterator[None]:
        """Hold the lock under which lanes are made, or go on without it after a while."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(_MAKING):
                    lock = server_lock(self._connection, self._names.making_lock)
                    await stack.enter_async_context(lock)
            except (TimeoutError, AmqpRefused):
                pass  # the holder hangs, or this user has no right to have it
            except AmqpError as error:
                self._connection.raise_mapped(error)
            yield

    async def _make(self, lane: Lane) -> None:
        """Declare the queues of a lane, list it, and mark it."""
        if not await self._is_made(lane):
            # Also for those that consume from it: the server does not tell all of them that the
            # queue was deleted.
            await self._membership.add_queue(*lane)
        await self._declare_queues(lane)
        await self._membership.mark_queue(*lane)
        self._made.add(lane)
        self._doubted.discard(lane)

    async def _declare_queues(self, lane: Lane) -> None:
        names = self._names
        queue, priority = lane
        if priority:
            await self._connection.declare(names.declare_ready(queue, priority))
            return
        await self._connection.declare(
            names.declare_dead(queue),
            Exchange.Declare(exchange=names.dead_exchange, exchange_type="direct", durable=True),
            Queue.Bind(
                queue=names.dead(queue),
                exchange=names.dead_exchange,
                routing_key=names.dead(queue),
            ),
            names.declare_suspects(queue),
            names.declare_ready(queue),
        )

    async def _is_usable(self, lane: Lane) -> bool:
        """Return whether a lane exists that this user has no right to declare."""
        ready = self._names.declare_ready(*lane)
        try:
            await self._connection.call(ready)
        except AmqpRefused as error:
            if error.code == ACCESS_REFUSED:
                return await self._exists(ready.queue)
        return False

    async def _exists(self, name: str) -> bool:
        try:
            await self._connection.call(Queue.Declare(queue=name, passive=True))
        except AmqpRefused:
            return False
        return True

    async def _declare_hop(self, hop: Hop) -> None:
        names = self._names
        if names.delay_exchange(0) not in self._declared:
            await self._declare_delay_exchanges()
        queue = names.delay_queue(hop.position, hop.digit)
        await self._connection.declare(
            names.declare_delay(hop.position, hop.digit, hop.milliseconds),
            Queue.Bind(
                queue=queue,
                exchange=names.delay_exchange(hop.position),
                arguments={"x-match": "all", f"{DIGIT_HEADER}{hop.position}": hop.digit},
            ),
        )
        self._declared.add(queue)

    async def _declare_delay_exchanges(self) -> None:
        """Declare an exchange for each position; it leads on to the next where the digit is 0."""
        names = self._names
        await self._connection.declare(
            *(
                Exchange.Declare(
                    exchange=names.delay_exchange(one), exchange_type="headers", durable=True
                )
                for one in range(POSITIONS)
            ),
            *(
                Exchange.Bind(
                    destination=names.delay_exchange(one - 1),
                    source=names.delay_exchange(one),
                    arguments={"x-match": "all", f"{DIGIT_HEADER}{one}": 0},
                )
                for one in range(1, POSITIONS)
            ),
        )
        self._declared.add(names.delay_exchange(0))
