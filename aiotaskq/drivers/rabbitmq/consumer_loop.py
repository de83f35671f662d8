"""The consumer in its thread: fetches messages, holds them, and hands them back at the end.

The connection of a consumer is its lease. It only consumes and acknowledges on it; publications go
over another connection, since the server may stop reading from a connection that publishes.

Theory of operation
-------------------
All of this runs on the event loop of the consumer's thread: calls come in between at awaits only.

Life. `open` connects, joins the membership, and opens the channel. From then on the consumer is
open until its transport fails, which happens once: by the network, by the server, by `close`, or
because its channel failed (`_on_channel_failed`), whose messages go to others at that moment. All
receipts are void then. Calls that follow raise `LeaseLost`, or `Unavailable` if the server cannot
be reached.

Fetching. A fetch counts the messages of its queues (the reply to a declaration has the count), and
takes as many as it wants, and no more: no message arrives that was not asked for. Few messages of a
queue are taken one by one, with `Basic.Get`; more by consuming with a prefetch count and cancelling
when all have arrived. Only a fetch that found nothing waits: it consumes one message of each queue.

A count may be out of date when it arrives, because others take messages too. So a consuming that
brings fewer than counted is ended after a short wait. While queues are long, a count is used for a
moment (`_expected`), which saves the next fetches a round trip.

Channels. When a queue is deleted under the consumer, it goes on with another channel (`_move`). An
earlier one stays open while a message is held on it, or awaited. It hears of the deletion from the
server, or from the list of queues where others have made the queue again within milliseconds.

Cancelling. RabbitMQ counts a message as lost if it is on its way while the consuming that brings it
is cancelled, and it fails when a consuming is cancelled before its beginning was answered. So a
consuming is cancelled only after the answer, and one that waits for a message is never cancelled:
it goes on until it has brought its one message (`_waiting`). For the same reason a fetch whose
caller is gone ends by a flag (`FetchCall.is_over`), not by cancelling its coroutine.

Unclaimed messages. A message may arrive while no fetch is under way, or beyond the limit of one, or
for a fetch whose caller is gone. The next fetch gets it. If none comes soon, `_return_unclaimed`
puts it back for others, and tries until it can.

Invariant: a fetch, a return of unclaimed messages, and closing exclude each other by `_turn`. What
may happen in between at any await: messages arrive, settlements are applied, `end_fetch` gives
messages back.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Collection, Mapping, Sequence

from pamqp.commands import Basic

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import ConsumerInfo, News
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpDisconnected,
    AmqpError,
    AmqpMessage,
    AmqpRefused,
    RabbitChannel,
)
from aiotaskq.drivers.rabbitmq.connection import PRECONDITION_FAILED, RabbitConnection
from aiotaskq.drivers.rabbitmq.consumer_thread import FetchCall
from aiotaskq.drivers.rabbitmq.lanes import ConsumerLanes
from aiotaskq.drivers.rabbitmq.membership import RabbitMembership
from aiotaskq.drivers.rabbitmq.messages import RabbitMessage
from aiotaskq.drivers.rabbitmq.names import Source
from aiotaskq.drivers.rabbitmq.topology import RabbitTopology
from aiotaskq.drivers.rabbitmq.transport import RabbitTransport, connect
from aiotaskq.drivers.rabbitmq.unacked import UnackedMessages
from aiotaskq.errors import ConfigError, LeaseLost, Unavailable

_FEW = 8  # messages that are taken one by one: no consuming has to begin and end for them
_ARRIVAL = 0.01  # seconds in which counted messages arrive, unless others were faster
_RECENTLY = 0.2  # seconds for which a count is good enough to take far fewer messages
_HELD_TOO_LONG = "timed out"  # in the server's text when its consumer_timeout is over
_UNCLAIMED_WAIT = 0.03  # seconds for which an unclaimed message waits for the next fetch
_RETRY = 1.0  # seconds between attempts to return a message
_MOST_RETURNING = 100  # messages that wait to be returned while more are taken
_CLOSING_WAIT = 5.0  # seconds in which messages are handed back at the end
_LONGEST_WAIT = 60.0  # seconds until a waiting fetch counts again, which should find nothing


class ConsumerLoop:
    """One incarnation of a worker, on the event loop of its own thread.

    Args:
        connection: The connection to publish on; this object closes it.
        consumer: The consumer, as others see it; its queues in the order of draining.

    Attributes:
        unacked: The messages that it holds.
    """

    def __init__(self, connection: RabbitConnection, consumer: ConsumerInfo) -> None:
        self._connection = connection
        self._consumer = consumer
        self._queues = list(consumer.queues)
        self._membership = RabbitMembership(connection)
        self._topology = RabbitTopology(connection, self._membership)
        self._wake = asyncio.Event()
        self._lanes = ConsumerLanes(
            *(connection.names, self._topology, self._membership, self._queues),
            on_stale=self._wake.set,
            on_made_again=self._on_queue_deleted,
        )
        self.unacked = UnackedMessages(connection, self._topology, self._membership, consumer.id)
        self._member = self._membership.member(consumer, self.unacked)
        self._transport: RabbitTransport | None = None
        self._channel: RabbitChannel | None = None
        self._turn = asyncio.Lock()
        self._call: FetchCall | None = None  # that is under way
        self._counted: list[Source] = []
        self._count_request = b""  # packed; its replies say how many messages wait there
        self._expected: dict[Source, int] = {}  # messages as counted a moment ago
        self._counted_at = -_RECENTLY
        self._wanted = 0  # arrived messages at which `_wake` is set
        self._ended: set[str] = set()  # tags of consuming that ended after the last count
        self._ended_before: set[str] = set()  # after the count before that one
        # Channels and tags that wait for their one message.
        self._waiting: dict[Source, tuple[RabbitChannel, str]] = {}
        self._earlier: list[RabbitChannel] = []  # before `_channel`
        self._vanished = False  # whether a queue has vanished under this channel
        self._returning: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Return whether its connection is gone."""
        return self._transport is not None and self._transport.error is not None

    async def open(self) -> None:
        """Connect, and become known to others.

        Raises:
            ConfigError: The server refuses the connection, or has a queue with other arguments.
            Unavailable: The server cannot be reached.
        """
        for error in (await self._topology.ensure((one, 0) for one in self._queues)).values():
            raise error
        address = self._connection.address
        try:
            transport = self._transport = await connect(address)
            # An answer may take long: the messages must not be given up for it.
            transport.answer_timeout = max(transport.answer_timeout, 2 * address.heartbeat)
            transport.closed.add_done_callback(lambda _: self._wake.set())
            await self._member.join(transport)
            await self._lanes.find()
            await self._move(transport)
            self._lanes.watch_deletions()
        except AmqpError as error:
            if self._transport is not None:
                self._transport.fail(AmqpDisconnected("it was not opened"))
            self._connection.raise_mapped(error)

    async def _move(self, transport: RabbitTransport) -> None:
        """Go on with a new channel; close earlier ones on which nothing is held or awaited."""
        channel = await transport.open_channel()
        channel.on_cancelled = self._on_queue_deleted
        channel.on_failed = lambda: self._on_channel_failed(channel)
        self._count_lanes(channel)
        if self._channel is not None:
            self._earlier.append(self._channel)
        self._channel = channel
        self.unacked.move_to(channel)

    async def _close_earlier(self) -> None:
        for channel in list(self._earlier):
            awaited = any(one is channel for one, _ in self._waiting.values())
            if not awaited and self.unacked.retire(channel):
                self._earlier.remove(channel)
                channel.on_failed = lambda: None
                await channel.close()

    # --- fetching -------------------------------------------------------------------------------

    def end_fetch(self, call: FetchCall | None) -> None:
        """Make a fetch end soon whose caller is gone; its deliveries become available again."""
        if call is not None:
            call.is_over = True
            if call is self._call:
                self._wake.set()
            elif call.taken:
                self.unacked.take_back(call.taken)
                call.taken = []
                self._return_unclaimed_soon()

    async def fetch(self, call: FetchCall) -> Sequence[Delivery]:
        """Return up to the wanted number of messages, or one suspect; none if it has to end.

        Raises:
            LeaseLost: The connection is gone, and the server is there.
            Unavailable: The server cannot be reached.
        """
        async with self._turn:
            self._call = call
            try:
                await self._make_available(call)
                if not call.is_over:
                    call.taken = self.unacked.hand_out(call.limit)
                return call.taken
            except AmqpError as error:
                await self._check_lost()
                self._connection.raise_mapped(error)
            finally:
                self._call = None
                if self.unacked.has_unclaimed:
                    self._return_unclaimed_soon()  # unless the next fetch comes first

    async def _make_available(self, call: FetchCall) -> None:
        """Wait until a message is available, or the time of the fetch is over."""
        loop = asyncio.get_running_loop()
        until = loop.time() + call.wait
        unacked = self.unacked
        await unacked.sort_arrived()
        while not call.is_over:
            channel = await self._open_channel()
            if self._vanished or self._earlier:
                channel = await self._on_vanished(channel)
            failed = self._lanes.stale and not await self._find_lanes(channel)
            await self._take_ready(channel, call.limit, call.order)
            left = until - loop.time()
            if unacked.available or left <= 0:
                return
            if self._lanes.stale and not failed:
                continue
            longest = _RETRY if unacked.returning or failed else _LONGEST_WAIT
            await self._wait_for_one(channel, call, min(left, longest))
            await unacked.sort_arrived()

    async def _find_lanes(self, channel: RabbitChannel) -> bool:
        """Add lanes that are new; return whether the server could be reached for that."""
        with contextlib.suppress(Unavailable):
            await self._lanes.find()
            self._count_lanes(channel)
            return True
        return False

    def _count_lanes(self, channel: RabbitChannel) -> None:
        self._counted = self._lanes.sources
        self._count_request = channel.pack(*map(self._lanes.declare, self._counted))
        self._expected = {}

    async def _take_ready(self, channel: RabbitChannel, limit: int, order: Sequence[str]) -> None:
        """Take messages that wait in the queues, suspects first, until the limit is reached."""
        unacked = self.unacked
        while (
            len(unacked.available) < limit
            and not unacked.next_is_suspect
            and len(unacked.returning) < _MOST_RETURNING
        ):
            room = limit - len(unacked.available)
            first = self._lanes.of[order[0]][0]
            if self._expects(first, room):
                self._expected[first] -= room
                await self._take(channel, {first: room})
                continue
            counts = await self._count(channel)
            if not unacked.held:
                queue = next((one for one in order if counts[one, None]), None)
                if queue is not None:
                    await self._take(channel, {(queue, None): 1})
                    continue
            plan = self._lanes.plan(counts, order, room)
            if not plan:
                return
            for source, count in plan.items():
                self._expected[source] -= count
            await self._take(channel, plan)

    def _expects(self, source: Source, count: int) -> bool:
        """Return whether a queue has that many messages, by a count of a moment ago."""
        recently = asyncio.get_running_loop().time() - self._counted_at < _RECENTLY
        return recently and self._expected.get(source, 0) >= max(2 * count, _FEW + 1)

    async def _count(self, channel: RabbitChannel) -> Mapping[Source, int]:
        """Return the number of messages that wait."""
        counted = self._counted
        ended, before = set(self._ended), set(self._ended_before)
        replies = await channel.send(self._count_request)
        self._ended -= ended
        self._ended_before = self._ended_before - before | ended
        # These ended before the last count was sent, and this one was sent after the answer to
        # that: nothing can arrive for them any more.
        for tag in before:
            channel.unlisten(tag)
        counts = dict(zip(counted, (reply.message_count for reply in replies), strict=True))
        self._expected = dict(counts)
        self._counted_at = asyncio.get_running_loop().time()
        return counts

    async def _take(self, channel: RabbitChannel, plan: Mapping[Source, int]) -> None:
        """Take a number of messages from each queue in turn, or as many as are left; sort them."""
        few = {source: count for source, count in plan.items() if count <= _FEW}
        many = {source: count for source, count in plan.items() if count > _FEW}
        for source, count in few.items():
            get = channel.pack(Basic.Get(queue=self._lanes.name(source)))
            for message in await channel.send(get * count):
                if isinstance(message, AmqpMessage):
                    self._receive(channel, message, source)
        if many:
            await self._take_many(channel, many)
        await self.unacked.sort_arrived(plan)

    async def _take_many(self, channel: RabbitChannel, plan: Mapping[Source, int]) -> None:
        self._wanted = len(self.unacked.arrived) + sum(plan.values())
        self._wake.clear()
        begun = [self._consume(channel, source, count) for source, count in plan.items()]
        await channel.send(b"".join(packed for _, packed in begun))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ARRIVAL):
                await self._wake.wait()
        if not self._wake.is_set():
            # Others have taken some of them. Two more answers must come before the end: that of the
            # queues may overtake messages that they sent before, that of the channel cannot.
            await self._count(channel)
            await channel.call(Basic.Qos(prefetch_count=1))
        self._end_consuming(channel, [tag for tag, _ in begun])

    def _consume(self, channel: RabbitChannel, source: Source, count: int) -> tuple[str, bytes]:
        """Return the tag of a consuming, and the packed methods that begin it."""
        tag = uuid.uuid4().hex
        channel.listen(tag, lambda message: self._receive(channel, message, source))
        return tag, channel.pack(
            Basic.Qos(prefetch_count=count),
            Basic.Consume(queue=self._lanes.name(source), consumer_tag=tag),
        )

    def _end_consuming(self, channel: RabbitChannel, tags: Collection[str]) -> None:
        """End consumings whose beginning was answered."""
        if channel.error is None:
            channel.send_unanswered(channel.pack(*(Basic.Cancel(tag, nowait=True) for tag in tags)))
            self._ended.update(tags)

    def _receive(self, channel: RabbitChannel, message: AmqpMessage, source: Source) -> None:
        self.unacked.add(RabbitMessage(message, *source), channel)
        if len(self.unacked.arrived) >= self._wanted:
            self._wake.set()

    async def _wait_for_one(self, channel: RabbitChannel, call: FetchCall, seconds: float) -> None:
        """Wait until a message arrives, consuming one of each queue."""
        self._wanted = 1
        self._wake.clear()
        busy = self.unacked.held
        sources = [one for one in self._counted if one[1] is not None or not busy]
        packed = [self._consume_one(channel, one) for one in sources if one not in self._waiting]
        if packed:
            await channel.send(b"".join(packed))
        if self.unacked.arrived or call.is_over:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _consume_one(self, channel: RabbitChannel, source: Source) -> bytes:
        """Return the packed methods that begin to wait for one message of a queue."""
        tag, packed = self._consume(channel, source, 1)
        self._waiting[source] = channel, tag

        def receive(message: AmqpMessage) -> None:
            # It has its one message, and no other can be on its way to it.
            if self._waiting.get(source) == (channel, tag):
                del self._waiting[source]
            self._end_consuming(channel, [tag])
            self._receive(channel, message, source)
            if self._call is None:
                self._return_unclaimed_soon()

        channel.listen(tag, receive)
        return packed

    # --- unclaimed messages ---------------------------------------------------------------------

    def _return_unclaimed_soon(self) -> None:
        if self._returning is None or self._returning.done():
            self._returning = asyncio.get_running_loop().create_task(self._return_unclaimed())

    async def _return_unclaimed(self) -> None:
        """Return messages to their queues that no fetch takes soon."""
        pause = _UNCLAIMED_WAIT
        while self.unacked.has_unclaimed and not self.lost:
            await asyncio.sleep(pause)
            pause = _RETRY
            if self._call is not None:
                return  # its end starts this again
            try:
                async with self._turn:
                    await self.unacked.sort_arrived()
                    await self.unacked.return_available()
            except Unavailable:
                continue  # they are for the next fetch, if one comes before the next attempt
            except (ConfigError, AmqpError):
                return  # the next fetch reports it, or all goes back with the connection

    # --- settling and news ----------------------------------------------------------------------

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        """Apply settlements; return the deliveries that were not held.

        Raises:
            Unavailable: The server cannot be reached.
        """
        gone = await self.unacked.settle(batch)
        if not self.unacked.held:
            self._wake.set()  # a fetch that waits may take a suspect now
        return gone

    async def news(self) -> News:
        """Return the ids cancelled since the last call, and whether suspects wait.

        Raises:
            LeaseLost: The connection is gone, and the server is there.
            Unavailable: The server cannot be reached.
        """
        try:
            channel = await self._open_channel()
            counts = await self._count(channel)
        except AmqpError as error:
            await self._check_lost()
            self._connection.raise_mapped(error)
        cancelled = self._member.take_cancelled()
        return News(cancelled=cancelled, suspects=any(counts[one, None] for one in self._queues))

    # --- the end --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Hand back everything that is held, and disconnect. Never raises."""
        try:
            async with asyncio.timeout(_CLOSING_WAIT):
                if not self.lost and self._channel is not None:
                    self.end_fetch(self._call)
                    async with self._turn:
                        await self.unacked.return_all()
                    await self._member.leave()
        except (Unavailable, AmqpError, TimeoutError):
            pass  # the server hands it back, and counts a crash
        await self._member.close()
        await self._membership.close()
        if self._returning is not None:
            self._returning.cancel()
        if self._transport is not None:
            await self._transport.close()
        await self._connection.close()

    async def _open_channel(self) -> RabbitChannel:
        await self._check_lost()
        if self._channel is None:
            raise AmqpDisconnected("the consumer is not open")
        return self._channel

    async def _check_lost(self) -> None:
        """Raise `LeaseLost` if the connection is gone, or `Unavailable` if the server is, too."""
        if self.lost:
            await self._connection.ping()
            assert self._transport is not None  # it was lost
            raise LeaseLost(
                f"{self._consumer.id} has lost its connection to RabbitMQ: {self._transport.error}"
            )

    def _on_queue_deleted(self, tag: str = "") -> None:
        # Without a tag others have made the queue again. Then the server has not told: it consumes
        # from the new queue by itself, and what that brings never arrives. So await nothing here.
        self._waiting = {key: one for key, one in self._waiting.items() if tag and one[1] != tag}
        self._vanished = True
        self._wake.set()

    async def _on_vanished(self, channel: RabbitChannel) -> RabbitChannel:
        """Return the channel to go on with after a queue has vanished.

        The server may take a new queue of the same name for the old one, as far as this channel
        is concerned: it then gives messages to this consumer that never arrive.
        """
        if self._vanished:
            assert self._transport is not None  # it is open
            self._vanished = False
            self._lanes.on_deleted()
            await self._move(self._transport)
            channel = await self._open_channel()
        await self._close_earlier()
        return channel

    def _on_channel_failed(self, channel: RabbitChannel) -> None:
        """Give up the connection: all that the channel held is with others now."""
        transport = self._transport
        if transport is not None and transport.error is None:
            error = channel.error
            refused = isinstance(error, AmqpRefused) and error.code == PRECONDITION_FAILED
            if refused and _HELD_TOO_LONG in str(error):
                # It counts as a crash, or a task that is held for longer than the server allows
                # would be tried for ever.
                self._member.losses.close()
            transport.fail(error or AmqpDisconnected("its channel is gone"))
        self._wake.set()

    async def abort(self) -> None:
        """Drop the connection, as the death of the process does. For test harnesses."""
        self._member.losses.close()
        if self._transport is not None:
            self._transport.fail(AmqpDisconnected("it was aborted"))
