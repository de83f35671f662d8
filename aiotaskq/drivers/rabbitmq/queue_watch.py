"""The queues on the list, as the server has them: counted, and forgotten when nobody uses them.

Theory of operation
-------------------
Nothing is declared here. A queue that an operator has deleted stays deleted until somebody sends to
it or consumes from it.

`look` looks at `_AT_ONCE` queues of the list, in turn, so that its cost does not grow with the
list. It notes since when a queue is *unused*: missing, or without messages, dead letters and
consumers. One that is missing for `_MISSING_FOR` seconds, or unused for `_UNUSED_FOR`, is taken off
the list, unless a consumer names it. Its empty queues stay at the server: delayed messages, which
cannot be counted, may lead to them.

A sender looks at the mark of a queue once in `_REMEMBERED` seconds (`topology.py`), which are fewer
than `_UNUSED_FOR`. One that looked just before the mark was removed may still send to the queue. So
the process that has forgotten a queue goes on looking at it for as long again, and puts it on the
list if it is used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
            found = await self._count(some)
            if found is None:  # one of them is missing, and nothing is told of the others
                for queue in some:
                    counts |= await self._count([queue]) or {}
            else:
                counts |= found
        return counts

    async def _count(self, queues: Sequence[str]) -> Mapping[str, QueueCount] | None:
        names = self._names
        asked = [name(one) for one in queues for name in (names.ready, names.suspects, names.dead)]
        try:
            replies = await self._connection.call(
                *(Queue.Declare(queue=name, passive=True) for name in asked)
            )
        except AmqpRefused as error:
            if error.code == NOT_FOUND:
                return None
            self._connection.raise_mapped(error)
        return {
            queue: QueueCount(
                ready=ready.message_count + suspects.message_count,
                dead=dead.message_count,
                waiting=ready.consumer_count + suspects.consumer_count,
            )
            for queue, ready, suspects, dead in zip(
                queues, replies[::3], replies[1::3], replies[2::3], strict=True
            )
        }

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
                await self._membership.forget_queue(queue)
                self._forgotten[queue] = now + _UNUSED_FOR
