"""Who consumes, and what they hold: asked of them, since the server does not tell.

Each consumer has a queue of its own that is gone with its connection. A question that is published
to it comes back where it is not there any more, so nobody has to wait for the dead.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Mapping

import msgspec
from pamqp.commands import Basic

from aiotaskq.contract.records import ConsumerInfo
from aiotaskq.drivers.rabbitmq.channel import (
    Channel,
    Content,
    Disconnected,
    Publication,
    Refused,
    pack,
)
from aiotaskq.drivers.rabbitmq.ledger import Join, Leave, Record, Stream, encode
from aiotaskq.drivers.rabbitmq.link import Link

_PATIENCE = 2.0  # seconds: a consumer answers in a thread of its own, unless its process stands
_REPLIES = "amq.rabbitmq.reply-to"


class Question(msgspec.Struct, frozen=True):
    """Asked of a consumer.

    Args:
        after: Answer only when this record of the ledger is known; empty: at once.
        ids: Which of these are held?
    """

    after: str = ""
    ids: tuple[str, ...] = ()


class Answer(msgspec.Struct, frozen=True):
    """What a consumer says.

    Args:
        consumer: Which it is.
        held: Those of the ids that it holds.
        counts: How many it holds, by queue.
    """

    consumer: str
    held: tuple[str, ...]
    counts: dict[str, int]


_decode = msgspec.msgpack.Decoder(Answer).decode


class Roster:
    """The consumers that there are, for those who ask them."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._known: dict[str, ConsumerInfo] = {}
        self._channel: Channel | None = None
        self._turn = asyncio.Lock()

    def apply(self, record: Record) -> None:
        """Take in a record of the ledger."""
        if isinstance(record, Join):
            self._known[record.consumer] = ConsumerInfo(
                id=record.consumer, queues=record.queues, about=record.about
            )
        elif isinstance(record, Leave):
            self._known.pop(record.consumer, None)

    async def ask(
        self, ledger: Stream, question: Question
    ) -> Mapping[str, tuple[ConsumerInfo, Answer | None]]:
        """Ask all consumers that there are; None stands for one that does not answer in time.

        Raises:
            Unavailable: The server cannot be reached.
        """
        try:
            async with self._turn:
                wire = await self._link.wire()
                await ledger.read(wire)
                if not self._known:
                    return {}
                known = dict(self._known)
                answers, gone = await self._ask(known, encode(question))
        except (Disconnected, Refused) as error:
            self._link.explain(error)
        for name in gone:
            # So that nobody has to ask for it any more.
            self._known.pop(name, None)
            await ledger.write(encode(Leave(name)))
        return {name: (info, answers.get(name)) for name, info in known.items() if name not in gone}

    async def _ask(
        self, known: Mapping[str, ConsumerInfo], question: bytes
    ) -> tuple[Mapping[str, Answer], Collection[str]]:
        if self._channel is None or self._channel.error is not None:
            channel = self._channel = await (await self._link.wire()).channel(confirms=True)
            await channel.call(Basic.Consume(queue=_REPLIES, consumer_tag="replies", no_ack=True))
        channel = self._channel
        answers: dict[str, Answer] = {}
        came = asyncio.Event()
        mark = uuid.uuid4().hex

        def receive(content: Content) -> None:
            if content.properties.correlation_id == mark:
                answer = _decode(content.body)
                answers[answer.consumer] = answer
                came.set()

        channel.listen("replies", receive)
        properties = pack(Basic.Properties(reply_to=_REPLIES, correlation_id=mark))
        keys = {self._link.names.consumer(name): name for name in known}
        confirmation = channel.publish([Publication("", key, properties, question) for key in keys])
        try:
            async with asyncio.timeout(self._link.address.timeout):
                await confirmation.done
        except TimeoutError:
            raise Disconnected("no answer in time") from None
        gone = {keys[key] for key in confirmation.returned}
        try:
            async with asyncio.timeout(_PATIENCE):
                while len(answers) < len(known) - len(gone):
                    came.clear()
                    await came.wait()
        except TimeoutError:
            pass  # a process that stands still, or a connection that is about to be given up
        return answers, gone
