"""A TCP or TLS connection to RabbitMQ, made by aiormq: handshake, heartbeats, frames.

Its channels are our own (`channel.py`): aiormq's reader hands each channel its frames, and the
frames of all channels go out through aiormq's write queue.

Theory of operation
-------------------
`connect` opens the socket and runs aiormq's handshake, both within one time limit; a cancelled call
leaves nothing behind. The result is an open `RabbitTransport` (`error` is None). It fails once, in
`fail`: when aiormq's reader or writer ends (the server closed the connection, the network failed,
heartbeats did not arrive), when a call got no answer in time, or in `close`. From then on all its
channels have failed too, the socket is aborted, `closed` is done, and writing does nothing. A
failed transport never recovers; `connection.py` makes a new one.

Two tasks end a transport and may overlap: `_watch`, which waits for aiormq, and `_end`, which has
aiormq end its own tasks. An event loop may be closed at any await without a call of `close`; then
`_watch` is cancelled with aiormq's tasks, and ends only when those have ended.

Invariant: a channel is in aiormq's table from its opening until both sides have closed it, so no
number is given to two channels. `open_channel` that is cancelled before the reply closes its
channel, or that number would stay taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import ssl
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex, cast
from urllib.parse import quote

import aiormq
from aiormq.abc import ChannelFrame
from aiormq.connection import EXCEPTION_MAPPING
from pamqp import commands, frame
from pamqp.constants import AMQP, FRAME_MAX_SIZE
from pamqp.exceptions import PAMQPException

from aiotaskq import forks
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpDisconnected,
    AmqpError,
    AmqpNoAnswer,
    AmqpRefused,
    RabbitChannel,
    time_limit,
)
from aiotaskq.drivers.rabbitmq.frames import FrameRewriter
from aiotaskq.drivers.rabbitmq.url import RabbitAddress

_CLOSING_WAIT = 1.0  # seconds for an orderly end of the connection
_QUIET = 1.0  # seconds without a word from the server, while an answer is missing
_SILENT_STEPS, _STEP = 6, 0.25  # times, seconds: after which it is asked in vain
_MOST_CHANNELS = 65535
_CODES: dict[type[Exception], int] = {kind: code for code, kind in EXCEPTION_MAPPING.items()}

# aiormq logs each end of a connection with a traceback. Connections end whenever a server restarts:
# their users get an exception, and the code that connects again logs that itself. A level that
# somebody has set stays.
_library = logging.getLogger("aiormq")
if _library.level == logging.NOTSET:
    _library.setLevel(logging.CRITICAL)


class _AiormqConnection(aiormq.Connection):
    FRAME_BUFFER_SIZE = 0  # an unbounded write queue: a channel sends without waiting


class _ServerReader(asyncio.StreamReader):
    """A reader of frames that pamqp can read: see `frames.py`.

    It keeps the bytes of the handshake: aiormq does not report a refusal's reason.

    Attributes:
        heard_at: The time of the event loop at which the server sent something last.
    """

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        super().__init__(loop=asyncio.get_running_loop())
        self._kept: bytearray | None = bytearray()
        self._rewriter = FrameRewriter()
        self.heard_at = self._clock()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        received = bytes(data)
        self.heard_at = self._clock()
        if self._kept is not None:
            self._kept.extend(received)
        if readable := self._rewriter.feed(received):
            super().feed_data(readable)

    def forget(self) -> None:
        """Keep no more bytes: the handshake is done."""
        self._kept = None

    def refusal(self) -> AmqpRefused | None:
        """Return the server's reason for refusing, if it gave one."""
        data, method = bytes(self._kept or b""), None
        if data.startswith(AMQP):
            return AmqpRefused(505, "it speaks another version of AMQP")
        try:
            while data:
                size, _, method = frame.unmarshal(data)
                data = data[size:]
        except PAMQPException:
            pass  # not AMQP, or an incomplete frame
        if isinstance(method, commands.Connection.Close):
            return AmqpRefused(int(method.reply_code or 0), str(method.reply_text))
        return None


class _OpenStreams(aiormq.TransportFactory):
    """Gives aiormq streams that are connected: when it connects itself, it rewords the errors."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._streams = reader, writer

    async def create(
        self, url: object, **kwargs: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._streams


class RabbitTransport:
    """A connection of one event loop. It fails once.

    Attributes:
        error: The reason why it failed; None while it is open.
        closed: Done when it has failed.
        answer_timeout: Seconds that an answer may take.
        frame_max: Bytes that a frame may have, with its head.
        loop: The event loop.
    """

    def __init__(
        self,
        connection: aiormq.Connection,
        socket: asyncio.WriteTransport,
        reader: _ServerReader,
        answer_timeout: float,
    ) -> None:
        tune = connection.connection_tune
        self.loop = asyncio.get_running_loop()
        self.answer_timeout = answer_timeout
        self.frame_max = min(tune.frame_max or FRAME_MAX_SIZE, FRAME_MAX_SIZE)
        self.error: Exception | None = None
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self._connection = connection
        self._socket = socket
        self._reader = reader
        self._expected = 0  # callers that wait for an answer
        self._looking: asyncio.TimerHandle | None = None
        self._checking: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._most_channels = tune.channel_max or _MOST_CHANNELS
        # In turn: frames for a number that has just become free may still be on their way.
        self._numbers = itertools.cycle(range(1, self._most_channels + 1))
        self._watching = self.loop.create_task(self._watch(), name="aiotaskq-rabbitmq")

    @property
    def blocked(self) -> bool:
        """Return whether the server takes no messages now, for want of memory or disk."""
        # aiormq has no flag for it, only a coroutine that waits until the server takes messages
        # again. This begins to wait, and sees whether it has to.
        waiting = self._connection.ready()
        try:
            waiting.send(None)
        except StopIteration:
            return False
        waiting.close()
        return True

    async def open_channel(self, *, confirms: bool = False) -> RabbitChannel:
        """Open a channel.

        Raises:
            AmqpDisconnected: The connection is gone.
        """
        if self.error is not None:
            raise AmqpDisconnected(str(self.error))
        channels = self._connection.channels
        if len(channels) >= self._most_channels:
            raise AmqpDisconnected("all its channels are in use")
        number = next(one for one in self._numbers if one not in channels)
        channel = RabbitChannel(self, number)
        # aiormq's reader uses only `frames` of a channel. It also frees the number.
        channels[number] = cast("Any", channel)
        opening = [commands.Channel.Open(), *([commands.Confirm.Select()] if confirms else [])]
        try:
            await channel.call(*opening)
        except asyncio.CancelledError:
            channel.abandon()  # or it would use its number as long as the connection stands
            raise
        return channel

    @contextlib.contextmanager
    def expect_answer(self) -> Iterator[None]:
        """Watch the server while an answer is missing; the connection fails soon if it is gone.

        An answer may take long, but a server that lives says something when it is asked. So a
        connection whose packets are dropped is noticed within three seconds, and the caller has
        time to try another one.
        """
        self._expected += 1
        if self._looking is None:
            self._looking = self.loop.call_later(_QUIET, self._look, self._reader.heard_at)
        try:
            yield
        finally:
            self._expected -= 1

    def _look(self, before: float) -> None:
        """Ask the server for a sign of life, if an answer is missing and it is quiet."""
        self._looking = None
        if not self._expected or self.error is not None:
            return
        now = self._reader.heard_at
        if now == before and self._checking is None:
            self._checking = self.loop.create_task(self._check(), name="aiotaskq-rabbitmq")
        self._looking = self.loop.call_later(_QUIET, self._look, now)

    async def _check(self) -> None:
        """Ask for any answer, and give the connection up if there is none."""
        asked = self._reader.heard_at
        # The server opens a channel at once, whatever its queues are doing.
        opening = self.loop.create_task(self.open_channel())
        # In steps: a blocked event loop receives nothing, and must not count for more than one.
        for _ in range(_SILENT_STEPS):
            await asyncio.wait({opening}, timeout=_STEP)
            if self._reader.heard_at > asked:
                break
        else:
            self.fail(AmqpNoAnswer("the server gives no sign of life"))
        try:
            await (await opening).close()
        except AmqpError:
            pass  # it has failed, or fails now
        finally:
            self._checking = None

    def write(self, data: bytes) -> None:
        """Send bytes, which must be whole frames."""
        if self.error is None:
            self._connection.write_queue.put_nowait(ChannelFrame(data, should_close=False))

    def fail(self, error: Exception) -> None:
        """Give the connection up, and all channels with it."""
        if self.error is not None:
            return
        self.error = error
        for channel in list(self._connection.channels.values()):
            cast("RabbitChannel", channel).fail(error)
        # aiormq would wait for minutes where the server does not read.
        self._socket.abort()
        if self._looking is not None:
            self._looking.cancel()
        self._end()
        self.closed.set_result(None)

    async def close(self) -> None:
        """Disconnect; earlier frames go out first, if the server reads them. Never raises."""
        try:
            if self.error is None:
                # aiormq's writer was woken for earlier frames before, so it sends them first.
                await asyncio.wait({self._end()}, timeout=_CLOSING_WAIT)
        finally:
            self.fail(AmqpDisconnected("the connection was closed"))
        await asyncio.wait({self._watching, *([self._checking] if self._checking else [])})

    def _end(self) -> asyncio.Task[None]:
        """Have aiormq end its tasks."""
        if self._ending is None:
            self._ending = self.loop.create_task(self._connection.close(None))
        return self._ending

    async def _watch(self) -> None:
        """Wait until aiormq reports the end of the connection, and until its tasks have ended.

        Where an event loop ends before `close`, it cancels this task together with aiormq's and
        waits for it. Those that aiormq starts to clean up would otherwise be left behind.
        """
        closing = self._connection.closing
        try:
            await asyncio.wait({closing})
            self.fail(_mapped(None if closing.cancelled() else closing.exception()))
        finally:
            await asyncio.wait({self._end()}, timeout=_CLOSING_WAIT)
            self.fail(AmqpDisconnected("its event loop ended"))
            await asyncio.wait({self._end()})


async def connect(address: RabbitAddress) -> RabbitTransport:
    """Return an open connection to the first of the hosts that answers.

    Raises:
        AmqpRefused: The server refuses the user, the password or the virtual host.
        AmqpDisconnected: None can be reached, or the last did not answer in time.
    """
    *others, last = address.hosts
    for host, port in others:
        with contextlib.suppress(AmqpDisconnected):
            return await _connect_to(address, host, port)
    return await _connect_to(address, *last)


async def _connect_to(address: RabbitAddress, host: str, port: int) -> RabbitTransport:
    async with time_limit(address.connect_timeout, "no answer to the greeting in time"):
        reader, writer = await _open_streams(address, host, port)
        return await _shake_hands(address, reader, writer)


async def _open_streams(
    address: RabbitAddress, host: str, port: int
) -> tuple[_ServerReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = _ServerReader()
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    try:
        socket, _ = await loop.create_connection(
            lambda: protocol, host, port, ssl=address.ssl_context
        )
    except ssl.SSLCertVerificationError as error:
        raise AmqpRefused(
            403, f"its certificate is not to be trusted: {error.verify_message}"
        ) from error
    except OSError as error:
        raise AmqpDisconnected(f"{host}:{port}: {error}") from error
    forks.keep_transport_private(socket)
    return reader, asyncio.StreamWriter(socket, protocol, reader, loop)


async def _shake_hands(
    address: RabbitAddress, reader: _ServerReader, writer: asyncio.StreamWriter
) -> RabbitTransport:
    connection = _AiormqConnection(
        _aiormq_url(address),
        transport_factory=_OpenStreams(reader, writer),
        client_properties={"connection_name": address.connection_name},
    )
    connection.vhost = address.virtual_host  # aiormq cannot read every name from a URL
    opening = asyncio.get_running_loop().create_task(connection.connect())
    try:
        await asyncio.wait({opening})
    except asyncio.CancelledError:
        # Without its socket the handshake ends at once.
        writer.transport.abort()
        await asyncio.wait({opening})
        if not opening.cancelled():
            opening.exception()  # read it, or asyncio logs it
        raise
    try:
        opening.result()
    except aiormq.AuthenticationError as error:
        mechanism = address.mechanism
        raise AmqpRefused(
            403, f"it does not know the mechanism {mechanism}: {error.args[0]}"
        ) from None
    except (aiormq.AMQPError, OSError) as error:
        raise reader.refusal() or _mapped(error) from None
    reader.forget()
    return RabbitTransport(connection, writer.transport, reader, address.timeout)


def _aiormq_url(address: RabbitAddress) -> str:
    """Return the URL that aiormq is given: it reads the account and the heartbeat from it."""
    user, password = quote(address.user, safe=""), quote(address.password, safe="")
    query = f"auth={address.mechanism.lower()}&heartbeat={address.heartbeat}"
    return f"amqp://{user}:{password}@host/?{query}"


def _mapped(error: BaseException | None) -> Exception:
    """Return our error for the one with which aiormq ended a connection."""
    match error:
        case None:
            return AmqpDisconnected("the connection was closed")
        case asyncio.CancelledError():  # only a missing heartbeat cancels aiormq's reader
            return AmqpNoAnswer("the server gave no sign of life")
        case aiormq.ConnectionClosed(args=(*_, text)):
            code = _CODES.get(type(error)) or error.args[0]
            return AmqpRefused(int(code or 0), str(text))
    return AmqpDisconnected(str(error) or type(error).__name__)
