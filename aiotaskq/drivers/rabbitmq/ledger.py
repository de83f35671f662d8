"""What everybody has to know, in streams: which consumers there are, what was cancelled, queues.

A stream is read by all, from its beginning, and keeps its order. So whoever writes a record and
then reads up to it knows all that was written before, and those who write later know of it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
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

_SECONDS = DAYS * 86_400.0


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


class Recent:
    """Names for as long as the ledger tells of them, or somewhat longer.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._noted: dict[str, float] = {}  # and when, the oldest first

    def __contains__(self, name: object) -> bool:
        return name in self._noted

    def note(self, names: Iterable[str]) -> None:
        """Take names in, and forget the old ones."""
        now = self._clock()
        for name in names:
            self._noted.pop(name, None)
            self._noted[name] = now
        # What a process knew for longer than others would be news to those that start later.
        while self._noted and now - self._noted[oldest := next(iter(self._noted))] > _SECONDS:
            del self._noted[oldest]

    def drop(self, names: Iterable[str]) -> None:
        """Forget names."""
        for name in names:
            self._noted.pop(name, None)


class Stream:
    """Reads a stream from its beginning, and goes on.

    Args:
        link: What it is declared and written through.
        declaration: How it is made.
        apply: Called with each record.
        empty: What is written where nothing was ever written, so that there is an end to read to.

    Attributes:
        ended: Set while nothing is read on: before `read`, and when the server ended it.
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
        self._offset = -1  # of the last record that came
        self._until = -1  # records up to this one are applied in one go
        self._late: list[bytes] = []  # that came of these
        self._anew = False  # whether it may be another stream than it was
        self._moved = asyncio.Event()
        self.ended = asyncio.Event()
        self.ended.set()

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
            reads_on = not self.ended.is_set()
            if not reads_on:
                await self.declare()
                await self.write(self._empty)
            end = await self._end(wire)
            if not reads_on:
                await self._subscribe(wire, end)
            await self._reach(end)

    async def _subscribe(self, wire: Wire, end: int) -> None:
        if self._channel is not None:
            await self._channel.close()
        if self._anew or end < self._offset:
            # Somebody deleted it, or it moved. What was read before is read once more then, in one
            # go: who looks in between would find cancelled what was restored later.
            self._anew, self._offset = False, -1
            self._late.clear()
        self._until = end
        channel = self._channel = await wire.channel()
        channel.on_failed = lambda: self._stop(channel)
        channel.on_cancelled = lambda _: self._stop(channel, anew=True)
        self.ended.clear()
        tag = uuid.uuid4().hex
        channel.listen(tag, lambda content: self._receive(channel, content))
        await self._consume(channel, tag, "first" if self._offset < 0 else self._offset + 1)

    def _stop(self, channel: Channel, *, anew: bool = False) -> None:
        if channel is self._channel:
            self._anew = self._anew or anew
            self.ended.set()
            self._moved.set()

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

    def _receive(self, channel: Channel, content: Content) -> None:
        offset = content.properties.headers[_OFFSET]
        if channel.error is None:
            channel.ack([content.method.delivery_tag])
        if channel is not self._channel or offset <= self._offset:
            return
        self._offset = offset
        self._late.append(content.body)
        if offset >= self._until:
            late, self._late = self._late, []
            for body in late:
                self._apply(body)
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

    async def _reach(self, offset: int) -> None:
        channel = self._channel
        assert channel is not None  # `_subscribe` made it
        try:
            async with asyncio.timeout(self._link.address.timeout):
                while self._offset < offset:
                    if self.ended.is_set():
                        raise Disconnected(f"the stream {self._name} is read no more")
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            self._stop(channel)  # the next call begins anew
            raise Disconnected(f"the stream {self._name} gave no answer in time") from None
