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
import time
import uuid
from collections import Counter, deque
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any

from pamqp.commands import Basic

from aiotaskq.drivers.rabbitmq.calls import FetchCall
from aiotaskq.drivers.rabbitmq.channel import (
    Channel,
    Content,
    Disconnected,
    Publication,
    Refused,
)
from aiotaskq.drivers.rabbitmq.items import Item, delay_of, hops, write
from aiotaskq.drivers.rabbitmq.link import Link
from aiotaskq.drivers.rabbitmq.presence import Presence
from aiotaskq.drivers.rabbitmq.wire import Wire, connect
from aiotaskq.errors import LeaseLost, Unavailable
from aiotaskq.message import (
    SUSPECT,
    Again,
    Dead,
    Delivery,
    Done,
    News,
    Release,
    Settlement,
)

_FEW = 8  # messages that are rather fetched one by one: no consuming has to begin and end then
_ARRIVAL = 0.01  # seconds in which what was counted comes, unless others were faster
_RECENTLY = 0.2  # seconds for which a count is good enough to take much less
_GRACE = 0.03  # seconds in which what came between two calls may wait for the next
_FAREWELL = 5.0  # seconds at the end for what is held to be handed back
_LONGEST_IDLE = 60.0  # seconds until an idle fetch looks by itself, as it never should have to


class Inside:
    """It lives on the event loop of the consumer's thread.

    Args:
        link: For what is published and declared; its own.
        consumer_id: Of the consumer.
        queues: In the order in which they are drained.
        about: What others are told of it.

    Attributes:
        spare: What was taken and not yet returned; the other thread takes it from here.
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
        self._held: dict[int, Item] = {}  # by tag, handed out or spare
        self._came: list[Item] = []  # and not yet looked at
        self._expected: dict[str, int] = {}  # to wait in each queue, as counted a moment ago
        self._counted_at = -_RECENTLY
        self._wanted = 0  # of what comes, until who waits is woken
        self._wake = asyncio.Event()
        self._standing: dict[tuple[str, bool], str] = {}  # tags of what waits for one message
        self._presence = Presence(link, consumer_id, queues, about, self._held, self.holds)
        self._tasks: set[asyncio.Task[None]] = set()
        self.spare: deque[Delivery] = deque()

    @property
    def lost(self) -> bool:
        """Whether its connection is gone."""
        return self._wire is not None and self._wire.error is not None

    def holds(self) -> dict[str, int]:
        """Return how many messages it holds, by queue."""
        return dict(Counter(item.queue for item in list(self._held.values())))

    async def open(self) -> None:
        """Connect, and be there."""
        await self._link.need(self._queues)
        try:
            wire = self._wire = await connect(self._link.address)
            # An answer may take long: what is held must not be given up for it.
            wire.patience = max(wire.patience, 2 * self._link.address.heartbeat)
            wire.closed.add_done_callback(lambda _: self._wake.set())
            await self._presence.open(wire)
            self._channel = await wire.channel()
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
        """Have a call end soon."""
        if call is not None:
            call.is_over = True
            if call is self._call:
                self._wake.set()

    async def fill(self, call: FetchCall) -> None:
        """See that there is something spare: as much as is wanted, or a suspect, or all there is.

        Raises:
            LeaseLost: The connection is gone, and the server is there.
            Unavailable: The server cannot be reached.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + call.wait
        async with self._turn:
            self._call = call
            try:
                await self._sort()
                while not call.is_over:
                    channel = await self._living()
                    await self._take_what_waits(channel, call.limit, call.order)
                    left = until - loop.time()
                    if self.spare or left <= 0:
                        return
                    await self._idle(channel, call, min(left, _LONGEST_IDLE))
                    await self._sort()
            except (Disconnected, Refused) as error:
                await self._check_lost()
                self._link.explain(error)
            finally:
                self._call = None
                if self._came or len(self.spare) > (1 if self._isolates() else call.limit):
                    self._start(self._bounce())  # what came beyond is for others, if nobody asks

    async def _take_what_waits(self, channel: Channel, limit: int, order: Sequence[str]) -> None:
        while len(self.spare) < limit and not self._isolates():
            room = limit - len(self.spare)
            if self._expects(order[0], room):
                self._expected[order[0]] -= room
                await self._take(channel, {(order[0], False): room})
                await self._sort()
                continue
            suspects, ready = await self._count(channel)
            if not self._held:
                queue = next((one for one in order if suspects[one]), None)
                if queue is not None:
                    await self._take(channel, {(queue, True): 1})
                    await self._sort()
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
            await self._sort()

    def _expects(self, queue: str, count: int) -> bool:
        """Whether so many wait in a queue, by what was counted there a moment ago."""
        recently = asyncio.get_running_loop().time() - self._counted_at < _RECENTLY
        return recently and self._expected.get(queue, 0) >= max(2 * count, _FEW + 1)

    def _isolates(self) -> bool:
        return bool(self.spare) and self.spare[0].crashes >= SUSPECT

    async def _count(self, channel: Channel) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Return how many suspects and others wait in each queue."""
        count = len(self._queues)
        replies = await channel.send(self._look, 2 * count)
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
        self._wanted = len(self._came) + sum(plan.values())
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

    def _receive(self, content: Content, queue: str, *, suspects: bool) -> None:
        item = Item(content, queue, suspects=suspects)
        self._held[item.tag] = item
        self._came.append(item)
        if len(self._came) >= self._wanted:
            self._wake.set()

    async def _idle(self, channel: Channel, call: FetchCall, seconds: float) -> None:
        """Wait until a message comes, consuming one of each queue.

        Such consuming goes on until it has brought its message, over any number of calls: a message
        that is on its way while consuming ends would be counted by the server as one that was lost.
        """
        self._wanted = 1
        self._wake.clear()
        kinds = (False,) if self._held else (False, True)
        packed, count = [], 0
        for key in [(queue, kind) for queue in self._queues for kind in kinds]:
            if key not in self._standing:
                packed.append(self._stand(channel, *key))
                count += 2
        if packed:
            await channel.send(b"".join(packed), count)
        if self._came or call.is_over:
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
                self._start(self._bounce())

        channel.listen(tag, receive)
        return packed

    async def _bounce(self) -> None:
        """Put back what came while nobody fetches, if nobody does so soon."""
        await asyncio.sleep(_GRACE)
        if self._call is not None:
            return
        async with self._turn:
            try:
                await self._sort()
                while self.spare:
                    item = self._held[self.spare.popleft().receipt[1]]
                    await self._replace([item.copy(self._names)])
                    self._ack([item.tag])
            except (Unavailable, Disconnected, Refused):
                return  # then it is spare for the next call, or goes back with the connection

    def _stop_consuming(self, tag: str) -> None:
        # The queue was deleted: the next look declares it anew.
        for key in [key for key, one in self._standing.items() if one == tag]:
            del self._standing[key]
        self._wake.set()

    def _name(self, queue: str, *, suspects: bool) -> str:
        return self._names.suspects(queue) if suspects else self._names.ready(queue)

    async def _sort(self) -> None:
        """Put what came where it belongs: to the spare ones, or back."""
        came, self._came = self._came, []
        back: list[tuple[Item, Publication]] = []
        drop: list[int] = []
        keep: list[Item] = []
        for item in came:
            item.spared = self._presence.spared.count(item.life)
            if item.id in self._presence.cancelled:
                drop.append(item.tag)
            elif item.redelivered:
                # Its queue does not count: so it is counted here, before it does any harm.
                back.append((item, item.copy(self._names, more=1)))
            elif item.crashes >= SUSPECT and not item.suspects:
                back.append((item, item.copy(self._names)))
            else:
                keep.append(item)
        alone = len(keep) == 1 and len(self._held) == 1 + len(back) + len(drop)
        for item in keep:
            if item.suspects and not alone:
                back.append((item, item.copy(self._names)))
            else:
                self.spare.append(item.delivery((self._id, item.tag)))
        await self._replace([copy for _, copy in back])
        self._ack([*drop, *(item.tag for item, _ in back)])

    async def _replace(self, copies: Sequence[Publication]) -> None:
        if copies:
            await self._link.publish(copies)

    def _ack(self, tags: Sequence[int]) -> None:
        if tags:
            assert self._channel is not None  # they came over it
            self._channel.ack(tags, among=list(self._held))
            for tag in tags:
                self._held.pop(tag, None)

    # --- settling -------------------------------------------------------------------------------

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        """Apply settlements; return the deliveries that were not held.

        Raises:
            Unavailable: The server cannot be reached.
        """
        taken: dict[int, tuple[Item, Settlement]] = {}
        gone: list[Delivery] = []
        for settlement in batch:
            consumer, tag = settlement.delivery.receipt
            item = self._held.get(tag)
            if consumer != self._id or item is None or tag in taken or self.lost:
                gone.append(settlement.delivery)
            else:
                taken[tag] = item, settlement
        if self.lost:
            await self._link.ping()
            return gone
        try:
            await self._publish(taken.values())
            assert self._channel is not None  # open
            if self.lost:
                raise Disconnected("the connection was lost")
            self._ack(list(taken))
            # An answer says that the server has read what was acknowledged.
            await self._channel.call(Basic.Qos(prefetch_count=1))
        except (Disconnected, Refused) as error:
            # A channel that was refused something is closed, and the next call tells what is void.
            self._link.explain(Disconnected(str(error)))
        if not self._held:
            self._wake.set()  # now a suspect may be fetched
        return gone

    async def _publish(self, pairs: Collection[tuple[Item, Settlement]]) -> None:
        """Publish what takes the place of what is settled, before it goes."""
        now = time.time()
        batch: list[Publication] = []
        queues: set[str] = set()
        paths = []
        # What is released goes behind what waits, in its old order.
        for item, settlement in pairs:
            match settlement:
                case Done():
                    continue
                case Again(envelope=envelope):
                    path = hops(delay_of(envelope, now))
                    queues.add(envelope.queue)
                    paths.append(path)
                    anew = item.losses > 0
                    batch.append(write(envelope, self._names, path, now, anew=anew))
                case Dead(reason=reason, details=details):
                    queues.add(item.queue)
                    batch.append(item.letter(self._names, reason, details))
                case Release():
                    queues.add(item.queue)
                    batch.append(item.copy(self._names))
        if batch:
            await self._link.need(queues, paths)
            await self._link.publish(batch)

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
        for task in self._tasks:
            task.cancel()
        if self._wire is not None:
            await self._wire.close()
        await self._link.close()

    async def _hand_back(self) -> None:
        self.interrupt(self._call)
        async with self._turn:
            items = list(self._held.values())
            await self._replace([item.copy(self._names) for item in items])
            self._ack([item.tag for item in items])
            assert self._channel is not None  # open
            await self._channel.call(Basic.Qos(prefetch_count=1))

    async def _living(self) -> Channel:
        await self._check_lost()
        if self._channel is None:
            raise Disconnected("the consumer is not open")
        return self._channel

    def _give_up(self) -> None:
        """Be lost as a whole when the server closes the channel, and with it all that is held."""
        channel, wire = self._channel, self._wire
        if wire is not None and wire.error is None and channel is not None:
            # As after the server's consumer_timeout: it counts, or such a task would run for ever.
            self._presence.losses.close()
            wire.fail(channel.error or Disconnected("its channel is gone"))
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

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
