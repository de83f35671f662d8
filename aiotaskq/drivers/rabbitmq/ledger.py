"""What everybody has to know, in streams: which consumers there are, what was cancelled, queues.

A stream is read by all, from its beginning, and keeps its order. So whoever writes a record and
then reads up to it knows all that was written before, and those who write later know of it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TypeAlias

import msgspec
from pamqp.commands import Basic

from aiotaskq.drivers.rabbitmq.channel import (
    Channel,
    Content,
    Disconnected,
    Publication,
    Refused,
)
from aiotaskq.drivers.rabbitmq.items import PLAIN_PROPERTIES, Life
from aiotaskq.drivers.rabbitmq.link import DIFFERS, Link
from aiotaskq.drivers.rabbitmq.names import Declaration
from aiotaskq.drivers.rabbitmq.wire import Wire

_AHEAD = 1000  # records that the server sends before the first is acknowledged
_OFFSET = "x-stream-offset"

DAYS = 7
"""For which the ledger keeps what it is told."""


class Join(msgspec.Struct, frozen=True, tag="join"):
    """A consumer is there."""

    consumer: str
    queues: tuple[str, ...]
    about: bytes


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """A consumer is gone."""

    consumer: str


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Messages are never to be handed out again.

    Args:
        name: Of this record.
        ids: Theirs.
        running: Whether those that are held are meant as well.
    """

    name: str
    ids: tuple[str, ...]
    running: bool


class Restore(msgspec.Struct, frozen=True, tag="restore"):
    """Messages may be handed out again that were cancelled before."""

    name: str
    ids: tuple[str, ...]


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The process of a consumer lives that has lost its connection: it did not crash.

    Args:
        consumer: Which. It has lost what it held once, however often this is written.
        held: What it held.
    """

    consumer: str
    held: tuple[Life, ...]


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Somebody looked into an empty ledger."""


Record: TypeAlias = Join | Leave | Cancel | Restore | Alive | Look
_decode = msgspec.msgpack.Decoder(Record).decode
encode = msgspec.msgpack.Encoder().encode


def new_name() -> str:
    """Return a name for a record."""
    return uuid.uuid4().hex


def decode(body: bytes) -> Record:
    """Read a record; what cannot be read says nothing."""
    try:
        record: Record = _decode(body)
    except msgspec.MsgspecError:  # of a later version
        return Look()
    return record


class Stream:
    """Reads a stream from its beginning, and goes on.

    Args:
        link: What it is declared and written through.
        declaration: How it is made.
        apply: Called with each record.
        empty: What is written where nothing was ever written, so that there is an end to read to.
    """

    def __init__(
        self, link: Link, declaration: Declaration, apply: Callable[[bytes], None], empty: bytes
    ) -> None:
        self._link = link
        self._declaration = declaration
        self._name: str = declaration.queue
        self._apply = apply
        self._empty = empty
        self._channel: Channel | None = None
        self._subscribing = asyncio.Lock()
        self._offset = -1  # of the last record that was applied
        self._moved = asyncio.Event()

    async def declare(self) -> None:
        """Make it, if it is not there."""
        await self._link.declare(self._declaration)

    async def write(self, record: bytes) -> None:
        """Add a record."""
        await self._link.publish([Publication("", self._name, PLAIN_PROPERTIES, record)])

    async def read(self, wire: Wire) -> None:
        """Read up to what was written before this call, over a connection; and go on from there.

        Raises:
            Disconnected: The connection is gone.
            Refused: The server refuses it.
        """
        async with self._subscribing:
            channel = self._channel
            if channel is None or channel.error is not None:
                channel = await self._subscribe(wire)
            if self._offset < 0:
                await self.write(self._empty)
            await self._reach(channel, await self._end(wire))

    async def _subscribe(self, wire: Wire) -> Channel:
        await self.declare()
        channel = self._channel = await wire.channel()
        tag = uuid.uuid4().hex
        channel.listen(tag, self._receive)
        # The server ends it when the stream moves to another node; the next call begins anew.
        channel.on_cancelled = lambda _: channel.fail(Disconnected("the stream has moved"))
        offset: str | int = "first" if self._offset < 0 else self._offset + 1
        await self._consume(channel, tag, offset)
        return channel

    async def _consume(self, channel: Channel, tag: str, offset: str | int) -> None:
        try:
            await channel.call(
                Basic.Qos(prefetch_count=_AHEAD),
                Basic.Consume(queue=self._name, consumer_tag=tag, arguments={_OFFSET: offset}),
            )
        except Refused as error:
            if error.code != DIFFERS:
                raise
            # How it is made was settled when it was declared. A server that has just started
            # refuses it like this while the stream has no replica there that runs.
            raise Disconnected(str(error)) from None

    def _receive(self, content: Content) -> None:
        channel = self._channel
        offset = content.properties.headers[_OFFSET]
        if channel is not None and channel.error is None:
            channel.ack([content.method.delivery_tag])
        if offset > self._offset:
            self._offset = offset
            self._apply(content.body)
            self._moved.set()

    async def _end(self, wire: Wire) -> int:
        """Return the offset of the last record. There is one."""
        channel = await wire.channel()
        found: list[int] = []
        came: asyncio.Future[None] = wire.loop.create_future()

        def receive(content: Content) -> None:
            found.append(content.properties.headers[_OFFSET])
            if not came.done():
                came.set_result(None)

        channel.listen("end", receive)
        try:
            # Brings the last of the chunks in which records are kept, and what follows.
            await self._consume(channel, "end", "last")
            async with asyncio.timeout(wire.patience):
                await came
            await channel.call(Basic.Qos(prefetch_count=_AHEAD))  # behind the rest of the chunk
        except TimeoutError:
            raise Disconnected(f"the stream {self._name} gave no answer in time") from None
        finally:
            await channel.close()
        return found[-1]

    async def _reach(self, channel: Channel, offset: int) -> None:
        try:
            async with asyncio.timeout(self._link.address.timeout):
                while self._offset < offset:
                    if channel.error is not None:
                        raise Disconnected(str(channel.error))
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            raise Disconnected(f"the stream {self._name} gave no answer in time") from None
