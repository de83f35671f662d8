"""What a consumer holds, and how it goes: to who fetches, back to its queue, or settled.

What goes back is published once more, and acknowledged when that is safe. In between it may fail,
and nothing may be forgotten then: as long as the connection stands, the server gives what is held
to nobody else.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Collection, Container, Mapping, Sequence

from pamqp.commands import Basic

from aiotaskq.contract.message import SUSPECT, Delivery
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.rabbitmq.channel import (
    Channel,
    Confirmation,
    Disconnected,
    Publication,
    Refused,
)
from aiotaskq.drivers.rabbitmq.items import Item, delay_of, hops, write
from aiotaskq.drivers.rabbitmq.link import Link
from aiotaskq.drivers.rabbitmq.presence import Presence
from aiotaskq.errors import Unavailable


class Stock:
    """All that came over the channel of a consumer and was not acknowledged yet.

    Args:
        link: For what is published.
        consumer_id: Of the consumer.

    Attributes:
        channel: Over which it came.
        held: All of it, by tag.
        came: What of it was not yet looked at.
        back: What of it could not be put back yet, by tag, as it is to be published.
        spare: What of it may be handed out.
    """

    def __init__(self, link: Link, consumer_id: str) -> None:
        self._link = link
        self._names = link.names
        self._id = consumer_id
        # What was published in whose place while that is not acknowledged, and what became of it.
        self._attempts: dict[int, tuple[Publication, list[Confirmation]]] = {}
        self._settling = asyncio.Lock()
        self.channel: Channel | None = None
        self.held: dict[int, Item] = {}
        self.came: list[Item] = []
        self.back: dict[int, Publication] = {}
        self.spare: deque[Delivery] = deque()

    @property
    def lingers(self) -> bool:
        """Whether there is something that nobody was given."""
        return bool(self.came or self.back or self.spare)

    @property
    def isolates(self) -> bool:
        """Whether what is spare has to be handed out alone."""
        return bool(self.spare) and self.spare[0].crashes >= SUSPECT

    def counts(self) -> dict[str, int]:
        """Return how many messages it holds, by queue."""
        return dict(Counter(item.queue for item in list(self.held.values())))

    def handed_out(self) -> set[str]:
        """Return the ids of what somebody was given and has not settled."""
        waits = {
            *self.back,
            *(one.tag for one in self.came),
            *(one.receipt[1] for one in self.spare),
        }
        return {item.id for tag, item in self.held.items() if tag not in waits}

    def hand_out(self, limit: int, cancelled: Container[str]) -> list[Delivery]:
        """Take what is spare, up to so many; of suspects one. What was cancelled since goes."""
        if any(one.id in cancelled for one in self.spare):
            self._ack([one.receipt[1] for one in self.spare if one.id in cancelled])
            self.spare = deque(one for one in self.spare if one.id not in cancelled)
        count = 1 if self.isolates else min(limit, len(self.spare))
        return [self.spare.popleft() for _ in range(count)]

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Have what was handed out for the next who asks, as nobody got it."""
        self.spare.extendleft(reversed(deliveries))

    # --- putting back ---------------------------------------------------------------------------

    async def sort(self, presence: Presence) -> None:
        """Put what came where it belongs: to the spare ones, or back.

        What cannot go back now is in `back`, for the next call.

        Raises:
            Disconnected, Refused: All that is held is void.
        """
        came, self.came = self.came, []
        drop: list[int] = []
        keep: list[Item] = []
        for item in came:
            if item.tag not in self.held:
                continue  # at the end all goes back unsorted
            item.spared = presence.spared.count(item.life)
            if item.id in presence.cancelled:
                drop.append(item.tag)
            elif item.redelivered:
                # Its queue does not count: so it is counted here, before it does any harm.
                self.back[item.tag] = item.copy(self._names, more=1)
            elif item.crashes >= SUSPECT and not item.suspects:
                self.back[item.tag] = item.copy(self._names)
            else:
                keep.append(item)
        alone = len(keep) == 1 and len(self.held) == 1 + len(self.back) + len(drop)
        for item in keep:
            if item.suspects and not alone:
                self.back[item.tag] = item.copy(self._names)
            else:
                self.spare.append(item.delivery((self._id, item.tag)))
        self._ack(drop)
        try:
            await self._return(dict(self.back))
        except Unavailable:
            return  # there is no memory, say: what can be handed out must not wait for that

    async def return_spare(self) -> None:
        """Put back what is spare; what cannot go back now stays so.

        Raises:
            Unavailable: The server cannot be reached, or takes no more.
            Disconnected, Refused: All that is held is void.
        """
        items = [self.held[one.receipt[1]] for one in self.spare]
        copies = {item.tag: item.copy(self._names) for item in items}
        try:
            await self._return(copies)
        finally:
            # What was sent may be stored yet, to be run by others: then nobody may be given this.
            self.back |= {tag: one for tag, one in copies.items() if tag in self._attempts}
            self.spare = deque(one for one in self.spare if one.receipt[1] not in self.back)

    async def return_all(self) -> None:
        """Put back all that is held, but for what is being settled. Raises as `return_spare`."""
        async with self._settling:
            items = list(self.held.values())
            await self._return({item.tag: item.copy(self._names) for item in items})
            await self._round_trip()

    async def _return(self, copies: Mapping[int, Publication]) -> None:
        if not copies:
            return
        try:
            await self._link.need({self.held[tag].queue for tag in copies})
            await self._replace(copies)
        finally:
            if self.channel is not None and self.channel.error is None:
                self._ack([tag for tag in copies if self._is_replaced(tag)])
                self.spare = deque(one for one in self.spare if one.receipt[1] in self.held)

    async def _replace(self, copies: Mapping[int, Publication]) -> None:
        """Publish what takes the place of something, where that was not done before."""
        # A server without memory has what was sent in its buffers, and stores it later.
        attempts = [self._attempts[tag] for tag in copies if tag in self._attempts]
        unsure = {one for _, sent in attempts for one in sent if not one.done.done()}
        for confirmation in unsure:
            await self._link.finish(confirmation)
        missing = {tag: one for tag, one in copies.items() if not self._is_replaced(tag)}
        if not missing:
            return
        # The connection may be gone without a word, and all this in the hands of others.
        await self._round_trip()
        sent: list[Confirmation] = []
        try:
            await self._link.publish(list(missing.values()), sent)
        finally:
            if sent:
                self._attempts |= {tag: (one, sent) for tag, one in missing.items()}

    def _is_replaced(self, tag: int) -> bool:
        """Whether what was published in its place is safe."""
        if tag not in self._attempts:
            return False
        publication, sent = self._attempts[tag]
        return any(one.has_safe(publication) for one in sent)

    async def _round_trip(self) -> None:
        """An answer says that the server has read what was sent before, and that all is held."""
        assert self.channel is not None  # what is held came over it
        await self.channel.call(Basic.Qos(prefetch_count=1))

    def _ack(self, tags: Sequence[int]) -> None:
        if tags:
            assert self.channel is not None  # they came over it
            self.channel.ack(tags, among=list(self.held))
            for tag in tags:
                self.held.pop(tag, None)
                self.back.pop(tag, None)
                self._attempts.pop(tag, None)

    # --- settling -------------------------------------------------------------------------------

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        """Apply settlements; return the deliveries that were not held.

        Raises:
            Unavailable: The server cannot be reached.
        """
        async with self._settling:
            taken: dict[int, tuple[Item, Settlement]] = {}
            gone: list[Delivery] = []
            for settlement in batch:
                consumer, tag = settlement.delivery.receipt
                item = self.held.get(tag)
                if consumer != self._id or item is None or tag in taken or self._lost:
                    gone.append(settlement.delivery)
                else:
                    taken[tag] = item, settlement
            if self._lost:
                await self._link.ping()
                return gone
            try:
                await self._publish(taken.values())
                if self._lost:
                    raise Disconnected("the connection was lost")
                self._ack(list(taken))
                await self._round_trip()
            except (Disconnected, Refused) as error:
                # A channel that was refused something is closed, and the next call tells what is
                # void.
                self._link.explain(Disconnected(str(error)))
            return gone

    @property
    def _lost(self) -> bool:
        return self.channel is not None and self.channel.error is not None

    async def _publish(self, pairs: Collection[tuple[Item, Settlement]]) -> None:
        """Publish what takes the place of what is settled, before it goes."""
        now = time.time()
        batch: dict[int, Publication] = {}
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
                    # Not taken for what it was, of which losses are remembered; nor for what that
                    # was before.
                    anew = item.losses > 0 or bool(item.life[1])
                    batch[item.tag] = write(envelope, self._names, path, now, anew=anew)
                case Dead(reason=reason, details=details):
                    queues.add(item.queue)
                    batch[item.tag] = item.letter(self._names, reason, details)
                case Release():
                    queues.add(item.queue)
                    batch[item.tag] = item.copy(self._names)
        if batch:
            await self._link.need(queues, paths)
            await self._replace(batch)
