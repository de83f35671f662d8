"""A connection to RabbitMQ: its handshake, its signs of life, and the frames of its channels.

The bytes go between the transport and the channels without a task in between.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast

from pamqp import commands, frame, header
from pamqp.base import Frame

from aiotaskq.drivers.rabbitmq.address import Address
from aiotaskq.drivers.rabbitmq.channel import (
    FRAME_END,
    HEARTBEAT,
    Channel,
    Disconnected,
    Refused,
    Silent,
    frame_head,
    read_method,
)

_BEAT = frame_head.pack(HEARTBEAT, 0, 0) + FRAME_END
_CAPABILITIES = {
    "publisher_confirms": True,
    "consumer_cancel_notify": True,
    "basic.nack": True,
    "connection.blocked": True,
    "authentication_failure_close": True,
    "exchange_exchange_bindings": True,
}


class Wire(asyncio.Protocol):
    """A live connection. It belongs to the event loop that made it, and dies once.

    Attributes:
        error: Why it is dead; None while it lives.
        closed: Done when it is dead.
        blocked: Why the server takes no more messages at present; None if it does.
        patience: Seconds that an answer may take.
        loop: The event loop.
    """

    def __init__(self, patience: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.patience = patience
        self.error: Exception | None = None
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self.blocked: str | None = None
        self.on_blocked: set[asyncio.Future[None]] = set()
        self.frame_max = 131072
        self._transport: asyncio.Transport | None = None
        self._channels: dict[int, Channel] = {}
        self._numbers = 0
        self._free: list[int] = []
        self._buffer = bytearray()
        self._held_up: list[bytes] = []  # while the transport takes no more
        self._paused = False
        self._greeting: asyncio.Future[Any] | None = None
        self._beat = 0.0
        self._heard = self._said = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None

    async def open(self, address: Address) -> None:
        """Shake hands, on a transport that is connected."""
        properties: dict[str, Any] = {
            "product": "aiotaskq",
            "connection_name": address.connection_name,
            "capabilities": _CAPABILITIES,
        }
        self._put(header.ProtocolHeader().marshal())
        start = await self._next(commands.Connection.Start)
        mechanism = address.mechanism
        if mechanism not in start.mechanisms.split():
            raise Refused(403, f"it does not know the mechanism {mechanism}: {start.mechanisms}")
        self._say(commands.Connection.StartOk(properties, mechanism, address.response, "en_US"))
        tune = await self._next(commands.Connection.Tune)
        self.frame_max = min(tune.frame_max or 131072, 131072)
        beat = address.heartbeat
        self._say(commands.Connection.TuneOk(tune.channel_max, self.frame_max, int(beat)))
        self._say(commands.Connection.Open(address.virtual_host))
        await self._next(commands.Connection.OpenOk)
        self._beat = beat
        if beat:
            self._timer = self.loop.call_later(beat / 4, self._check_beat)

    async def channel(self, *, confirms: bool = False) -> Channel:
        """Open a channel.

        Raises:
            Disconnected: The connection is gone.
        """
        if self.error is not None:
            raise Disconnected(str(self.error))
        if self._free:
            number = self._free.pop()
        else:
            self._numbers += 1
            number = self._numbers
        channel = self._channels[number] = Channel(self, number)
        await channel.call(commands.Channel.Open())
        if confirms:
            await channel.call(commands.Confirm.Select())
        return channel

    def forget(self, number: int) -> None:
        """Free the number of a channel that is closed on both sides."""
        if self._channels.pop(number, None) is not None:
            self._free.append(number)

    def write(self, data: bytes) -> None:
        """Send bytes, which must be whole frames."""
        if self.error is None:
            self._said = self.loop.time()
            self._put(data)

    def fail(self, error: Exception) -> None:
        """Give the connection up."""
        if self.error is not None:
            return
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        for channel in list(self._channels.values()):
            channel.fail(error)
        self._held_up.clear()
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_exception(error)
        if self._transport is not None:
            self._transport.abort()
        if not self.closed.done():
            self.closed.set_result(None)

    async def close(self) -> None:
        """Say good-bye and disconnect. Never raises."""
        if self.error is None and self._transport is not None:
            try:
                self._say(commands.Connection.Close(200, "", 0, 0))
                async with asyncio.timeout(1.0):
                    await self._next(commands.Connection.CloseOk)
            except (Disconnected, Refused, TimeoutError):
                pass  # then it is closed without
        self.fail(Disconnected("the connection was closed"))

    async def _next(self, kind: type[Frame]) -> Any:
        self._greeting = self.loop.create_future()
        if self.error is not None:
            raise self.error
        reply = await self._greeting
        if not isinstance(reply, kind):
            raise Disconnected(f"{reply.name} came, and not {kind.name}")
        return reply

    def _say(self, method: Frame) -> None:
        self._put(frame.marshal(method, 0))

    def _put(self, data: bytes) -> None:
        assert self._transport is not None  # connected
        if self._paused:
            self._held_up.append(data)
        else:
            self._transport.write(data)

    def _check_beat(self) -> None:
        now = self.loop.time()
        if now - self._heard > 2 * self._beat:
            self.fail(Silent("the server gave no sign of life"))
            return
        if now - self._said >= self._beat / 2:
            self._said = now
            self._put(_BEAT)
        self._timer = self.loop.call_later(self._beat / 4, self._check_beat)

    def _control(self, payload: bytes) -> None:
        method = read_method(payload)
        if isinstance(method, commands.Connection.Close):
            self._say(commands.Connection.CloseOk())
            self.fail(Refused(int(method.reply_code or 0), str(method.reply_text)))
        elif isinstance(method, commands.Connection.Blocked):
            self.blocked = method.reason
            for waiting in self.on_blocked:
                if not waiting.done():
                    waiting.set_result(None)
        elif isinstance(method, commands.Connection.Unblocked):
            self.blocked = None
        elif self._greeting is not None and not self._greeting.done():
            self._greeting.set_result(method)

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # of uvloop it is no such instance

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        buffer = self._buffer
        buffer += data
        place, end = 0, len(buffer)
        view = bytes(buffer)
        while end - place >= 8 and self.error is None:
            kind, number, size = frame_head.unpack_from(view, place)
            if view[place : place + 4] == b"AMQP":
                self.fail(Refused(505, "it speaks another version of AMQP"))
                return
            until = place + 7 + size
            if end <= until:
                break
            if kind != HEARTBEAT:
                self._frame(kind, number, view[place + 7 : until])
            place = until + 1
        del buffer[:place]

    def _frame(self, kind: int, number: int, payload: bytes) -> None:
        if number == 0:
            self._control(payload)
            return
        channel = self._channels.get(number)
        if channel is not None:
            channel.receive(kind, payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(Disconnected(str(exc) if exc else "the server closed the connection"))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._held_up:
            packed, self._held_up = b"".join(self._held_up), []
            assert self._transport is not None  # connected
            self._transport.write(packed)


async def connect(address: Address) -> Wire:
    """Return a connection that is open.

    Raises:
        Refused: The server refuses the user, the password or the virtual host.
        Disconnected: It cannot be reached, or did not answer in time.
    """
    loop = asyncio.get_running_loop()
    wire = Wire(address.timeout)
    try:
        async with asyncio.timeout(address.connect_timeout):
            await loop.create_connection(
                lambda: wire, address.host, address.port, ssl=address.ssl_context
            )
            await wire.open(address)
    except TimeoutError:
        wire.fail(Silent("no answer to the greeting in time"))
        raise Silent("no answer to the greeting in time") from None
    except ssl.SSLCertVerificationError as error:
        raise Refused(
            403, f"its certificate is not to be trusted: {error.verify_message}"
        ) from error
    except OSError as error:
        raise Disconnected(str(error)) from error
    except BaseException:
        wire.fail(Disconnected("it was not opened"))
        raise
    return wire
