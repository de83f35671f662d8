"""A connection to RabbitMQ, which is aiormq's: handshake, signs of life, frames.

Its channels are our own (`channel.py`): aiormq's reader hands each its frames, and what they send
goes out through aiormq's queue.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
from collections.abc import Iterable
from typing import Any, SupportsIndex, cast
from urllib.parse import quote

import aiormq
from aiormq.abc import ChannelFrame
from aiormq.connection import EXCEPTION_MAPPING
from pamqp import commands, frame
from pamqp.constants import AMQP, FRAME_MAX_SIZE
from pamqp.exceptions import PAMQPException

from aiotaskq.drivers.rabbitmq.address import Address
from aiotaskq.drivers.rabbitmq.channel import Channel, Disconnected, Refused, Silent

_FAREWELL = 1.0  # seconds for good-bye
_MOST_CHANNELS = 65535
_CODES: dict[type[Exception], int] = {kind: code for code, kind in EXCEPTION_MAPPING.items()}

# aiormq logs every end of a connection, with a traceback. It ends as often as a server restarts,
# whoever used it gets an exception, and those who connect again log that themselves. Whoever wants
# to read it sets the level.
_library = logging.getLogger("aiormq")
if _library.level == logging.NOTSET:
    _library.setLevel(logging.CRITICAL)


class _Connection(aiormq.Connection):
    FRAME_BUFFER_SIZE = 0  # without an end: a channel sends without waiting


class _Reader(asyncio.StreamReader):
    """Keeps what comes while hands are shaken: aiormq does not tell why a server refuses then."""

    def __init__(self) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._kept: bytearray | None = bytearray()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        if self._kept is not None:
            self._kept.extend(data)
        super().feed_data(data)

    def forget(self) -> None:
        """Keep no more."""
        self._kept = None

    def refusal(self) -> Refused | None:
        """Return what the server refused with, if it did."""
        data, method = bytes(self._kept or b""), None
        if data.startswith(AMQP):
            return Refused(505, "it speaks another version of AMQP")
        try:
            while data:
                size, _, method = frame.unmarshal(data)
                data = data[size:]
        except PAMQPException:
            pass  # nothing that AMQP knows, or half of it
        if isinstance(method, commands.Connection.Close):
            return Refused(int(method.reply_code or 0), str(method.reply_text))
        return None


class _Given(aiormq.TransportFactory):
    """Hands in a transport that is connected. Where aiormq connects, it logs and rewords errors."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._streams = reader, writer

    async def create(
        self, url: object, **kwargs: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._streams


class Wire:
    """A live connection. It belongs to the event loop that made it, and dies once.

    Attributes:
        error: Why it is dead; None while it lives.
        closed: Done when it is dead.
        patience: Seconds that an answer may take.
        frame_max: Bytes that a frame may have, its head included.
        loop: The event loop.
    """

    def __init__(
        self, connection: aiormq.Connection, transport: asyncio.WriteTransport, patience: float
    ) -> None:
        tune = connection.connection_tune
        self.loop = asyncio.get_running_loop()
        self.patience = patience
        self.frame_max = min(tune.frame_max or FRAME_MAX_SIZE, FRAME_MAX_SIZE)
        self.error: Exception | None = None
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self._connection = connection
        self._transport = transport
        self._ending: asyncio.Task[None] | None = None
        self._most_channels = tune.channel_max or _MOST_CHANNELS
        # In turn: a number that has just become free may still be spoken of.
        self._numbers = itertools.cycle(range(1, self._most_channels + 1))
        self._life = self.loop.create_task(self._live(), name="aiotaskq-rabbitmq")

    @property
    def blocked(self) -> bool:
        """Whether the server takes no more messages at present, having no memory or disk left."""
        # aiormq tells nobody but whoever waits for the end of it: so we begin to wait, and look.
        waiting = self._connection.ready()
        try:
            waiting.send(None)
        except StopIteration:
            return False
        waiting.close()
        return True

    async def channel(self, *, confirms: bool = False) -> Channel:
        """Open a channel.

        Raises:
            Disconnected: The connection is gone.
        """
        if self.error is not None:
            raise Disconnected(str(self.error))
        channels = self._connection.channels
        if len(channels) >= self._most_channels:
            raise Disconnected("all its channels are in use")
        number = next(one for one in self._numbers if one not in channels)
        channel = Channel(self, number)
        # Of a channel aiormq's reader uses no more than `frames`. It frees the number, too.
        channels[number] = cast("Any", channel)
        opening = [commands.Channel.Open(), *([commands.Confirm.Select()] if confirms else [])]
        try:
            await channel.call(*opening)
        except asyncio.CancelledError:
            channel.abandon()  # or it and its number would be taken as long as the connection lives
            raise
        return channel

    def write(self, data: bytes) -> None:
        """Send bytes, which must be whole frames."""
        if self.error is None:
            self._connection.write_queue.put_nowait(ChannelFrame(data, should_close=False))

    def fail(self, error: Exception) -> None:
        """Give the connection up."""
        if self.error is not None:
            return
        self.error = error
        for channel in list(self._connection.channels.values()):
            cast("Channel", channel).fail(error)
        # aiormq would wait for minutes where the server stands still.
        self._transport.abort()
        self._end()
        self.closed.set_result(None)

    async def close(self) -> None:
        """Say good-bye and disconnect. Never raises."""
        try:
            if self.error is None:
                # What was sent before goes out first: aiormq's writer was woken for it before.
                await asyncio.wait({self._end()}, timeout=_FAREWELL)
        finally:
            self.fail(Disconnected("the connection was closed"))
        await asyncio.wait({self._life})

    def _end(self) -> asyncio.Task[None]:
        """Have aiormq end its tasks."""
        if self._ending is None:
            self._ending = self.loop.create_task(self._connection.close(None))
        return self._ending

    async def _live(self) -> None:
        """Wait until aiormq says that the connection is dead, and until its tasks have ended.

        Where an event loop ends before `close`, it cancels this together with aiormq's tasks, and
        waits for it: those which aiormq begins to clear up would be left to themselves else.
        """
        closing = self._connection.closing
        try:
            await asyncio.wait({closing})
            self.fail(_meaning(None if closing.cancelled() else closing.exception()))
        finally:
            await asyncio.wait({self._end()}, timeout=_FAREWELL)
            self.fail(Disconnected("its event loop ended"))
            await asyncio.wait({self._end()})


async def connect(address: Address) -> Wire:
    """Return a connection that is open.

    Raises:
        Refused: The server refuses the user, the password or the virtual host.
        Disconnected: It cannot be reached, or did not answer in time.
    """
    try:
        async with asyncio.timeout(address.connect_timeout):
            reader, writer = await _dial(address)
            return await _greet(address, reader, writer)
    except TimeoutError:
        raise Silent("no answer to the greeting in time") from None


async def _dial(address: Address) -> tuple[_Reader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = _Reader()
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    try:
        transport, _ = await loop.create_connection(
            lambda: protocol, address.host, address.port, ssl=address.ssl_context
        )
    except ssl.SSLCertVerificationError as error:
        raise Refused(
            403, f"its certificate is not to be trusted: {error.verify_message}"
        ) from error
    except OSError as error:
        raise Disconnected(str(error)) from error
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _greet(address: Address, reader: _Reader, writer: asyncio.StreamWriter) -> Wire:
    connection = _Connection(
        _url(address),
        transport_factory=_Given(reader, writer),
        client_properties={"connection_name": address.connection_name},
    )
    connection.vhost = address.virtual_host  # in a URL not every name can be had
    opening = asyncio.get_running_loop().create_task(connection.connect())
    try:
        await asyncio.wait({opening})
    except asyncio.CancelledError:
        # It ends at once then, and has nothing to wait for.
        writer.transport.abort()
        await asyncio.wait({opening})
        if not opening.cancelled():
            opening.exception()  # nobody else asks what became of it
        raise
    try:
        opening.result()
    except aiormq.AuthenticationError as error:
        mechanism = address.mechanism
        raise Refused(403, f"it does not know the mechanism {mechanism}: {error.args[0]}") from None
    except (aiormq.AMQPError, OSError) as error:
        raise reader.refusal() or _meaning(error) from None
    reader.forget()
    return Wire(connection, writer.transport, address.timeout)


def _url(address: Address) -> str:
    """Return what aiormq wants to be told in a URL: who it is, and the heartbeat."""
    user, password = quote(address.user, safe=""), quote(address.password, safe="")
    host = f"[{address.host}]" if ":" in address.host else address.host
    query = f"auth={address.mechanism.lower()}&heartbeat={address.heartbeat}"
    return f"amqp://{user}:{password}@{host}:{address.port}/?{query}"


def _meaning(error: BaseException | None) -> Exception:
    """Return what it means that aiormq ended a connection with this error."""
    match error:
        case None:
            return Disconnected("the connection was closed")
        case asyncio.CancelledError():  # no other ends aiormq's reader
            return Silent("the server gave no sign of life")
        case aiormq.ConnectionClosed(args=(*_, text)):
            code = _CODES.get(type(error)) or error.args[0]
            return Refused(int(code or 0), str(text))
    return Disconnected(str(error) or type(error).__name__)
