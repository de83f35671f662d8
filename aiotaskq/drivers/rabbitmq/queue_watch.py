"""The queues on the list, as the server has them: counted, and forgotten when nobody uses them.

Theory of operation
-------------------
Nothing is declared here. A queue that an operator has deleted stays deleted until somebody sends to
it or consumes from it.

`look` looks at `_AT_ONCE` queues of the list, in turn, so that its cost does not grow with the
list. It notes since when a queue is *unused*: missing, or without messages, dead letters and
consumers. One that is missing for `_MISSING_FOR` seconds, or unused for `_UNUSED_FOR`, is taken off
the list, unless a consumer names it. Its empty queues stay at the server: delayed messages, which
cannot be counted, may lead to them. For the same reason the priorities of a queue stay on the list
when the queue is taken off.

A sender looks at the mark of a queue once in `_REMEMBERED` seconds (`topology.py`), which are fewer
than `_UNUSED_FOR`. One that looked just before the mark was removed may still send to the queue. So
the process that has forgotten a queue goes on looking at it for as long again, and puts it on the
list if it is used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pamqp.commands import Queue

from aiotaskq.drivers.common.batches import slices
from aiotaskq.drivers.rabbitmq.channel import AmqpRefused
from aiotaskq.drivers.rabbitmq.connection import NOT_FOUND, RabbitConnection
from aiotaskq.drivers.rabbitmq.membership import RabbitMembership

_AT_ONCE = 20  # queues
_MISSING_FOR = 60.0  # seconds
_UNUSED_FOR = 3600.0  # seconds


class QueueCount(NamedTuple):
    """The messages of a queue, suspects included, its dead letters, and its waiting consumers."""

    ready: int
    dead: int
    waiting: int


_EMPTY = QueueCount(0, 0, 0)


class QueueWatch:
    """Looks at the queues of one server.

    Args:
        connection: The connection to ask on.
        membership: It has the list of queues.
    """

    def __init__(self, connection: RabbitConnection, membership: RabbitMembership) -> None:
        self._connection = connection
        self._names = connection.names
        self._membership = membership
        self._turn: list[str] = []  # queues to look at, the next one last
        self._unused_since: dict[str, float] = {}
        self._forgotten: dict[str, float] = {}  # with the time until which it is looked at

    async def count(self, queues: Sequence[str]) -> Mapping[str, QueueCount]:
        """Count the messages of those queues that exist.

        Raises:
            Unavailable: The server cannot be reached.
        """
        counts: dict[str, QueueCount] = {}
        for some in slices(queues, _AT_ONCE):
            found = await self._ask([name for queue in some for name in self._all_parts(queue)])
            if found is None:  # one of them is missing, and nothing is told of the others
                found = {}
                for queue in some:
                    for part in self._parts(queue):
                        found |= await self._ask(part) or {}
            for queue in some:
                count = self._sum(queue, found)
                if count is not None:
                    counts[queue] = count
        return counts

    def _parts(self, queue: str) -> Sequence[Sequence[str]]:
        """Return the names of what belongs to a queue, in parts that are declared together."""
        names = self._names
        levels = self._membership.levels(queue)
        first = names.dead(queue), names.suspects(queue), names.ready(queue)
        return first, *([names.ready(queue, one)] for one in levels)

    def _all_parts(self, queue: str) -> Sequence[str]:
        return [name for part in self._parts(queue) for name in part]

    async def _ask(self, names: Sequence[str]) -> Mapping[str, Any] | None:
        """Return the server's counts by the name of the queue; None if any of them is missing."""
        try:
            replies = await self._connection.call(
                *(Queue.Declare(queue=name, passive=True) for name in names)
            )
        except AmqpRefused as error:
            if error.code == NOT_FOUND:
                return None
            self._connection.raise_mapped(error)
        return dict(zip(names, replies, strict=True))

    def _sum(self, queue: str, found: Mapping[str, Any]) -> QueueCount | None:
        """Return the count of a queue, from those of its parts that exist; None: there is none."""
        dead = self._names.dead(queue)
        there = [one for one in self._all_parts(queue) if one in found]
        if not there:
            return None
        waiting = [found[one] for one in there if one != dead]
        return QueueCount(
            ready=sum(one.message_count for one in waiting),
            dead=found[dead].message_count if dead in found else 0,
            waiting=sum(one.consumer_count for one in waiting),
        )

    async def look(self) -> Mapping[str, QueueCount]:
        """Count the next queues in turn, and forget those that are unused for long.

        Raises:
            Unavailable: The server cannot be reached.
        """
        now = asyncio.get_running_loop().time()
        listed = await self._membership.queues()
        if not self._turn:
            self._forgotten = {
                queue: until for queue, until in self._forgotten.items() if until > now
            }
            self._turn = list({*listed, *self._forgotten})
        some = [self._turn.pop() for _ in range(min(_AT_ONCE, len(self._turn)))]
        some = [one for one in some if one in listed or one in self._forgotten]
        counts = await self.count(some)
        old: list[str] = []
        for queue in some:
            count = counts.get(queue)
            if count is not None and count != _EMPTY:
                self._unused_since.pop(queue, None)
                if queue not in listed:
                    await self._membership.add_queue(queue)
                    await self._membership.mark_queue(queue)
                continue
            since = self._unused_since.setdefault(queue, now)
            longest = _UNUSED_FOR if count is not None else _MISSING_FOR
            if now - since >= longest and queue in listed:
                old.append(queue)
        if old:
            await self._forget(old, now)
        return counts

    async def _forget(self, queues: Sequence[str], now: float) -> None:
        consumers = await self._membership.consumers()
        served = {queue for consumer in consumers for queue in consumer.queues}
        for queue in queues:
            del self._unused_since[queue]
            if queue not in served:
                # First: it is looked at even if this is broken off in the middle.
                self._forgotten[queue] = now + _UNUSED_FOR
                await self._membership.forget_queue(queue)
