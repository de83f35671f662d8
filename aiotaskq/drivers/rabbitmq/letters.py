"""Dead letters: a queue that is looked through as a whole, by one at a time.

AMQP has no way to look at a queue but to take what is in it. So whoever looks takes all there is,
acknowledges what is to go, and gives the rest back by closing the channel, in its old order.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from pamqp.commands import Basic, Queue

from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers.rabbitmq.channel import Channel, Content, Disconnected, Refused
from aiotaskq.drivers.rabbitmq.items import read_letter
from aiotaskq.drivers.rabbitmq.link import LOCKED, NOT_THERE, Link

_SETTLING = 0.02  # seconds until the channel may be closed: the queue acknowledges in portions
_LOCK_PAUSE = 0.02  # seconds between attempts to be the one who looks

MOST = 65_535
"""Dead letters that can be looked through at once: what AMQP has room for."""

# The server tells connections apart, and not the tasks that look over one.
_turns: WeakKeyDictionary[Link, defaultdict[str, asyncio.Lock]] = WeakKeyDictionary()


class Letter:
    """A dead letter that is held while its queue is looked through."""

    __slots__ = ("letter", "tag")

    def __init__(self, content: Content, queue: str) -> None:
        self.letter: DeadLetter = read_letter(content, queue)
        self.tag: int = content.method.delivery_tag


class Graveyard:
    """The dead letters of one queue, held until the channel is closed.

    Attributes:
        letters: As many as were asked for, the oldest first.
        total: How many there are.
    """

    def __init__(self, channel: Channel, letters: Sequence[Letter], total: int) -> None:
        self._channel = channel
        self.letters = letters
        self.total = total

    async def drop(self, letters: Collection[Letter]) -> None:
        """Drop some for good."""
        if letters:
            self._channel.ack([one.tag for one in letters], [one.tag for one in self.letters])
            await self._channel.call(Basic.Qos(prefetch_count=0))  # it has read that
            await asyncio.sleep(_SETTLING)


@asynccontextmanager
async def graveyard(link: Link, queue: str, *, most: int = MOST) -> AsyncIterator[Graveyard]:
    """Hold the dead letters of a queue.

    Args:
        link: What it is done through.
        queue: The queue that they died in.
        most: How many to hold; the oldest, as the server gives them in that order.

    Raises:
        Unavailable: The server cannot be reached, or somebody else looks for too long.
    """
    async with _turns.setdefault(link, defaultdict(asyncio.Lock))[queue]:
        channel: Channel | None = None
        try:
            wire = await link.wire()
            await _lock(link, queue)
            try:
                channel = await wire.channel()
                yield Graveyard(channel, *await _read(channel, link, queue, most))
            finally:
                if channel is not None:
                    await channel.close()
                await _unlock(link, queue)
        except (Disconnected, Refused) as error:
            link.explain(error)


async def _read(channel: Channel, link: Link, queue: str, most: int) -> tuple[list[Letter], int]:
    """Return so many letters, and how many there are."""
    name = link.names.dead(queue)
    letters: list[Letter] = []
    came = asyncio.Event()

    def receive(content: Content) -> None:
        letters.append(Letter(content, queue))
        came.set()

    try:
        [found] = await channel.call(Queue.Declare(queue=name, passive=True))
    except Refused as error:
        if error.code == NOT_THERE:
            return [], 0
        raise
    total = found.message_count
    count = min(total, most)
    if not count:
        return [], 0
    tag = uuid.uuid4().hex
    channel.listen(tag, receive)
    await channel.call(Basic.Qos(prefetch_count=count), Basic.Consume(queue=name, consumer_tag=tag))
    try:
        async with asyncio.timeout(link.address.timeout):
            while len(letters) < count:
                came.clear()
                await came.wait()
    except TimeoutError:
        raise Disconnected(f"the dead letters of {queue!r} did not come in time") from None
    await channel.call(Basic.Cancel(tag))
    letters.sort(key=lambda one: one.letter.key)
    return letters, total


async def _lock(link: Link, queue: str) -> None:
    """Be the one of all connections that looks."""
    lock = Queue.Declare(queue=link.names.lock(queue), exclusive=True, auto_delete=True)
    try:
        async with asyncio.timeout(link.address.timeout):
            while True:
                if await _try_to_lock(link, lock):
                    return
                await asyncio.sleep(_LOCK_PAUSE)
    except TimeoutError:
        raise Disconnected(f"others look at the dead letters of {queue!r} for too long") from None


async def _try_to_lock(link: Link, lock: Queue.Declare) -> bool:
    try:
        await link.call(lock)
    except Refused as error:
        if error.code != LOCKED:
            raise
        return False
    return True


async def _unlock(link: Link, queue: str) -> None:
    await link.call(Queue.Delete(queue=link.names.lock(queue)))
