"""One consumer as a member: it announces itself, answers questions, and learns of cancellations.

Theory of operation
-------------------
`join` declares the consumer's queue, which lives as long as the connection, then records that the
consumer has joined, then reads the ledger and the list of queues, which has the priorities in use.
Only then may the consumer fetch. This order matters:

- A process that cancels a message writes the record and then asks every consumer known by then. A
  consumer that is not known yet writes its own record later, and so reads the cancellation.
- A consumer is recorded only when its queue exists, so no survey takes it for dead.

After that a member is reading each of the two or not. When the server ends the reading (the stream
was deleted or moved), it joins and reads again, until that works or the connection is gone. It also
does so once a day, because the ledger drops old records. Questions that refer to a record are
answered when that record was read; if this takes too long there is no answer, since the asker would
rely on it.

`close` and the loss of the connection end it. A member whose process dies leaves no record: others
find its queue gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, Protocol

from pamqp.commands import Basic, Queue

from aiotaskq.contract.records import ConsumerInfo
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpError,
    AmqpMessage,
    AmqpPublication,
)
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.membership.ledger import Ledger, RecentNames
from aiotaskq.drivers.rabbitmq.membership.losses import LossReporter
from aiotaskq.drivers.rabbitmq.membership.records import (
    REPLIES,
    ConsumerAnswer,
    ConsumerJoined,
    ConsumerLeft,
    LedgerRecord,
    MessagesCancelled,
    MessagesRestored,
    decode_question,
    encode,
)
from aiotaskq.drivers.rabbitmq.membership.stream import RabbitStream
from aiotaskq.drivers.rabbitmq.messages import Lineage
from aiotaskq.drivers.rabbitmq.transport import RabbitTransport
from aiotaskq.errors import ConfigError, Unavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.rabbitmq")

_LONGEST_MARK = 40  # characters of a survey's mark
_LONGEST_ADDRESS = 255  # bytes: AMQP's short string
_RECORD_WAIT = 1.0  # seconds that an answer waits for the record which the question refers to
_JOIN_EVERY = 86_400.0  # seconds: the ledger drops old records
_READ_PAUSE = 0.2  # seconds between attempts to read the ledger again


class HeldMessages(Protocol):
    """The messages of a consumer, as others ask for them."""

    def lineages(self) -> Collection[Lineage]:
        """Return all that it holds."""
        ...

    def counts(self) -> dict[str, int]:
        """Return the number of messages that it holds, by queue."""
        ...

    def handed_out_ids(self) -> set[str]:
        """Return the ids of those that a worker was given; the others still wait."""
        ...


class ConsumerMember:
    """The membership of one consumer, which lasts as long as its connection.

    Args:
        connection: The connection to write and publish on; not the consumer's own.
        ledger: The ledger; this object takes its callback.
        queue_list: The list of queues.
        consumer: The consumer, as others see it.
        held: The messages of the consumer.

    Attributes:
        losses: The reporter of this consumer's own losses.
    """

    def __init__(
        self,
        connection: RabbitConnection,
        ledger: Ledger,
        queue_list: RabbitStream,
        consumer: ConsumerInfo,
        held: HeldMessages,
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._queue_list = queue_list
        self._consumer = consumer
        self._held = held
        self._cancelled: set[str] = set()  # while they run, since the last `take_cancelled`
        self._read_records = RecentNames()
        self._record_read = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.losses = LossReporter(
            consumer.id, held.lineages, ledger.write, connection.address.heartbeat
        )
        ledger.on_record = self._note

    async def join(self, transport: RabbitTransport) -> None:
        """Make the consumer known, and read everything that it must know before it fetches.

        Args:
            transport: The consumer's connection, which stands for its life.

        Raises:
            AmqpError: The consumer's connection failed.
            Unavailable: The other connection failed.
        """
        channel = await transport.open_channel()
        queue = self._connection.names.consumer(self._consumer.id)
        channel.listen("questions", lambda message: self._start(self._answer(message)))
        await channel.call(
            Queue.Declare(queue=queue, exclusive=True, auto_delete=True),
            Basic.Consume(queue=queue, consumer_tag="questions", no_ack=True),
        )
        await asyncio.gather(self._join_and_read(transport), self._queue_list.read(transport))
        self._start(self._stay_reading(transport, self._ledger.stream, self._join_and_read))
        self._start(self._stay_reading(transport, self._queue_list, self._queue_list.read))
        self.losses.watch(transport)

    async def leave(self) -> None:
        """Record that the consumer is gone."""
        await self._ledger.write(ConsumerLeft(self._consumer.id))

    async def close(self) -> None:
        """End all background work, after a loss was recorded or could not be in time."""
        await self.losses.reported()
        self.losses.close()
        for task in self._tasks:
            task.cancel()

    def take_cancelled(self) -> set[str]:
        """Return the ids that were cancelled while they ran, since the last call."""
        cancelled, self._cancelled = self._cancelled, set()
        return cancelled

    async def _join_and_read(self, transport: RabbitTransport) -> None:
        consumer = self._consumer
        await self._ledger.stream.declare()
        await self._ledger.write(
            ConsumerJoined(consumer.id, tuple(consumer.queues), consumer.about)
        )
        await self._ledger.stream.read(transport)

    async def _stay_reading(
        self,
        transport: RabbitTransport,
        stream: RabbitStream,
        read: Callable[[RabbitTransport], Awaitable[None]],
    ) -> None:
        """Read a stream again: when the server has ended the reading, and once a day anyway."""
        failed = False
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_JOIN_EVERY):
                    await stream.ended.wait()
            if transport.error is not None:
                return
            try:
                await read(transport)
                failed = False
            except (Unavailable, ConfigError, AmqpError) as error:
                if not failed:
                    logger.info("%s cannot be read; trying again: %s", stream.name, error)
                failed = True
                await asyncio.sleep(_READ_PAUSE)

    def _note(self, record: LedgerRecord) -> None:
        match record:
            case MessagesCancelled():
                if record.running:
                    self._cancelled.update(self._held.handed_out_ids().intersection(record.ids))
                self._read_records.note([record.name])
            case MessagesRestored():
                self._cancelled.difference_update(record.ids)
                self._read_records.note([record.name])
        self._record_read.set()

    async def _answer(self, message: AmqpMessage) -> None:
        question = decode_question(message.body)
        mark, address = message.properties.correlation_id, message.properties.reply_to
        fits = len(address.encode()) <= _LONGEST_ADDRESS and len(mark) <= _LONGEST_MARK
        if question is None or not address.startswith(REPLIES) or not fits:
            return  # not from a survey: no answer goes to a queue of somebody's choice
        try:
            async with asyncio.timeout(_RECORD_WAIT):
                while question.after and question.after not in self._read_records:
                    self._record_read.clear()
                    await self._record_read.wait()
        except TimeoutError:
            return  # no answer is better than a wrong one
        ids = self._held.handed_out_ids().intersection(question.ids)
        answer = encode(ConsumerAnswer(self._consumer.id, tuple(ids), self._held.counts()))
        properties = Basic.Properties(correlation_id=mark).marshal()
        with contextlib.suppress(Unavailable):  # the asker waits for a limited time
            await self._connection.begin_publish([AmqpPublication("", address, properties, answer)])

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
