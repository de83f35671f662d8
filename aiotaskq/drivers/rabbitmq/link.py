"""What a driver says to the server besides consuming, over one connection at a time.

It connects when it is first used, and again after a failure. What a queue needs is declared before
its first use on each connection.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from pamqp.base import Frame
from pamqp.commands import Exchange, Queue

from aiotaskq.drivers.rabbitmq import items
from aiotaskq.drivers.rabbitmq.address import Address
from aiotaskq.drivers.rabbitmq.channel import (
    Channel,
    Confirmation,
    Disconnected,
    Publication,
    Refused,
)
from aiotaskq.drivers.rabbitmq.names import Names
from aiotaskq.drivers.rabbitmq.wire import Wire, connect
from aiotaskq.errors import ConfigError, Unavailable

logger = logging.getLogger("aiotaskq.rabbitmq")

_LOOK_EVERY = 0.25  # seconds, whether the server still takes what is not confirmed yet
_RECOVERY_PAUSE = 0.1  # seconds
_REFUSAL_PAUSES = (0.05, 0.2, 0.5)  # seconds

NOT_THERE, LOCKED, DIFFERS = 404, 405, 406
# 406 says more than that; of this kind it is of a queue or exchange that was made otherwise.
_MADE_OTHERWISE = "inequivalent arg"
_TOO_LARGE = re.compile(r"message size \d+ .*max size (\d+)")
_HOPELESS = frozenset({402, 403, 530})  # wrong password, no permission, no such virtual host


class Link:
    """Connects when it is first used, and again after a failure.

    Args:
        address: Where to.
        names: What queues are called.
        unavailable: What to raise when the server cannot be reached.
        full: What to raise when it takes no more messages.

    Attributes:
        connects: How often it has connected.
    """

    def __init__(
        self,
        address: Address,
        names: Names,
        unavailable: type[Unavailable],
        full: type[Unavailable],
    ) -> None:
        self.address = address
        self.names = names
        self.connects = 0
        self._unavailable = unavailable
        self._full = full
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[Wire] | None = None
        self._control: Channel | None = None
        self._publisher: Channel | None = None
        self._turn = asyncio.Lock()  # for the control channel, which dies of a refusal
        self._opening = asyncio.Lock()  # of the channel that is published on
        self._declaring = asyncio.Lock()
        self._declared: set[str] = set()  # on this connection
        self._introduced: set[str] = set()  # queues that are in the list of queues for good
        self._closed = False

    async def wire(self) -> Wire:
        """Return the connection, which is made if there is none.

        Raises:
            ConfigError: The server refuses the user, the password or the virtual host.
            Unavailable: It cannot be reached now.
        """
        wire = self._wire
        if wire is not None and wire.error is None:
            return wire
        if self._closed:
            raise self._unavailable(f"{self.address.url}: the driver is closed")
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if connecting.cancelled():  # by `close`, not by whoever cancels this task
                raise self._unavailable(f"{self.address.url}: the driver is closed") from None
            raise
        except (Disconnected, Refused) as error:
            self.explain(error)

    async def call(self, *methods: Frame) -> list[Any]:
        """Send methods and return their replies.

        Raises:
            Refused: The server refuses one. The connection stays.
            Unavailable: There was no answer.
        """
        async with self._turn:
            try:
                wire = await self.wire()
                if self._control is None or self._control.error is not None:
                    if self._control is not None:
                        await self._control.close()
                    self._control = await wire.channel()
                return await self._control.call(*methods)
            except asyncio.CancelledError:
                # Else a refusal of what was asked would close the channel under the next call.
                if self._control is not None:
                    self._control.abandon()
                    self._control = None
                raise
            except Disconnected as error:
                self.explain(error)

    async def publish(
        self, batch: Sequence[Publication], sent: list[Confirmation] | None = None
    ) -> None:
        """Publish messages; on return the server has them safe.

        Args:
            batch: What.
            sent: Is filled with what becomes of it, as may be known when this has failed.

        Raises:
            ConfigError: One is larger than the server takes.
            Unavailable: There was no answer, the server takes no more, or some lead to no queue.
        """
        for pause in _REFUSAL_PAUSES:
            confirmation = await self.start(batch)
            if sent is not None:
                sent.append(confirmation)
            refused = await self.finish(confirmation)
            if not refused:
                return
            # A quorum queue refuses while it has no leader yet, as when it was just made.
            batch = refused
            await asyncio.sleep(pause)
        raise self._full(f"{self.address.url} takes no more messages: a queue is full")

    async def start(self, batch: Sequence[Publication]) -> Confirmation:
        """Publish messages; `finish` waits for the server to have them safe."""
        wire = await self.wire()
        self._check_blocked(wire)
        try:
            return (await self._open_publisher(wire)).publish(batch)
        except (Disconnected, Refused) as error:
            self.explain(error)

    async def _open_publisher(self, wire: Wire) -> Channel:
        async with self._opening:
            if self._publisher is None or self._publisher.error is not None:
                self._publisher = await wire.channel(confirms=True)
            return self._publisher

    async def finish(
        self, confirmation: Confirmation, *, strict: bool = True
    ) -> Sequence[Publication]:
        """Wait until the server has a batch safe; return what it refuses.

        Args:
            confirmation: Of the batch.
            strict: Whether each message has to lead to a queue.
        """
        wire = self._wire
        assert wire is not None  # `start` made it
        try:
            async with asyncio.timeout(self.address.timeout):
                while not confirmation.done.done():
                    # What was sent lies in the server's own buffers, and may be stored later.
                    self._check_blocked(wire)
                    await asyncio.wait([confirmation.done], timeout=_LOOK_EVERY)
            confirmation.done.result()
        except TimeoutError:
            wire.fail(Disconnected("no answer in time"))
            raise self._unavailable(f"{self.address.url}: no answer in time") from None
        except (Disconnected, Refused) as error:
            self._see_that_it_fits(confirmation, error)
            self.explain(error)
        if confirmation.returned and strict:
            # Somebody deleted a queue: the next call makes it anew.
            self._declared.clear()
            self._introduced.clear()
            missing = ", ".join(sorted(confirmation.returned))
            raise self._unavailable(f"{self.address.url}: there is no queue {missing}")
        return confirmation.refused

    async def ping(self) -> None:
        """See that the server answers.

        Raises:
            Unavailable: It does not.
        """
        try:
            await self.call(Exchange.Declare(exchange="amq.direct", passive=True))
        except Refused as error:
            self.explain(error)

    # --- what has to be there -------------------------------------------------------------------

    async def need(
        self, queues: Iterable[str] = (), paths: Iterable[Sequence[items.Hop]] = ()
    ) -> None:
        """See that queues are there, and what delays messages on their way to them."""
        names = self.names
        missing = {name: one for one in queues if (name := names.ready(one)) not in self._declared}
        levels = {names.delay(hop.position, hop.digit): hop for path in paths for hop in path}
        levels = {name: hop for name, hop in levels.items() if name not in self._declared}
        if not missing and not levels and self._wire is not None and self._wire.error is None:
            return
        await self.wire()
        async with self._declaring:
            for queue in missing.values():
                await self._make(queue)
            for hop in levels.values():
                await self._make_delay(hop)

    async def declare(self, *declarations: Frame) -> list[Any]:
        """Declare, and say what is wrong where the server refuses it for good.

        Raises:
            ConfigError: There is a queue of that name which is made otherwise.
        """
        until = asyncio.get_running_loop().time() + self.address.timeout
        while True:
            try:
                return await self.call(*declarations)
            except Refused as error:
                # A server that has just started answers before all its queues are there.
                if "down or inaccessible" not in str(error) or (
                    asyncio.get_running_loop().time() >= until
                ):
                    self.explain(error)
            await asyncio.sleep(_RECOVERY_PAUSE)

    async def _make(self, queue: str) -> None:
        names = self.names
        if names.ready(queue) in self._declared:
            return
        if queue not in self._introduced:
            await self._introduce(queue)
        await self.declare(
            names.declare_dead(queue),
            Exchange.Declare(exchange=names.graves, exchange_type="direct", durable=True),
            Queue.Bind(
                queue=names.dead(queue), exchange=names.graves, routing_key=names.dead(queue)
            ),
            names.declare_suspects(queue),
            names.declare_ready(queue),
        )
        self._declared.add(names.ready(queue))

    async def _introduce(self, queue: str) -> None:
        """Put a queue on the list of queues, before it is there: AMQP itself has no such list."""
        names = self.names
        try:
            await self.call(Queue.Declare(queue=names.ready(queue), passive=True))
        except Refused as error:
            if error.code != NOT_THERE:
                self.explain(error)
            await self.declare(names.declare_stream(names.queues))
            await self.publish(
                [Publication("", names.queues, items.PLAIN_PROPERTIES, queue.encode())]
            )
        self._introduced.add(queue)

    async def _make_delay(self, hop: items.Hop) -> None:
        names = self.names
        if names.level(0) not in self._declared:
            await self._make_levels()
        await self.declare(
            names.declare_delay(hop.position, hop.digit, hop.milliseconds),
            Queue.Bind(
                queue=names.delay(hop.position, hop.digit),
                exchange=names.level(hop.position),
                arguments={"x-match": "all", f"{items.DIGIT}{hop.position}": hop.digit},
            ),
        )
        self._declared.add(names.delay(hop.position, hop.digit))

    async def _make_levels(self) -> None:
        """Make an exchange for each digit; where a digit is 0, it leads on to the next."""
        names, count = self.names, items.POSITIONS
        await self.declare(
            *(
                Exchange.Declare(exchange=names.level(one), exchange_type="headers", durable=True)
                for one in range(count)
            ),
            *(
                Exchange.Bind(
                    destination=names.level(one - 1),
                    source=names.level(one),
                    arguments={"x-match": "all", f"{items.DIGIT}{one}": 0},
                )
                for one in range(1, count)
            ),
        )
        self._declared.add(names.level(0))

    # --- connections ----------------------------------------------------------------------------

    def explain(self, error: Exception) -> NoReturn:
        """Raise what an error of the wire means."""
        url = self.address.url
        if isinstance(error, Refused):
            if error.code in _HOPELESS:
                raise ConfigError(f"{url} refuses the connection: {error}") from None
            if error.code == DIFFERS and _MADE_OTHERWISE in str(error):
                raise ConfigError(
                    f"{url} has a queue that was made otherwise: {error}. Delete it when it is"
                    " empty, or choose another prefix or the queue_type that it has"
                ) from None
            if error.code == LOCKED:
                raise self._unavailable(f"{url}: somebody else has it for himself: {error}")
        raise self._unavailable(f"{url}: {str(error) or type(error).__name__}") from error

    def _see_that_it_fits(self, confirmation: Confirmation, error: Exception) -> None:
        """Raise if this batch is why a channel was closed: others publish on it at the same time.

        Raises:
            ConfigError: One message is larger than the server takes.
        """
        found = _TOO_LARGE.search(str(error))
        if found is not None and confirmation.largest > int(found[1]):
            raise ConfigError(
                f"{self.address.url} takes no message of {confirmation.largest} bytes: its"
                f" max_message_size is {found[1]}"
            ) from None

    async def close(self) -> None:
        """Disconnect for good. Idempotent, never raises."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()

    async def _connect(self) -> Wire:
        try:
            # Read in a thread: certificates lie in files.
            if self.address.tls is not None:
                await asyncio.to_thread(lambda: self.address.ssl_context)
            wire = await connect(self.address)
            self._control = self._publisher = None
            self._declared.clear()
            self._wire = wire
            self.connects += 1
            return wire
        finally:
            self._connecting = None

    def _check_blocked(self, wire: Wire) -> None:
        if wire.blocked:
            raise self._full(
                f"{self.address.url} takes no messages at present: it has no memory or disk left"
            )
