"""Questions to all consumers: whether they live, and which messages they hold.

The server reports neither. Each consumer has a queue of its own that vanishes with its connection.
A question published to that queue comes back when the queue is gone, so no survey waits for a dead
consumer.

Theory of operation
-------------------
A survey reads the ledger to its end, publishes one question to each consumer known by then, and
waits for the confirms: a returned question means that its consumer is gone. Then it waits for the
answers of the others, for a limited time.

Meanwhile consumers may join (they are not asked, and know every record written before they joined)
and die (they do not answer, and count as alive and silent until the next survey). A consumer that
is gone is recorded as such, so that nobody asks it again; several processes may write the same
record, which does no harm.

One survey at a time uses the reply channel (`_turn`); a mark separates its answers from late ones
of earlier surveys.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Mapping

from pamqp.commands import Basic

from aiotaskq.contract.records import ConsumerInfo
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpError,
    AmqpMessage,
    AmqpPublication,
    RabbitChannel,
    time_limit,
)
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.membership.ledger import Ledger
from aiotaskq.drivers.rabbitmq.membership.records import (
    REPLIES,
    ConsumerAnswer,
    ConsumerLeft,
    ConsumerQuestion,
    decode_answer,
    encode,
)

_ANSWER_WAIT = 2.0  # seconds: a consumer answers in its own thread, unless its process stands still


class ConsumerSurvey:
    """Asks all consumers one question, and notes which are gone."""

    def __init__(self, connection: RabbitConnection, ledger: Ledger) -> None:
        self._connection = connection
        self._ledger = ledger
        self._channel: RabbitChannel | None = None
        self._turn = asyncio.Lock()

    async def ask(
        self, question: ConsumerQuestion
    ) -> Mapping[str, tuple[ConsumerInfo, ConsumerAnswer | None]]:
        """Ask all consumers; None stands for the answer of one that did not answer in time.

        Raises:
            Unavailable: The server cannot be reached.
        """
        ledger = self._ledger
        try:
            async with self._turn:
                await ledger.stream.catch_up()
                if not ledger.consumers:
                    return {}
                known = dict(ledger.consumers)
                answers, gone = await self._ask(known, encode(question))
        except AmqpError as error:
            self._connection.raise_mapped(error)
        for name in gone:
            ledger.consumers.pop(name, None)
            await ledger.write(ConsumerLeft(name))
        return {name: (info, answers.get(name)) for name, info in known.items() if name not in gone}

    async def _ask(
        self, known: Mapping[str, ConsumerInfo], question: bytes
    ) -> tuple[Mapping[str, ConsumerAnswer], Collection[str]]:
        """Return the answers by consumer, and the consumers that are gone."""
        channel = await self._reply_channel()
        answers: dict[str, ConsumerAnswer] = {}
        arrived = asyncio.Event()
        mark = uuid.uuid4().hex

        def receive(message: AmqpMessage) -> None:
            if message.properties.correlation_id == mark:
                answer = decode_answer(message.body)
                if answer is None or answer.consumer not in known:
                    return
                answers[answer.consumer] = answer
                arrived.set()

        channel.listen("replies", receive)
        properties = Basic.Properties(reply_to=REPLIES, correlation_id=mark).marshal()
        keys = {self._connection.names.consumer(name): name for name in known}
        confirmation = channel.publish(
            [AmqpPublication("", key, properties, question) for key in keys]
        )
        async with time_limit(self._connection.address.timeout, "no answer in time"):
            await confirmation.done
        gone = {keys[key] for key in confirmation.returned}
        try:
            async with asyncio.timeout(_ANSWER_WAIT):
                while len(answers) < len(known) - len(gone):
                    arrived.clear()
                    await arrived.wait()
        except TimeoutError:
            pass  # a process that stands still, or a connection that is about to be given up
        return answers, gone

    async def _reply_channel(self) -> RabbitChannel:
        channel = self._channel
        if channel is None or channel.error is not None:
            transport = await self._connection.transport()
            channel = self._channel = await transport.open_channel(confirms=True)
            await channel.call(Basic.Consume(queue=REPLIES, consumer_tag="replies", no_ack=True))
        return channel

    async def is_present(self, consumer_id: str) -> bool:
        """Return whether the queue of a consumer exists, and so its connection; await no answer.

        Raises:
            Unavailable: The server cannot be reached.
        """
        connection = self._connection
        key = connection.names.consumer(consumer_id)
        properties = Basic.Properties(reply_to="", correlation_id="").marshal()
        question = AmqpPublication("", key, properties, encode(ConsumerQuestion()))
        try:
            confirmation = await connection.begin_publish([question])
            await confirmation.done
        except AmqpError as error:
            connection.raise_mapped(error)
        return not confirmation.returned
