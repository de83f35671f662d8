"""What a consumer is on the side of its connections: what it takes, holds and gives back.

Its connection is its lease. What it holds is held by a channel of that connection, and when that
is gone the server hands it to others: so whatever was handed out over it is void then, for good.
It only consumes and acknowledges; what it publishes goes over a connection of its own, which the
server may stop reading from when it has no memory left.

A fetch asks how much waits where, and takes so much and no more: nothing flows in that was not
asked for. Only where nothing waits it consumes one message of each queue, to be woken by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Collection, Mapping, Sequence

from pamqp.commands import Basic

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import News
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.rabbitmq.calls import FetchCall
from aiotaskq.drivers.rabbitmq.channel import Channel, Content, Disconnected, Refused
from aiotaskq.drivers.rabbitmq.items import Item
from aiotaskq.drivers.rabbitmq.link import DIFFERS, Link
from aiotaskq.drivers.rabbitmq.presence import Presence
from aiotaskq.drivers.rabbitmq.stock import Stock
from aiotaskq.drivers.rabbitmq.wire import Wire, connect
from aiotaskq.errors import ConfigError, LeaseLost, Unavailable

_FEW = 8  # messages that are rather fetched one by one: no consuming has to begin and end then
_ARRIVAL = 0.01  # seconds in which what was counted comes, unless others were faster
_RECENTLY = 0.2  # seconds for which a count is good enough to take much less
_TOO_LONG = "timed out"  # says the server when its consumer_timeout is over
_GRACE = 0.03  # seconds in which what came between two calls may wait for the next
_RETRY = 1.0  # seconds until what could not be put back is tried again
_MOST_BACK = 100  # messages that wait for that while more is taken
_FAREWELL = 5.0  # seconds at the end for what is held to be handed back
_LONGEST_IDLE = 60.0  # seconds until an idle fetch looks by itself, as it never should have to


class Inside:
    """It lives on the event loop of the consumer's thread.

    Args:
        link: For what is published and declared; its own.
        consumer_id: Of the consumer.
        queues: In the order in which they are drained.
        about: What others are told of it.
    """

    def __init__(self, link: Link, consumer_id: str, queues: Sequence[str], about: bytes) -> None:
        self._link = link
        self._names = link.names
        self._id = consumer_id
        self._queues = list(queues)
        self._wire: Wire | None = None
        self._channel: Channel | None = None
        self._turn = asyncio.Lock()
        self._call: FetchCall | None = None  # that is under way
        self._look = b""  # declarations, packed, whose replies tell what waits
        self._stock = Stock(link, consumer_id)
        self._expected: dict[str, int] = {}  # to wait in each queue, as counted a moment ago
        self._counted_at = -_RECENTLY
        self._wanted = 0  # of what comes, until who waits is woken
        self._wake = asyncio.Event()
        self._ended: set[str] = set()  # tags of consuming that ended since the last count
        self._ended_before: set[str] = set()  # before it, but after the one before
        self._standing: dict[tuple[str, bool], str] = {}  # tags of what waits for one message
        stock = self._stock
        self._presence = Presence(
            link, consumer_id, queues, about, stock.held, stock.counts, stock.handed_out
        )
        self._bouncing: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Whether its connection is gone."""
        return self._wire is not None and self._wire.error is not None

    def holds(self) -> dict[str, int]:
        """Return how many messages it holds, by queue."""
        return self._stock.counts()

    async def open(self) -> None:
        """Connect, and be there."""
        await self._link.need(self._queues)
        try:
            wire = self._wire = await connect(self._link.address)
            # An answer may take long: what is held must not be given up for it.
            wire.patience = max(wire.patience, 2 * self._link.address.heartbeat)
            wire.closed.add_done_callback(lambda _: self._wake.set())
            await self._presence.open(wire)
            self._channel = self._stock.channel = await wire.channel()
            self._channel.on_cancelled = self._stop_consuming
            self._channel.on_failed = self._give_up
            self._look = self._channel.pack(
                *(self._names.declare_suspects(queue) for queue in self._queues),
                *(self._names.declare_ready(queue) for queue in self._queues),
            )
        except (Disconnected, Refused) as error:
            if self._wire is not None:
                self._wire.fail(Disconnected("it was not opened"))
            self._link.explain(error)

    # --- fetching -------------------------------------------------------------------------------

    def interrupt(self, call: FetchCall | None) -> None:
        """Have a call end soon. What it has taken is for the next one, or for others."""
        if call is not None:
            call.is_over = True
            if call is self._call:
                self._wake.set()
            elif call.taken:
                self._stock.keep(call.taken)
                call.taken = []
                self._bounce_soon()

    async def fill(self, call: FetchCall) -> Sequence[Delivery]:
        """Return as much as is wanted, or a suspect, or all there is; nothing if it is told to end.

        Raises:
            LeaseLost: The connection is gone, and the server is there.
            Unavailable: The server cannot be reached.
        """
        async with self._turn:
            self._call = call
            try:
                await self._fetch(call)
                if not call.is_over:
                    call.taken = self._stock.hand_out(call.limit, self._presence.cancelled)
                return call.taken
            except (Disconnected, Refused) as error:
                await self._check_lost()
                self._link.explain(error)
            finally:
                self._call = None
                if self._stock.lingers:
                    self._bounce_soon()  # what came beyond is for others, if nobody asks

    async def _fetch(self, call: FetchCall) -> None:
        """See that there is something spare."""
        loop = asyncio.get_running_loop()
        until = loop.time() + call.wait
        stock = self._stock
        await stock.sort(self._presence)
        while not call.is_over:
            channel = await self._living()
            await self._take_what_waits(channel, call.limit, call.order)
            left = until - loop.time()
            if stock.spare or left <= 0:
                return
            await self._idle(channel, call, min(left, _RETRY if stock.back else _LONGEST_IDLE))
            await stock.sort(self._presence)

    async def _take_what_waits(self, channel: Channel, limit: int, order: Sequence[str]) -> None:
        stock = self._stock
        while len(stock.spare) < limit and not stock.isolates and len(stock.back) < _MOST_BACK:
            room = limit - len(stock.spare)
            if self._expects(order[0], room):
                self._expected[order[0]] -= room
                await self._take(channel, {(order[0], False): room})
                await stock.sort(self._presence)
                continue
            suspects, ready = await self._count(channel)
            if not stock.held:
                queue = next((one for one in order if suspects[one]), None)
                if queue is not None:
                    await self._take(channel, {(queue, True): 1})
                    await stock.sort(self._presence)
                    continue
            plan: dict[tuple[str, bool], int] = {}
            for queue in order:
                count = min(room, ready[queue])
                if count:
                    plan[queue, False] = count
                    self._expected[queue] -= count
                    room -= count
            if not plan:
                return
            await self._take(channel, plan)
            await stock.sort(self._presence)

    def _expects(self, queue: str, count: int) -> bool:
        """Whether so many wait in a queue, by what was counted there a moment ago."""
        recently = asyncio.get_running_loop().time() - self._counted_at < _RECENTLY
        return recently and self._expected.get(queue, 0) >= max(2 * count, _FEW + 1)

    async def _count(self, channel: Channel) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Return how many suspects and others wait in each queue."""
        count = len(self._queues)
        ended, before = set(self._ended), set(self._ended_before)
        replies = await channel.send(self._look, 2 * count)
        self._ended -= ended
        self._ended_before = self._ended_before - before | ended
        for tag in before:
            channel.unlisten(tag)  # this was asked behind an answer that came behind their end
        counts = [reply.message_count for reply in replies]
        ready = dict(zip(self._queues, counts[count:], strict=True))
        self._expected = dict(ready)
        self._counted_at = asyncio.get_running_loop().time()
        return dict(zip(self._queues, counts[:count], strict=True)), ready

    async def _take(self, channel: Channel, plan: Mapping[tuple[str, bool], int]) -> None:
        """Take so many of each, or what there still is of it."""
        few = {key: count for key, count in plan.items() if count <= _FEW}
        many = {key: count for key, count in plan.items() if count > _FEW}
        for (queue, suspects), count in few.items():
            get = channel.pack(Basic.Get(queue=self._name(queue, suspects=suspects)))
            for content in await channel.send(get * count, count):
                if isinstance(content, Content):
                    self._receive(content, queue, suspects=suspects)
        if many:
            await self._take_many(channel, many)

    async def _take_many(self, channel: Channel, plan: Mapping[tuple[str, bool], int]) -> None:
        self._wanted = len(self._stock.came) + sum(plan.values())
        self._wake.clear()
        tags, packed = [], []
        for (queue, suspects), count in plan.items():
            tag, parts = self._consume(channel, queue, count, suspects=suspects)
            tags.append(tag)
            packed.append(parts)
        await channel.send(b"".join(packed), 2 * len(plan))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ARRIVAL):
                await self._wake.wait()
        if not self._wake.is_set():
            # What others were faster to take does not come. The queues are asked behind our
            # consuming; their answer may overtake what they sent before, the next cannot.
            await self._count(channel)
            await channel.call(Basic.Qos(prefetch_count=1))
        self._end_consuming(channel, tags)

    def _consume(
        self, channel: Channel, queue: str, count: int, *, suspects: bool
    ) -> tuple[str, bytes]:
        tag = uuid.uuid4().hex
        channel.listen(tag, lambda content: self._receive(content, queue, suspects=suspects))
        return tag, channel.pack(
            Basic.Qos(prefetch_count=count),
            Basic.Consume(queue=self._name(queue, suspects=suspects), consumer_tag=tag),
        )

    def _end_consuming(self, channel: Channel, tags: Collection[str]) -> None:
        """End consuming, where that was answered before: else the server trips over it."""
        if channel.error is None:
            channel.tell(channel.pack(*(Basic.Cancel(tag, nowait=True) for tag in tags)))
            self._ended.update(tags)

    def _receive(self, content: Content, queue: str, *, suspects: bool) -> None:
        item = Item(content, queue, suspects=suspects)
        self._stock.held[item.tag] = item
        self._stock.came.append(item)
        if len(self._stock.came) >= self._wanted:
            self._wake.set()

    async def _idle(self, channel: Channel, call: FetchCall, seconds: float) -> None:
        """Wait until a message comes, consuming one of each queue.

        Such consuming goes on until it has brought its message, over any number of calls: a message
        that is on its way while consuming ends would be counted by the server as one that was lost.
        """
        self._wanted = 1
        self._wake.clear()
        kinds = (False,) if self._stock.held else (False, True)
        packed, count = [], 0
        for key in [(queue, kind) for queue in self._queues for kind in kinds]:
            if key not in self._standing:
                packed.append(self._stand(channel, *key))
                count += 2
        if packed:
            await channel.send(b"".join(packed), count)
        if self._stock.came or call.is_over:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass  # nothing came

    def _stand(self, channel: Channel, queue: str, suspects: bool) -> bytes:
        tag, packed = self._consume(channel, queue, 1, suspects=suspects)
        self._standing[queue, suspects] = tag

        def receive(content: Content) -> None:
            # It has its one message, and nothing can be on its way to it.
            self._standing.pop((queue, suspects), None)
            self._end_consuming(channel, [tag])
            self._receive(content, queue, suspects=suspects)
            if self._call is None:
                self._bounce_soon()

        channel.listen(tag, receive)
        return packed

    def _bounce_soon(self) -> None:
        if self._bouncing is None or self._bouncing.done():
            self._bouncing = asyncio.get_running_loop().create_task(self._bounce())

    async def _bounce(self) -> None:
        """Put back what came while nobody fetches, if nobody does so soon."""
        pause = _GRACE
        while self._stock.lingers and not self.lost:
            await asyncio.sleep(pause)
            pause = _RETRY
            if self._call is not None:
                return  # its end begins this anew
            try:
                async with self._turn:
                    await self._stock.sort(self._presence)
                    await self._stock.return_spare()
            except Unavailable:
                continue  # it is spare for the next call, if one comes before the next attempt
            except (ConfigError, Disconnected, Refused):
                return  # the next call tells of it, or all goes back with the connection

    def _stop_consuming(self, tag: str) -> None:
        # The queue was deleted: the next look declares it anew.
        for key in [key for key, one in self._standing.items() if one == tag]:
            del self._standing[key]
        self._wake.set()

    def _name(self, queue: str, *, suspects: bool) -> str:
        return self._names.suspects(queue) if suspects else self._names.ready(queue)

    # --- settling -------------------------------------------------------------------------------

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        """Apply settlements; return the deliveries that were not held.

        Raises:
            Unavailable: The server cannot be reached.
        """
        gone = await self._stock.settle(batch)
        if not self._stock.held:
            self._wake.set()  # now a suspect may be fetched
        return gone

    # --- news -----------------------------------------------------------------------------------

    async def news(self) -> News:
        """Return what was cancelled since the last call, and whether suspects wait.

        Raises:
            LeaseLost: The connection is gone, and the server is there.
            Unavailable: The server cannot be reached.
        """
        try:
            channel = await self._living()
            suspects, _ = await self._count(channel)
        except (Disconnected, Refused) as error:
            await self._check_lost()
            self._link.explain(error)
        return News(cancelled=self._presence.news(), suspects=any(suspects.values()))

    # --- the end --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Hand back what is held, and be gone. Never raises."""
        try:
            async with asyncio.timeout(_FAREWELL):
                if not self.lost and self._channel is not None:
                    await self._hand_back()
                    await self._presence.leave()
        except (Unavailable, Disconnected, Refused, TimeoutError):
            pass  # then the server does it, and counts a crash
        await self._presence.losses.told()
        self._presence.close()
        if self._bouncing is not None:
            self._bouncing.cancel()
        if self._wire is not None:
            await self._wire.close()
        await self._link.close()

    async def _hand_back(self) -> None:
        self.interrupt(self._call)
        async with self._turn:
            await self._stock.return_all()

    async def _living(self) -> Channel:
        await self._check_lost()
        if self._channel is None:
            raise Disconnected("the consumer is not open")
        return self._channel

    def _give_up(self) -> None:
        """Be lost as a whole when the server closes the channel, and with it all that is held."""
        channel, wire = self._channel, self._wire
        if wire is not None and wire.error is None and channel is not None:
            error = channel.error
            if isinstance(error, Refused) and error.code == DIFFERS and _TOO_LONG in str(error):
                self._presence.losses.close()  # it counts, or such a task would run for ever
            wire.fail(error or Disconnected("its channel is gone"))
        self._wake.set()

    async def _check_lost(self) -> None:
        """Raise what the loss of the connection means, if it is lost."""
        if self.lost:
            await self._link.ping()
            assert self._wire is not None  # it was lost
            raise LeaseLost(f"{self._id} has lost its connection to RabbitMQ: {self._wire.error}")

    def abort(self) -> None:
        """Drop the connection, as the death of the process does. For test harnesses."""
        self._presence.losses.close()
        if self._wire is not None:
            self._wire.fail(Disconnected("it was aborted"))
