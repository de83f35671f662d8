"""Dead letters: a queue that is read as a whole, by one reader at a time.

AMQP cannot read a queue without taking its messages. So a reader takes all of them (or the oldest
ones), acknowledges those to be dropped, and closes the channel: the server puts the rest back in
the old order.

Theory of operation
-------------------
A reader first waits for its turn in this process (`_turns`), then for the lock at the server: a
queue that belongs to the connection alone. Two readers at once would each see a part of the queue.
While a reader has the lock, workers may add letters; those are for the next reader.

Between any two steps the reader may die, be cancelled, or lose its connection. The server then puts
everything back that was not acknowledged, and deletes the lock with the connection. So a letter is
either still there or was dropped as a whole, and no lock outlives its holder.

`drop` waits for an answer after its acknowledgements, and a moment longer, because the queue
applies acknowledgements in portions and forgets those that it has not applied when the channel is
closed. Invariant: when `drop` returns, the letters are gone for good.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakKeyDictionary

from pamqp.commands import Basic, Queue

from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpError,
    AmqpMessage,
    AmqpRefused,
    RabbitChannel,
    time_limit,
)
from aiotaskq.drivers.rabbitmq.connection import NOT_FOUND, RabbitConnection
from aiotaskq.drivers.rabbitmq.lock import server_lock
from aiotaskq.drivers.rabbitmq.messages import read_dead_letter

_SETTLING = 0.02  # seconds in which the queue applies acknowledgements

_TAG = "letters"  # one consuming for each channel, so any name will do
_MOST = 65_535  # letters that can be read at once: the largest prefetch count of AMQP

# The lock excludes other connections, not other tasks on the same one.
_turns: WeakKeyDictionary[RabbitConnection, defaultdict[str, asyncio.Lock]] = WeakKeyDictionary()


class HeldDeadLetter:
    """A dead letter that is held while its queue is read."""

    __slots__ = ("letter", "tag")

    def __init__(self, message: AmqpMessage, queue: str) -> None:
        self.letter: DeadLetter = read_dead_letter(message, queue)
        self.tag: int = message.method.delivery_tag


class HeldDeadLetters:
    """The dead letters of one queue, held until the channel is closed.

    Attributes:
        letters: As many as were asked for, the oldest first.
        total: The number of letters in the queue.
    """

    def __init__(
        self, channel: RabbitChannel, letters: Sequence[HeldDeadLetter], total: int
    ) -> None:
        self._channel = channel
        self.letters = letters
        self.total = total

    async def drop(self, letters: Collection[HeldDeadLetter]) -> None:
        """Drop letters for good.

        Raises:
            AmqpError: The channel failed; they may be dropped or not.
        """
        if letters:
            self._channel.ack([one.tag for one in letters], [one.tag for one in self.letters])
            await self._channel.call(Basic.Qos(prefetch_count=0))
            await asyncio.sleep(_SETTLING)


@asynccontextmanager
async def hold_dead_letters(
    connection: RabbitConnection, queue: str, *, most: int = _MOST
) -> AsyncIterator[HeldDeadLetters]:
    """Hold the dead letters of a queue.

    Args:
        connection: The connection to read on.
        queue: The queue whose messages they were.
        most: The most to hold: the oldest ones, as the server gives them in that order.

    Raises:
        Unavailable: The server cannot be reached, or another reader takes too long.
    """
    async with _turns.setdefault(connection, defaultdict(asyncio.Lock))[queue]:
        try:
            transport = await connection.transport()
            async with AsyncExitStack() as stack:
                late = f"others look at the dead letters of {queue!r} for too long"
                async with time_limit(connection.address.timeout, late):
                    lock = server_lock(connection, connection.names.lock(queue))
                    await stack.enter_async_context(lock)
                channel = await transport.open_channel()
                stack.push_async_callback(channel.close)
                yield HeldDeadLetters(channel, *await _read(channel, connection, queue, most))
        except AmqpError as error:
            connection.raise_mapped(error)


async def _read(
    channel: RabbitChannel, connection: RabbitConnection, queue: str, most: int
) -> tuple[list[HeldDeadLetter], int]:
    """Return up to `most` letters, and the number of all."""
    name = connection.names.dead(queue)
    letters: list[HeldDeadLetter] = []
    arrived = asyncio.Event()

    def receive(message: AmqpMessage) -> None:
        letters.append(HeldDeadLetter(message, queue))
        arrived.set()

    try:
        [found] = await channel.call(Queue.Declare(queue=name, passive=True))
    except AmqpRefused as error:
        if error.code == NOT_FOUND:
            return [], 0
        raise
    total = found.message_count
    count = min(total, most)
    if not count:
        return [], 0
    channel.listen(_TAG, receive)
    await channel.call(
        Basic.Qos(prefetch_count=count), Basic.Consume(queue=name, consumer_tag=_TAG)
    )
    late = f"the dead letters of {queue!r} did not come in time"
    async with time_limit(connection.address.timeout, late):
        while len(letters) < count:
            arrived.clear()
            await arrived.wait()
    await channel.call(Basic.Cancel(_TAG))
    letters.sort(key=lambda one: one.letter.key)
    return letters, total
