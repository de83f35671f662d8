"""A stream that every process reads from its beginning and appends to.

A stream keeps its order and gives each record an offset. So a process that writes a record and then
reads up to the end knows every record before its own, and processes that write later will read it.

Theory of operation
-------------------
Reading is off (`ended` is set) or on. `read` turns it on if it is off, finds the offset of the last
record, and waits until this process has applied that one. From then on records are applied as they
arrive. The server turns reading off when the stream is deleted or moves to another node, and so
does the loss of the channel or the connection; a `read` that waits for a record fails then, and the
next one turns reading on again.

Records are applied once and in order: one at or below `_offset` is dropped. A stream that was
deleted and made again starts with offset 0. It is noticed when the server cancels the reading, or
when the last offset is below `_offset`; then everything is read from the beginning once more.
Records that were missed are applied in one step when the last of them has arrived: a reader that
looked in between would see messages cancelled that were restored later.

Calls of `read` by several tasks run one after the other (`_turn`). A cancelled one leaves reading
on or off; the next call works in both cases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pamqp.commands import Basic

from aiotaskq.drivers.rabbitmq.channel import (
    AmqpDisconnected,
    AmqpError,
    AmqpMessage,
    AmqpNoAnswer,
    AmqpPublication,
    AmqpRefused,
    RabbitChannel,
    time_limit,
)
from aiotaskq.drivers.rabbitmq.connection import PRECONDITION_FAILED, RabbitConnection
from aiotaskq.drivers.rabbitmq.messages import PLAIN_PROPERTIES
from aiotaskq.drivers.rabbitmq.names import Declaration
from aiotaskq.drivers.rabbitmq.transport import RabbitTransport

_AHEAD = 1000  # records that the server sends before the first is acknowledged
_OFFSET = "x-stream-offset"
_TAG = "records"  # one consuming for each channel, so any name will do


class RabbitStream:
    """The reading end and the writing end of one stream.

    Args:
        connection: The connection to declare and write on.
        declaration: The declaration of the stream.
        apply: Called with each record.
        empty: A record without a meaning, written before reading begins: so there is a last one.

    Attributes:
        name: Its name at the server.
        ended: Set while reading is off.
    """

    def __init__(
        self,
        connection: RabbitConnection,
        declaration: Declaration,
        apply: Callable[[bytes], None],
        empty: bytes,
    ) -> None:
        self._connection = connection
        self._declaration = declaration
        self.name: str = declaration.queue
        self._late = f"the stream {self.name} gave no answer in time"
        self._apply = apply
        self._empty = empty
        self._channel: RabbitChannel | None = None
        self._turn = asyncio.Lock()
        self._offset = -1  # of the last record that arrived
        self._until = -1  # records up to this offset are applied in one step
        self._missed: list[bytes] = []  # those of them that have arrived
        self._anew = False  # whether the stream may have been deleted and made again
        self._moved = asyncio.Event()  # set when records were applied, or reading ended
        self.ended = asyncio.Event()
        self.ended.set()

    async def declare(self) -> None:
        """Declare the stream."""
        await self._connection.declare(self._declaration)

    async def write(self, record: bytes) -> None:
        """Append a record."""
        await self._connection.publish([AmqpPublication("", self.name, PLAIN_PROPERTIES, record)])

    async def catch_up(self) -> None:
        """Do as `read` does, over the connection that is written on.

        Raises:
            Unavailable: The server cannot be reached.
        """
        try:
            await self.read(await self._connection.transport())
        except AmqpError as error:
            self._connection.raise_mapped(error)

    async def read(self, transport: RabbitTransport) -> None:
        """Apply every record that was written before this call, and go on reading.

        Args:
            transport: The transport to read over, if reading is off.

        Raises:
            AmqpDisconnected: The connection is gone, or the records did not arrive in time.
            AmqpRefused: The server refuses it.
        """
        async with self._turn:
            reads_on = not self.ended.is_set()
            if not reads_on:
                await self.declare()
                await self.write(self._empty)
            end = await self._last_offset(transport)
            if not reads_on:
                await self._start_reading(transport, end)
            await self._reach(end)

    async def _start_reading(self, transport: RabbitTransport, end: int) -> None:
        if self._channel is not None:
            await self._channel.close()
        if self._anew or end < self._offset:
            self._anew, self._offset = False, -1
            self._missed.clear()
        self._until = end
        channel = self._channel = await transport.open_channel()
        channel.on_failed = lambda: self._stop(channel)
        channel.on_cancelled = lambda _: self._stop(channel, anew=True)
        self.ended.clear()
        channel.listen(_TAG, lambda message: self._receive(channel, message))
        await self._consume(channel, "first" if self._offset < 0 else self._offset + 1)

    def _stop(self, channel: RabbitChannel, *, anew: bool = False) -> None:
        if channel is self._channel:
            self._anew = self._anew or anew
            self.ended.set()
            self._moved.set()

    async def _consume(self, channel: RabbitChannel, offset: str | int) -> None:
        try:
            await channel.call(
                Basic.Qos(prefetch_count=_AHEAD),
                Basic.Consume(queue=self.name, consumer_tag=_TAG, arguments={_OFFSET: offset}),
            )
        except AmqpRefused as error:
            if error.code != PRECONDITION_FAILED:
                raise
            # Its arguments were checked when it was declared. A server that has just started gives
            # this code while no replica of the stream runs there.
            raise AmqpDisconnected(str(error)) from None

    def _receive(self, channel: RabbitChannel, message: AmqpMessage) -> None:
        offset = message.properties.headers.get(_OFFSET)
        if channel.error is None:
            channel.ack([message.method.delivery_tag])
        if channel is not self._channel or not isinstance(offset, int) or offset <= self._offset:
            return
        self._offset = offset
        self._missed.append(message.body)
        if offset >= self._until:
            missed, self._missed = self._missed, []
            for body in missed:
                self._apply(body)
            self._moved.set()

    async def _last_offset(self, transport: RabbitTransport) -> int:
        """Return the offset of the last record. There is one."""
        channel = await transport.open_channel()
        found: list[int] = []
        arrived = asyncio.Event()

        def receive(message: AmqpMessage) -> None:
            offset = message.properties.headers.get(_OFFSET)
            if isinstance(offset, int):
                found.append(offset)
                arrived.set()

        channel.listen(_TAG, receive)
        try:
            # The server sends its last chunk of records, and later ones.
            await self._consume(channel, "last")
            async with time_limit(transport.answer_timeout, self._late):
                await arrived.wait()
            await channel.call(Basic.Qos(prefetch_count=_AHEAD))  # answered behind the chunk
        finally:
            await channel.close()
        return found[-1]

    async def _reach(self, offset: int) -> None:
        channel = self._channel
        assert channel is not None  # `_start_reading` made it
        try:
            async with time_limit(self._connection.address.timeout, self._late):
                while self._offset < offset:
                    if self.ended.is_set():
                        raise AmqpDisconnected(f"the stream {self.name} is read no more")
                    self._moved.clear()
                    await self._moved.wait()
        except AmqpNoAnswer:
            self._stop(channel)  # the next call starts reading again
            raise
