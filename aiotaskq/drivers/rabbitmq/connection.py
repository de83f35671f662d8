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

The size of the largest body is not told by the server, which closes the channel of a larger one.
So a body larger than all those before goes over a channel of its own (`_publish_rest`).

Invariants: on return from `publish` the server has stored every message that is not refused.
Nothing is assumed here about queues: `topology.py`, which remembers its declarations, gets a call
of `on_connected` for each new transport, and of `on_returned` when a queue has vanished.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
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
from aiotaskq.errors import ConfigError, PayloadTooLarge, Unavailable

_CHECK_BLOCKED_EVERY = 0.25  # seconds, while confirmations are missing
_RECOVERY_PAUSE = 0.1  # seconds
_MOST_RETRIES = 5  # of publications that were refused
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5  # seconds before them

_SURELY_TAKEN = 1000  # bytes of a body; what is larger is tried first

ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED = 403, 404, 405, 406
# 406 has several meanings. With this text a queue or exchange has other arguments than declared.
_OTHER_ARGUMENTS = "inequivalent arg"
_TOO_LARGE = re.compile(r"message size \d+ .*max size (\d+)")
_HOPELESS = frozenset(
    {402, ACCESS_REFUSED, 530}
)  # wrong password, no permission, no such virtual host


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
        self._most: int | None = None  # bytes of the largest body, once the server has told it
        self._proven = _SURELY_TAKEN  # bytes of a body that it takes

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
        self._most, self._proven = None, _SURELY_TAKEN  # it may be another server
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
                with transport.expect_answer():
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
        self,
        batch: Sequence[AmqpPublication],
        sent: list[AmqpConfirmation] | None = None,
        *,
        strict: bool = True,
    ) -> Mapping[int, Exception]:
        """Publish messages; on return the server has stored all but those that are refused.

        Args:
            batch: The messages.
            sent: Filled with the confirmations of each attempt, for use after a failure.
            strict: Whether each message must lead to a queue.

        Returns:
            The reasons of refusals, by the position in the batch: `PayloadTooLarge` for a body
            that is larger than the server takes, or the error `full` for a queue that is full.

        Raises:
            Unavailable: There was no answer, the server takes no more, or some lead to no queue.
        """
        if not batch:
            return {}
        largest = max(len(one.body) for one in batch)
        if largest <= self._proven:  # so no body can close the channel
            confirmation = await self.begin_publish(batch)
            if sent is not None:
                sent.append(confirmation)
            error = await self._confirmed(confirmation, strict=strict)
            if error is None and not confirmation.refused:
                return {}
            attempts = [confirmation]
        else:
            attempts = []
        return await self._publish_rest(batch, [] if sent is None else sent, attempts, strict)

    async def _publish_rest(
        self,
        batch: Sequence[AmqpPublication],
        sent: list[AmqpConfirmation],
        attempts: list[AmqpConfirmation],
        strict: bool,
    ) -> Mapping[int, Exception]:
        """Publish what the attempts made so far have not stored, where something is out of order.

        A body that is larger than all that the server has taken goes alone, over a channel of its
        own: if it is too large the server closes the channel, and nobody could tell which of the
        messages before it were stored.
        """
        refused: dict[int, Exception] = {}
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        left = list(enumerate(batch))
        for attempt in attempts:
            known = attempt.is_stored if strict else attempt.is_taken
            left = [one for one in left if not known(one[1])]
            await asyncio.sleep(backoff.next())
        while left:
            nacked: list[tuple[int, AmqpPublication]] = []
            while left:
                some = list(itertools.takewhile(lambda one: self._is_proven(one[1]), left))
                some = some or left[:1]
                left = left[len(some) :]
                place, first = some[0]
                if too_large := self._too_large(first):
                    refused[place] = too_large
                    continue
                error, stored = await self._attempt([one for _, one in some], sent, strict)
                rest = [one for one in some if not stored(one[1])]
                if error is None:
                    nacked += rest
                else:  # the limit is known now, or it was a channel of many
                    left = rest + left
            if nacked and backoff.failures == _MOST_RETRIES:
                full = f"{self.address.url} takes no more messages: a queue is full"
                return refused | {place: self._full(full) for place, _ in nacked}
            # A quorum queue refuses while it has no leader, as after it was made.
            if nacked:
                await asyncio.sleep(backoff.next())
            left = nacked
        return refused

    async def _attempt(
        self, some: Sequence[AmqpPublication], sent: list[AmqpConfirmation], strict: bool
    ) -> tuple[AmqpRefused | None, Callable[[AmqpPublication], bool]]:
        """Publish messages that fit together; tell of each whether it is stored."""
        size = len(some[0].body)
        channel: RabbitChannel | None = None
        if size > self._proven:
            self._check_blocked(await self.transport())
            try:
                channel = await (await self.transport()).open_channel(confirms=True)
                confirmation = channel.publish(some)
            except AmqpError as error:
                self.raise_mapped(error)
        else:
            confirmation = await self.begin_publish(some)
        sent.append(confirmation)
        try:
            refusal = await self._confirmed(confirmation, strict=strict)
        finally:
            if channel is not None:
                channel.abandon()
        if refusal is None:
            # Rounded up, or nearly every message of a growing series would go alone.
            self._proven = max(self._proven, 1 << size.bit_length())
        # What led to no queue is nobody's, where that is no error.
        return refusal, confirmation.is_stored if strict else confirmation.is_taken

    def _is_proven(self, one: AmqpPublication) -> bool:
        return len(one.body) <= self._proven

    def _too_large(self, one: AmqpPublication) -> Exception | None:
        size, most = len(one.body), self._most
        if most is None or size <= most:
            return None
        return PayloadTooLarge(
            f"{self.address.url} takes no message of {size:,} bytes: its max_message_size is"
            f" {most}",
            size=size,
            limit=most,
        )

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

    async def finish_publish(self, confirmation: AmqpConfirmation) -> None:
        """Wait until the server has stored a batch, or refused some of it.

        Raises:
            Unavailable: There was no answer, or some lead to no queue.
        """
        refusal = await self._confirmed(confirmation, strict=True)
        if refusal is not None:
            self.raise_mapped(refusal)

    async def _confirmed(
        self, confirmation: AmqpConfirmation, *, strict: bool
    ) -> AmqpRefused | None:
        """Wait for the confirms of a batch; return the refusal of one message for its size.

        Raises:
            Unavailable: There was no answer, the server takes no more, or some lead to no queue.
        """
        transport = self._transport
        assert transport is not None  # `begin_publish` made it
        try:
            with transport.expect_answer():
                async with asyncio.timeout(self.address.timeout):
                    while not confirmation.done.done():
                        # A blocked server has these messages in its buffers, and may store them.
                        self._check_blocked(transport)
                        await asyncio.wait([confirmation.done], timeout=_CHECK_BLOCKED_EVERY)
            confirmation.done.result()
        except TimeoutError:
            transport.fail(AmqpDisconnected("no answer in time"))
            raise self._unavailable(f"{self.address.url}: no answer in time") from None
        except AmqpError as error:
            if isinstance(error, AmqpRefused):
                found = _TOO_LARGE.search(str(error))
                if found is not None:
                    self._most = self._proven = int(found[1])
                    return error
                if error.code == NOT_FOUND:
                    self.on_returned()  # an exchange was deleted
            self.raise_mapped(error)
        if confirmation.returned and strict:
            # Somebody deleted a queue: the next call declares it again.
            self.on_returned()
            missing = ", ".join(sorted(confirmation.returned))
            raise self._unavailable(f"{self.address.url}: there is no queue {missing}")
        return None

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
            if error.code == ACCESS_REFUSED and "access to" in str(error):
                raise ConfigError(
                    f"{url}: its user lacks a permission: {error}. Each feature needs other ones"
                ) from None
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
