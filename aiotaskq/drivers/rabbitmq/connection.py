"""Connections to RabbitMQ that come back after a failure, and the mapping of AMQP's errors.

Theory of operation
-------------------
A `RabbitConnection` has no transport, is connecting, has one, or is closed for good. The first call
connects, and so does the first call after a failure. All callers share one task that connects; a
caller that is cancelled leaves it running for the others, and only `close` ends it.

Over a transport there are two channels, each opened when it is first needed. Calls go over the
control channel, one after the other: a refusal closes the channel, and must reach the caller whose
call was refused. A cancelled call abandons the channel for the same reason. Publications go over
the publisher channel, any number at once.

Between any two steps the server may close the connection or one channel, stop reading because it
has no memory or disk left, or be killed. Then calls and confirmations fail with the channel.
`publish` may have stored any part of a batch when it fails; from `sent` its caller learns which
part is known to be stored.

Invariants: on return from `publish` the server has stored every message of the batch. Nothing is
assumed here about queues: `topology.py`, which remembers its declarations, gets a call of
`on_connected` for each new transport, and of `on_returned` when a queue has vanished.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self

from pamqp.base import Frame
from pamqp.commands import Exchange

from aiotaskq.backoff import Backoff
from aiotaskq.drivers.common.opening import SharedAttempt
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpConfirmation,
    AmqpDisconnected,
    AmqpError,
    AmqpPublication,
    AmqpRefused,
    RabbitChannel,
)
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.transport import RabbitTransport, connect
from aiotaskq.drivers.rabbitmq.url import RabbitAddress
from aiotaskq.errors import ConfigError, Unavailable

_CHECK_BLOCKED_EVERY = 0.25  # seconds, while confirmations are missing
_RECOVERY_PAUSE = 0.1  # seconds
_MOST_RETRIES = 5  # of publications that were refused
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5  # seconds before them

NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED = 404, 405, 406
# 406 has several meanings. With this text a queue or exchange has other arguments than declared.
_OTHER_ARGUMENTS = "inequivalent arg"
_TOO_LARGE = re.compile(r"message size \d+ .*max size (\d+)")
_HOPELESS = frozenset({402, 403, 530})  # wrong password, no permission, no such virtual host


class RabbitConnection:
    """A connection that is made when it is first used, and again after a failure.

    Args:
        address: The server.
        names: The names of queues.
        unavailable: The error to raise when the server cannot be reached.
        full: The error to raise when it takes no more messages.

    Attributes:
        on_connected: Called with each new transport, before anybody uses it.
        on_returned: Called when a message led to no queue, though it had to.
    """

    def __init__(
        self,
        address: RabbitAddress,
        names: RabbitNames,
        unavailable: type[Unavailable],
        full: type[Unavailable],
    ) -> None:
        self.address = address
        self.names = names
        self.on_connected: Callable[[], None] = lambda: None
        self.on_returned: Callable[[], None] = lambda: None
        self._unavailable = unavailable
        self._full = full
        self._transport: RabbitTransport | None = None
        self._connecting = SharedAttempt[RabbitTransport](self._closed_error)
        self._control: RabbitChannel | None = None
        self._publisher: RabbitChannel | None = None
        self._control_turn = asyncio.Lock()
        self._opening_publisher = asyncio.Lock()
        self._closed = False

    @property
    def is_connected(self) -> bool:
        """Return whether there is a transport that has not failed."""
        return self._transport is not None and self._transport.error is None

    async def transport(self) -> RabbitTransport:
        """Return the open transport, after connecting if there is none.

        Raises:
            ConfigError: The server refuses the user, the password or the virtual host.
            Unavailable: It cannot be reached now.
        """
        transport = self._transport
        if transport is not None and transport.error is None:
            return transport
        if self._closed:
            raise self._closed_error()
        try:
            return await self._connecting.result(self._connect)
        except AmqpError as error:
            self.raise_mapped(error)

    def _closed_error(self) -> Unavailable:
        return self._unavailable(f"{self.address.url}: the driver is closed")

    async def _connect(self) -> RabbitTransport:
        # In a thread: certificates are read from files.
        if self.address.tls is not None:
            await asyncio.to_thread(lambda: self.address.ssl_context)
        transport = await connect(self.address)
        self._control = self._publisher = None
        self._transport = transport
        self.on_connected()
        return transport

    async def opened(self) -> Self:
        """Connect, and return this connection, which is closed if that fails.

        Raises:
            ConfigError: The server refuses the user, the password or the virtual host.
            Unavailable: It cannot be reached now.
        """
        try:
            await self.transport()
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Disconnect for good. Idempotent, never raises."""
        self._closed = True
        await self._connecting.cancel()
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    # --- calls ----------------------------------------------------------------------------------

    async def call(self, *methods: Frame) -> list[Any]:
        """Send methods and return their replies.

        Raises:
            AmqpRefused: The server refuses one. The connection stays.
            Unavailable: There was no answer.
        """
        async with self._control_turn:
            try:
                transport = await self.transport()
                if self._control is None or self._control.error is not None:
                    self._control = await transport.open_channel()
                return await self._control.call(*methods)
            except asyncio.CancelledError:
                # A refusal of this call would close the channel under the next one.
                if self._control is not None:
                    self._control.abandon()
                    self._control = None
                raise
            except AmqpDisconnected as error:
                self.raise_mapped(error)

    async def declare(self, *declarations: Frame) -> list[Any]:
        """Declare queues or exchanges; return the replies.

        Raises:
            ConfigError: There is one of that name with other arguments.
            Unavailable: There was no answer.
        """
        until = asyncio.get_running_loop().time() + self.address.timeout
        while True:
            try:
                return await self.call(*declarations)
            except AmqpRefused as error:
                # A server that has just started answers before all its queues are there.
                if "down or inaccessible" not in str(error) or (
                    asyncio.get_running_loop().time() >= until
                ):
                    self.raise_mapped(error)
            await asyncio.sleep(_RECOVERY_PAUSE)

    async def ping(self) -> None:
        """Check that the server answers.

        Raises:
            Unavailable: It does not.
        """
        await self.declare(Exchange.Declare(exchange="amq.direct", passive=True))

    # --- publishing -----------------------------------------------------------------------------

    async def publish(
        self, batch: Sequence[AmqpPublication], sent: list[AmqpConfirmation] | None = None
    ) -> None:
        """Publish messages; on return the server has stored them.

        Args:
            batch: The messages.
            sent: Filled with the confirmations of each attempt, for use after a failure.

        Raises:
            ConfigError: One is larger than the server takes.
            Unavailable: There was no answer, the server takes no more, or some lead to no queue.
        """
        backoff: Backoff | None = None  # made when it is needed, which is hardly ever
        while True:
            confirmation = await self.begin_publish(batch)
            if sent is not None:
                sent.append(confirmation)
            refused = await self.finish_publish(confirmation)
            if not refused:
                return
            # A quorum queue refuses while it has no leader, as after it was made.
            backoff = backoff or Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
            if backoff.failures == _MOST_RETRIES:
                raise self._full(f"{self.address.url} takes no more messages: a queue is full")
            batch = refused
            await asyncio.sleep(backoff.next())

    async def begin_publish(self, batch: Sequence[AmqpPublication]) -> AmqpConfirmation:
        """Send messages; `finish_publish` waits until the server has stored them."""
        transport = await self.transport()
        self._check_blocked(transport)
        try:
            return (await self._open_publisher(transport)).publish(batch)
        except AmqpError as error:
            self.raise_mapped(error)

    async def _open_publisher(self, transport: RabbitTransport) -> RabbitChannel:
        async with self._opening_publisher:
            if self._publisher is None or self._publisher.error is not None:
                self._publisher = await transport.open_channel(confirms=True)
            return self._publisher

    async def finish_publish(
        self, confirmation: AmqpConfirmation, *, strict: bool = True
    ) -> Sequence[AmqpPublication]:
        """Wait until the server has stored a batch; return the messages that it refused.

        Args:
            confirmation: The confirmation of the batch.
            strict: Whether each message must lead to a queue.

        Raises:
            ConfigError: One is larger than the server takes.
            Unavailable: There was no answer, the server takes no more, or some lead to no queue.
        """
        transport = self._transport
        assert transport is not None  # `begin_publish` made it
        try:
            async with asyncio.timeout(self.address.timeout):
                while not confirmation.done.done():
                    # A blocked server has these messages in its buffers, and may store them later.
                    self._check_blocked(transport)
                    await asyncio.wait([confirmation.done], timeout=_CHECK_BLOCKED_EVERY)
            confirmation.done.result()
        except TimeoutError:
            transport.fail(AmqpDisconnected("no answer in time"))
            raise self._unavailable(f"{self.address.url}: no answer in time") from None
        except AmqpError as error:
            self._check_size(confirmation, error)
            self.raise_mapped(error)
        if confirmation.returned and strict:
            # Somebody deleted a queue: the next call declares it again.
            self.on_returned()
            missing = ", ".join(sorted(confirmation.returned))
            raise self._unavailable(f"{self.address.url}: there is no queue {missing}")
        return confirmation.refused

    def _check_blocked(self, transport: RabbitTransport) -> None:
        if transport.blocked:
            raise self._full(
                f"{self.address.url} takes no messages at present: it has no memory or disk left"
            )

    # --- errors ---------------------------------------------------------------------------------

    def raise_mapped(self, error: Exception) -> NoReturn:
        """Raise the error of the contract for one of a channel or a transport."""
        url = self.address.url
        if isinstance(error, AmqpRefused):
            if error.code in _HOPELESS:
                raise ConfigError(f"{url} refuses the connection: {error}") from None
            if error.code == PRECONDITION_FAILED and _OTHER_ARGUMENTS in str(error):
                raise ConfigError(
                    f"{url} has a queue that was made otherwise: {error}. Delete it when it is"
                    " empty, or choose another prefix or the queue_type that it has"
                ) from None
            if error.code == RESOURCE_LOCKED:
                raise self._unavailable(
                    f"{url}: another connection has exclusive use of it: {error}"
                )
        raise self._unavailable(f"{url}: {str(error) or type(error).__name__}") from error

    def _check_size(self, confirmation: AmqpConfirmation, error: Exception) -> None:
        """Raise if a message of this batch closed the channel, which other callers use as well.

        Raises:
            ConfigError: One message is larger than the server takes.
        """
        found = _TOO_LARGE.search(str(error))
        if found is not None and confirmation.largest > int(found[1]):
            raise ConfigError(
                f"{self.address.url} takes no message of {confirmation.largest} bytes: its"
                f" max_message_size is {found[1]}"
            ) from None
