"""The messages that a consumer has not acknowledged: handed out, returned to their queue, settled.

A message that returns to its queue uncounted is published once more, and acknowledged when the copy
is stored. The same goes for a retry or a dead letter, which takes the place of its message.

Theory of operation
-------------------
A message is held (`held`) from its arrival until it is acknowledged or the channel fails. While it
is held, the server gives it to nobody else; once its channel has failed, all that was held is void
and belongs to others. In between it is in one of these states:

- `arrived`: it was not sorted yet;
- `available`: it can be handed out;
- `returning`: it must go back to a queue as a copy, which could not be published yet;
- in none of the three: a worker has it.

`sort_arrived` moves messages from `arrived` on: cancelled ones are dropped, suspects that must be
handed out alone and messages that may be counted wrong return, all others become available.

Every step that publishes may fail halfway: the caller is cancelled, the server has no memory, the
connection is lost. The copy may then be stored or not. So `_attempts` keeps, for each message, the
publication in its place and its confirmations, until the message is acknowledged. Before it is
published again, unfinished confirmations are waited for, and a publication that is stored is not
repeated. Two invariants follow:

1. A message is acknowledged only after its copy, retry or dead letter is stored: nothing is lost.
2. A message whose copy may be stored is not handed out: others may have that copy.

Publishing goes over another connection, and the consumer's own may have ended without a sign. So a
round trip on the channel precedes each publication: an answer proves that everything is still held.
A loss right after it leaves a message and its copy; results before settlements, and the first final
outcome of an id stays, so the task may run twice and has one result.

`settle` and `return_all` exclude each other (`_settling`), so nothing that is being settled is
returned as well. `sort_arrived` and `return_available` touch only messages that no worker has, and
are called by one task at a time (`consumer_loop.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence

from pamqp.commands import Basic

from aiotaskq.contract.message import SUSPECT, Delivery
from aiotaskq.contract.settlement import Again, Dead, Done, Settlement
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpConfirmation,
    AmqpDisconnected,
    AmqpError,
    AmqpPublication,
    RabbitChannel,
)
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.delays import delay_of, hops
from aiotaskq.drivers.rabbitmq.membership import RabbitMembership
from aiotaskq.drivers.rabbitmq.messages import Lineage, RabbitMessage, publication_of
from aiotaskq.drivers.rabbitmq.names import Lane, Source
from aiotaskq.drivers.rabbitmq.topology import RabbitTopology
from aiotaskq.errors import BatchRefused, ConfigError, Unavailable

_TAGS = 2**48  # more than a channel gives


class UnackedMessages:
    """The messages that arrived on a consumer's channel and are not acknowledged.

    Args:
        connection: The connection to publish on.
        topology: Declares the queues that are published to.
        membership: Knows cancelled messages and losses that were no crashes.
        consumer_id: The consumer.

    Attributes:
        channel: The channel on which they arrive; None before the first `move_to`.
        held: All of them, by delivery tag. Tags of later channels are larger, by a multiple of
            `_TAGS`.
        arrived: Those that were not sorted yet.
        returning: The copies of those that could not be returned yet, by delivery tag.
        available: Those that can be handed out.
    """

    def __init__(
        self,
        connection: RabbitConnection,
        topology: RabbitTopology,
        membership: RabbitMembership,
        consumer_id: str,
    ) -> None:
        self._connection = connection
        self._names = connection.names
        self._topology = topology
        self._membership = membership
        self._id = consumer_id
        self._attempts: dict[int, tuple[AmqpPublication, list[AmqpConfirmation]]] = {}
        self._settling = asyncio.Lock()
        self._base = -_TAGS
        self._bases: dict[RabbitChannel, int] = {}  # channels, and what is added to their tags
        self.channel: RabbitChannel | None = None
        self.held: dict[int, RabbitMessage] = {}
        self.arrived: list[RabbitMessage] = []
        self.returning: dict[int, AmqpPublication] = {}
        self.available: deque[Delivery] = deque()

    @property
    def has_unclaimed(self) -> bool:
        """Return whether there is a message that no worker has."""
        return bool(self.arrived or self.returning or self.available)

    @property
    def next_is_suspect(self) -> bool:
        """Return whether the next message must be handed out alone."""
        return bool(self.available) and self.available[0].crashes >= SUSPECT

    def move_to(self, channel: RabbitChannel) -> None:
        """Go on with a new channel; held messages stay on the channel where they arrived."""
        self._base += _TAGS
        self._bases[channel] = self._base
        self.channel = channel

    def retire(self, channel: RabbitChannel) -> bool:
        """Give an earlier channel up, unless a message is held on it; return whether it is."""
        base = self._bases[channel]
        if any(base < tag < base + _TAGS for tag in self.held):
            return False
        del self._bases[channel]
        return True

    def add(self, message: RabbitMessage, channel: RabbitChannel) -> None:
        """Take in a message that has arrived on a channel."""
        message.tag += self._bases[channel]
        self.held[message.tag] = message
        self.arrived.append(message)

    def lineages(self) -> set[Lineage]:
        """Return the messages that are held."""
        return {message.lineage for message in self.held.values()}

    def counts(self) -> dict[str, int]:
        """Return the number of messages that are held, by queue."""
        return dict(Counter(message.queue for message in list(self.held.values())))

    def handed_out_ids(self) -> set[str]:
        """Return the ids of the messages that a worker has."""
        unclaimed = {
            *self.returning,
            *(one.tag for one in self.arrived),
            *(one.receipt[1] for one in self.available),
        }
        return {message.id for tag, message in self.held.items() if tag not in unclaimed}

    def hand_out(self, limit: int) -> list[Delivery]:
        """Take up to `limit` available messages, or one suspect; drop those cancelled meanwhile."""
        cancelled = self._membership.cancelled
        if any(one.id in cancelled for one in self.available):
            self._ack([one.receipt[1] for one in self.available if one.id in cancelled])
            self.available = deque(one for one in self.available if one.id not in cancelled)
        count = 1 if self.next_is_suspect else min(limit, len(self.available))
        return [self.available.popleft() for _ in range(count)]

    def take_back(self, deliveries: Sequence[Delivery]) -> None:
        """Make deliveries available again that did not reach the worker."""
        self.available.extendleft(reversed(deliveries))

    # --- returning to the queues ----------------------------------------------------------------

    async def sort_arrived(self, order: Collection[Source] = ()) -> None:
        """Move messages on that have arrived; those that cannot return now stay in `returning`.

        Args:
            order: The sources that they were taken from together, and so came in any order; in the
                order in which their messages are handed out.

        Raises:
            AmqpError: The channel failed, and all that was held is void.
        """
        arrived, self.arrived = self.arrived, []
        if len(order) > 1:
            places = {source: place for place, source in enumerate(order)}
            arrived.sort(key=lambda one: places.get((one.queue, one.priority), 0))
        drop: list[int] = []
        keep: list[RabbitMessage] = []
        cancelled = self._membership.cancelled
        for message in arrived:
            if message.tag not in self.held:
                continue  # `return_all` has returned it unsorted
            if message.losses:
                message.harmless_losses = self._membership.harmless_losses(message.lineage)
            if message.id in cancelled:
                drop.append(message.tag)
            elif (copy := self._needed_copy(message)) is not None:
                self.returning[message.tag] = copy
            else:
                keep.append(message)
        alone = len(keep) == 1 and len(self.held) == 1 + len(self.returning) + len(drop)
        for message in keep:
            if message.from_suspects and not alone:
                self.returning[message.tag] = message.copy(self._names)
            else:
                self.available.append(message.delivery((self._id, message.tag)))
        self._ack(drop)
        await self._return_or_keep()

    async def _return_or_keep(self) -> None:
        try:
            refused = await self._return(dict(self.returning))
        except Unavailable:
            return  # the server has no memory, for example; available messages must not wait
        for tag, error in refused.items():
            if not isinstance(error, Unavailable):  # it can never return: so a worker gets it
                del self.returning[tag]
                self.available.append(self.held[tag].delivery((self._id, tag)))

    def _needed_copy(self, message: RabbitMessage) -> AmqpPublication | None:
        """Return the copy as which a message has to return at once; None: it need not."""
        if message.path:  # it has waited for a part of its delay
            return message.copy(self._names)
        if message.redelivered:
            # Its queue does not count losses: so it is counted before it can do any harm.
            return message.copy(self._names, more=1)
        if message.crashes >= SUSPECT and not message.from_suspects:
            return message.copy(self._names)
        return None

    async def return_available(self) -> None:
        """Return the available messages; those that cannot return now stay available.

        Raises:
            Unavailable: The server cannot be reached, or takes no more.
            AmqpError: The channel failed, and all that was held is void.
        """
        messages = [self.held[one.receipt[1]] for one in self.available]
        copies = {message.tag: message.copy(self._names) for message in messages}
        try:
            await self._return(copies)
        finally:
            # A copy that was sent may be stored, and run by others: invariant 2.
            self.returning |= {tag: one for tag, one in copies.items() if tag in self._attempts}
            self.available = deque(
                one for one in self.available if one.receipt[1] not in self.returning
            )

    async def return_all(self) -> None:
        """Return all that is held, after settlements under way. Raises as `return_available`."""
        async with self._settling:
            messages = list(self.held.values())
            await self._return({message.tag: message.copy(self._names) for message in messages})
            await self._round_trip()

    async def _return(self, copies: Mapping[int, AmqpPublication]) -> Mapping[int, Exception]:
        """Return messages as copies; return the reasons why some of them cannot."""
        if not copies:
            return {}
        try:
            messages = [self.held[tag] for tag in copies]
            await self._topology.ensure(
                {(one.queue, one.priority) for one in messages},
                [one.path for one in messages if one.path],
            )
            return await self._replace(copies)
        finally:
            if not self._lost:
                self._ack([tag for tag in copies if self._is_replaced(tag)])
                self.available = deque(one for one in self.available if one.receipt[1] in self.held)

    async def _replace(
        self, publications: Mapping[int, AmqpPublication]
    ) -> Mapping[int, Exception]:
        """Publish replacements of messages, except those that an earlier attempt has stored.

        Returns:
            The reasons of refusals, by the tag of the message.
        """
        # A server without memory has earlier attempts in its buffers, and may store them yet.
        attempts = [self._attempts[tag] for tag in publications if tag in self._attempts]
        unfinished = {one for _, sent in attempts for one in sent if not one.done.done()}
        for confirmation in unfinished:
            await self._connection.finish_publish(confirmation)
        missing = {tag: one for tag, one in publications.items() if not self._is_replaced(tag)}
        if not missing:
            return {}
        # The channel may be gone without a sign, and all these messages in the hands of others.
        await self._round_trip()
        sent: list[AmqpConfirmation] = []
        try:
            refused = await self._connection.publish(list(missing.values()), sent)
        finally:
            if sent:
                self._attempts |= {tag: (one, sent) for tag, one in missing.items()}
        tags = list(missing)
        return {tags[place]: error for place, error in refused.items()}

    def _is_replaced(self, tag: int) -> bool:
        """Return whether the replacement of a message is stored."""
        if tag not in self._attempts:
            return False
        publication, sent = self._attempts[tag]
        return any(one.is_stored(publication) for one in sent)

    async def _round_trip(self) -> None:
        """Wait for an answer: earlier frames were read, and every message is still held here."""
        for channel in list(self._bases):
            await channel.call(Basic.Qos(prefetch_count=1))

    def _ack(self, tags: Sequence[int]) -> None:
        if not tags:
            return
        for channel, base in self._bases.items():
            some = [tag - base for tag in tags if base < tag < base + _TAGS]
            if some:
                among = [tag - base for tag in self.held if base < tag < base + _TAGS]
                channel.ack(some, among)
        for tag in tags:
            self.held.pop(tag, None)
            self.returning.pop(tag, None)
            self._attempts.pop(tag, None)

    # --- settling -------------------------------------------------------------------------------

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        """Apply settlements; return the deliveries that were not held.

        Raises:
            BatchRefused: The messages in place of some can never be stored; the others are settled.
            Unavailable: The server cannot be reached; any part may have been applied.
        """
        async with self._settling:
            taken: dict[int, tuple[RabbitMessage, Settlement]] = {}
            places: dict[int, int] = {}
            gone: list[Delivery] = []
            for place, settlement in enumerate(batch):
                consumer, tag = settlement.delivery.receipt
                message = self.held.get(tag)
                if consumer != self._id or message is None or tag in taken or self._lost:
                    gone.append(settlement.delivery)
                else:
                    taken[tag] = message, settlement
                    places[tag] = place
            if self._lost:
                await self._connection.ping()
                return gone
            try:
                refused = await self._publish(taken.values())
                self._ack([tag for tag in taken if tag not in refused])
                await self._round_trip()
            except AmqpError as error:
                # Also after a refusal the same call may be made again, and then returns the
                # deliveries that are void.
                self._connection.raise_mapped(AmqpDisconnected(str(error)))
            if refused:
                raise BatchRefused(
                    {places[tag]: error for tag, error in refused.items()}, answer=gone
                )
            return gone

    @property
    def _lost(self) -> bool:
        return self.channel is not None and self.channel.error is not None

    async def _publish(
        self, pairs: Collection[tuple[RabbitMessage, Settlement]]
    ) -> Mapping[int, Exception]:
        """Publish the replacements of messages that are settled.

        Returns:
            The reasons why some cannot be stored, by the tag of the message.
        """
        now = time.time()
        batch: dict[int, AmqpPublication] = {}
        lanes: dict[int, Lane] = {}
        refused: dict[int, Exception] = {}
        paths = []
        # Released messages go behind those that wait, in their old order.
        for message, settlement in pairs:
            lane = message.queue, message.priority
            match settlement:
                case Done():
                    continue
                case Again(envelope=envelope):
                    path = hops(delay_of(envelope, now))
                    lane = envelope.queue, envelope.priority
                    # A lineage of its own, where losses of this message or of an earlier one may
                    # be known under the old lineage.
                    anew = message.losses > 0 or bool(message.lineage[1])
                    try:
                        one = publication_of(envelope, self._names, path, now, anew=anew)
                    except ConfigError as error:
                        refused[message.tag] = error
                        continue
                    paths.append(path)
                case Dead(reason=reason, details=details):
                    one = message.dead_letter(self._names, reason, details)
                case _:  # a release
                    one = message.copy(self._names)
            batch[message.tag], lanes[message.tag] = one, lane
        if batch:
            unusable = await self._topology.ensure(set(lanes.values()), paths)
            for tag, lane in lanes.items() if unusable else ():
                if lane in unusable:
                    refused[tag] = unusable[lane]
                    del batch[tag]
            refused |= await self._replace(batch)
        return refused
