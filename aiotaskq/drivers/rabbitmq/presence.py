"""What a consumer lets others know, and hears from them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec
from pamqp.commands import Basic, Queue

from aiotaskq.drivers.rabbitmq import ledger
from aiotaskq.drivers.rabbitmq.channel import Content, Disconnected, Publication, Refused, pack
from aiotaskq.drivers.rabbitmq.items import Item
from aiotaskq.drivers.rabbitmq.ledger import (
    Alive,
    Cancel,
    Join,
    Leave,
    Recent,
    Record,
    Restore,
    Stream,
)
from aiotaskq.drivers.rabbitmq.link import Link
from aiotaskq.drivers.rabbitmq.losses import Losses, Spared
from aiotaskq.drivers.rabbitmq.roster import Answer, Question
from aiotaskq.drivers.rabbitmq.wire import Wire
from aiotaskq.errors import ConfigError, Unavailable

logger = logging.getLogger("aiotaskq.rabbitmq")

_ANSWER_WAIT = 1.0  # seconds for a record that a question speaks of to come
_JOIN_EVERY = 86_400.0  # seconds: the ledger forgets
_READ_PAUSE = 0.2  # seconds between attempts to read the ledger again
_read_question = msgspec.msgpack.Decoder(Question).decode


class Presence:
    """It is there while the consumer's connection is.

    Args:
        link: For what is published and declared.
        consumer_id: Of the consumer.
        queues: Of the consumer.
        about: What others are told of it.
        held: What it holds, by tag.
        holds: Returns how many that are, by queue.
        handed_out: Returns the ids of what of it a worker was given; the rest waits, to all others.

    Attributes:
        cancelled: Ids that are never to be handed out.
        spared: Which losses were no crashes.
        losses: What tells others so of its own.
    """

    def __init__(
        self,
        link: Link,
        consumer_id: str,
        queues: Sequence[str],
        about: bytes,
        held: Mapping[int, Item],
        holds: Callable[[], dict[str, int]],
        handed_out: Callable[[], set[str]],
    ) -> None:
        self._link = link
        self._id = consumer_id
        self._queues = tuple(queues)
        self._about = about
        self._holds = holds
        self._handed_out = handed_out
        self._stream = Stream(
            link,
            link.names.declare_stream(link.names.ledger, days=ledger.DAYS),
            lambda body: self._note(ledger.decode(body)),
            ledger.encode(ledger.Look()),
        )
        self._told: set[str] = set()  # cancelled while they run, since the last `news`
        self._seen = Recent()  # names of records
        self._noted = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.cancelled = Recent()
        self.spared = Spared()
        self.losses = Losses(consumer_id, held, self._stream.write, link.address.heartbeat)

    async def open(self, wire: Wire) -> None:
        """Be there for others, and know what was said so far."""
        channel = await wire.channel()
        name = self._link.names.consumer(self._id)
        channel.listen("questions", lambda content: self._start(self._answer(content)))
        await channel.call(
            Queue.Declare(queue=name, exclusive=True, auto_delete=True),
            Basic.Consume(queue=name, consumer_tag="questions", no_ack=True),
        )
        await self._enter(wire)
        self._start(self._stay())
        self._start(self._read_on(wire))
        self.losses.watch(wire)

    async def leave(self) -> None:
        """Tell that it is gone."""
        await self._stream.write(ledger.encode(Leave(self._id)))

    def close(self) -> None:
        """End what it does beside."""
        self.losses.close()
        for task in self._tasks:
            task.cancel()

    def news(self) -> set[str]:
        """Return the ids of what was cancelled while it runs, since the last call."""
        told, self._told = self._told, set()
        return told

    async def _enter(self, wire: Wire) -> None:
        await self._stream.declare()
        await self._join()
        # Who cancels something after this has read of us, and what was cancelled before is read.
        await self._stream.read(wire)

    async def _read_on(self, wire: Wire) -> None:
        """Enter again when the server ended the reading: the stream was deleted, or moved."""
        failed = False
        while True:
            await self._stream.ended.wait()
            if wire.error is not None:
                return
            try:
                await self._enter(wire)
                failed = False
            except (Unavailable, ConfigError, Disconnected, Refused) as error:
                if not failed:
                    logger.info("what is cancelled cannot be read, and is tried again: %s", error)
                failed = True
                await asyncio.sleep(_READ_PAUSE)

    async def _join(self) -> None:
        join = Join(self._id, self._queues, self._about)
        await self._stream.write(ledger.encode(join))

    async def _stay(self) -> None:
        while True:
            await asyncio.sleep(_JOIN_EVERY)
            with contextlib.suppress(Unavailable):  # the last one is remembered for some days more
                await self._join()

    def _note(self, record: Record) -> None:
        if isinstance(record, Cancel):
            self.cancelled.note(record.ids)
            if record.running:
                self._told.update(self._handed_out().intersection(record.ids))
            self._seen.note([record.name])
        elif isinstance(record, Restore):
            self.cancelled.drop(record.ids)
            self._told.difference_update(record.ids)
            self._seen.note([record.name])
        elif isinstance(record, Alive):
            self.spared.note(record.consumer, record.held)
        self._noted.set()

    async def _answer(self, content: Content) -> None:
        question = _read_question(content.body)
        try:
            async with asyncio.timeout(_ANSWER_WAIT):
                while question.after and question.after not in self._seen:
                    self._noted.clear()
                    await self._noted.wait()
        except TimeoutError:
            return  # no answer is better than a wrong one
        ids = self._handed_out().intersection(question.ids)
        answer = ledger.encode(Answer(self._id, tuple(ids), self._holds()))
        properties = pack(Basic.Properties(correlation_id=content.properties.correlation_id))
        address = content.properties.reply_to or ""
        with contextlib.suppress(Unavailable):  # who asks waits no longer than it takes
            await self._link.start([Publication("", address, properties, answer)])

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
