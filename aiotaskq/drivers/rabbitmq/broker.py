"""The RabbitMQ broker: quorum queues, publisher confirms, and delays in queues of their own.

Theory of operation
-------------------
A broker is closed or open. An open one has one connection, which comes back by itself after a
failure, and on it the membership and the topology.

`publish` sends batches of limited size and waits for the confirms of each, so a failure leaves the
first batches stored, perhaps a part of one, and none of the rest. What was not confirmed of a call
is remembered under its `call_id` for `CALLS_FOR` seconds: the same call made again publishes only
those. A part of the batch that failed in the middle may be stored twice; so the trait `idempotent`
is false. An envelope that cannot be stored is left out, and told at the end with `BatchRefused`.

The shared facts (consumers, cancellations, queues) are asked of the membership at the moment of the
call; nothing is cached here. Dead letters are held by one reader at a time. `revive` publishes the
new message before it drops the letter: a failure in between leaves both, and loses neither.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Self

from pamqp.commands import Queue

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.drivers.common.batches import portions
from aiotaskq.drivers.common.dead_letter_keys import not_a_key
from aiotaskq.drivers.common.opening import OpenOnce
from aiotaskq.drivers.common.retention import CALLS_FOR
from aiotaskq.drivers.rabbitmq.channel import AmqpPublication, AmqpRefused
from aiotaskq.drivers.rabbitmq.connection import NOT_FOUND, RabbitConnection
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.drivers.rabbitmq.dead_letters import HeldDeadLetter, hold_dead_letters
from aiotaskq.drivers.rabbitmq.delays import delay_of, hops
from aiotaskq.drivers.rabbitmq.lease import RabbitLease
from aiotaskq.drivers.rabbitmq.membership import RabbitMembership
from aiotaskq.drivers.rabbitmq.messages import is_key, publication_of
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.queue_watch import QueueWatch
from aiotaskq.drivers.rabbitmq.results import RabbitBackend
from aiotaskq.drivers.rabbitmq.topology import RabbitTopology
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import (
    BatchRefused,
    BrokerFull,
    BrokerUnavailable,
    ConfigError,
    Unsupported,
)

_MOST = 1000  # messages that wait for their confirms at once
_MOST_BYTES = 4 * 2**20
_MOST_TRIMMED = 1000  # dead letters, in one call
_READ_AT_ONCE = 50  # dead letters to trim: they are held in memory
_LONGEST_UNREAD = 60.0  # seconds at most between searches for dead letters that are too old


class RabbitBroker:
    """Messages in RabbitMQ's queues.

    Args:
        url: ``amqp://[user[:password]@]host[:port][/virtual host]``, or ``amqps://`` for TLS.
        prefix: The beginning of the names of all queues and exchanges.

    Raises:
        ConfigError: It is not a RabbitMQ URL, or has an unknown option.
    """

    traits: ClassVar[Traits] = Traits(
        unique=False,
        schedules=False,
        leases=False,
        order=False,
        atomic=False,
        idempotent=False,
        clock=False,
        counts_delayed=False,
    )

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._address = parse_url(url)
        self._prefix = prefix
        self._names = RabbitNames(prefix, self._address.queue_type)
        self._connection = OpenOnce[RabbitConnection](
            lambda: BrokerUnavailable(f"{self.url}: the broker is not open")
        )
        # The time of each call, and the places of what it did not store; the oldest first.
        self._calls: OrderedDict[str, tuple[float, Sequence[int]]] = OrderedDict()

    @property
    def url(self) -> str:
        return self._address.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._prefix)

    def backend(self) -> RabbitBackend:
        return RabbitBackend(self._given_url, prefix=self._prefix)

    async def open(self) -> None:
        await self._connection.open(self._connect)

    async def _connect(self) -> RabbitConnection:
        connection = await self._new_connection().opened()
        self._membership = RabbitMembership(connection)
        self._topology = RabbitTopology(connection, self._membership)
        self._watch = QueueWatch(connection, self._membership)
        self._trim_at: dict[str, float] = {}  # when a dead letter of a queue may be too old
        return connection

    def _new_connection(self) -> RabbitConnection:
        return RabbitConnection(self._address, self._names, BrokerUnavailable, BrokerFull)

    async def close(self) -> None:
        connection = self._connection.release()
        if connection is not None:
            await self._membership.close()
            await connection.close()

    # --- sending --------------------------------------------------------------------------------

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        if not batch:
            return ()
        places, left = self._recall(batch, call_id)
        stored = 0
        refused: dict[int, Exception] = {}
        sizes = [len(envelope.body) for envelope in left]
        try:
            for some in portions(left, sizes, most=_MOST, most_bytes=_MOST_BYTES):
                for place, error in (await self._publish(some)).items():
                    refused[places[stored + place]] = error
                stored += len(some)
        finally:
            if call_id is not None:
                rest = [one for one in places[:stored] if one in refused] if refused else []
                now = asyncio.get_running_loop().time()
                self._calls[call_id] = (now, [*rest, *places[stored:]])
                self._calls.move_to_end(call_id)
        if len(refused) == len(batch):
            full = [one for one in refused.values() if isinstance(one, BrokerFull)]
            if len(full) == len(refused):
                raise full[0]
        if refused:
            raise BatchRefused(refused)
        return ()

    def _recall(
        self, batch: Sequence[Envelope], call_id: str | None
    ) -> tuple[Sequence[int], Sequence[Envelope]]:
        """Return what is still to be stored of a call, and its places in the batch."""
        now = asyncio.get_running_loop().time()
        while self._calls:
            at, _ = next(iter(self._calls.values()))
            if now - at <= CALLS_FOR:
                break
            self._calls.popitem(last=False)
        known = None if call_id is None else self._calls.get(call_id)
        if known is None:
            return range(len(batch)), batch
        return known[1], [batch[place] for place in known[1]]

    async def _publish(
        self, batch: Sequence[Envelope], *, anew: bool = False
    ) -> Mapping[int, Exception]:
        """Store envelopes; return the reasons of those refused, by their position."""
        now = time.time()
        refused: dict[int, Exception] = {}
        publications: list[AmqpPublication] = []
        places: list[int] = []
        paths = []
        for place, envelope in enumerate(batch):
            try:
                if envelope.unique:
                    raise Unsupported(f"{self.url} cannot store an id only once")
                path = hops(delay_of(envelope, now))
                one = publication_of(envelope, self._names, path, now, anew=anew)
            except ConfigError as error:
                refused[place] = error
                continue
            publications.append(one)
            places.append(place)
            if path:
                paths.append(path)
        if not publications:
            return refused
        connection = self._connection.get()
        lanes = [(batch[place].queue, batch[place].priority) for place in places]
        unusable = await self._topology.ensure(set(lanes), paths)
        if unusable:
            refused |= {
                place: unusable[lane]
                for place, lane in zip(places, lanes, strict=True)
                if lane in unusable
            }
            good = [number for number, place in enumerate(places) if place not in refused]
            publications = [publications[number] for number in good]
            places = [places[number] for number in good]
        for number, reason in (await connection.publish(publications)).items():
            refused[places[number]] = reason
        return refused

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        self._connection.get()
        if not ids:
            return ()
        return await self._membership.cancel(ids, running=running)

    async def purge(self, queue: str) -> int:
        connection, names = self._connection.get(), self._names
        await self._membership.queues()
        levels = (*self._membership.levels(queue), 0)
        purged = 0
        for name in (names.suspects(queue), *(names.ready(queue, one) for one in levels)):
            try:
                [reply] = await connection.call(Queue.Purge(queue=name))
            except AmqpRefused as error:
                if error.code != NOT_FOUND:
                    connection.raise_mapped(error)
            else:
                purged += reply.message_count
        return purged

    # --- consuming ------------------------------------------------------------------------------

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> RabbitConsumer:
        return RabbitConsumer(self._new_connection(), queues, name=name, lease=lease, about=about)

    def schedules(self) -> ScheduleStore:
        raise Unsupported(
            f"{self.url} keeps no schedules: RabbitMQ has no store that they could be changed in."
            " Use Redis, PostgreSQL or SQLite as the broker of the application that has them"
        )

    def lease(self, grant: Grant) -> RabbitLease:
        return RabbitLease(self._new_connection(), grant)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        self._connection.get()
        return await self._membership.consumers()

    # --- counting -------------------------------------------------------------------------------

    async def depth(self) -> Mapping[str, Depth]:
        self._connection.get()
        counts = await self._watch.count(list(await self._membership.queues()))
        held = await self._membership.held()
        depths = {
            queue: Depth(ready=count.ready, held=held.get(queue, 0), dead=count.dead)
            for queue, count in counts.items()
        }
        return {queue: depth for queue, depth in depths.items() if depth != Depth()}

    # --- dead letters ---------------------------------------------------------------------------

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        return await self._membership.cancelled_among(ids)

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        self._connection.get()
        trimmed = 0
        for queue, count in (await self._watch.look()).items():
            dead = count.dead
            if dead > limits.most or (dead and self._may_be_old(queue, limits)):
                trimmed += await self._trim(queue, limits)
        return Maintained(trimmed=trimmed)

    def _may_be_old(self, queue: str, limits: DeadLimits) -> bool:
        return limits.age is not None and time.time() >= self._trim_at.get(queue, 0.0)

    async def _trim(self, queue: str, limits: DeadLimits) -> int:
        trimmed = count = 0
        while trimmed < _MOST_TRIMMED:
            count = await self._trim_oldest(queue, limits)
            trimmed += count
            if count < _READ_AT_ONCE:
                break
        return trimmed

    async def _trim_oldest(self, queue: str, limits: DeadLimits) -> int:
        # Letters may be large, so only the oldest ones are read: they tell whether any is too old.
        async with hold_dead_letters(self._connection.get(), queue, most=_READ_AT_ONCE) as held:
            letters, now = held.letters, time.time()
            oldest = -float("inf") if limits.age is None else now - limits.age
            beyond = held.total - limits.most
            out = [
                one
                for number, one in enumerate(letters)
                if number < beyond or 0.0 < one.letter.died_at <= oldest
            ]
            await held.drop(out)
            if limits.age is not None:
                # Of one that somebody else put there it is not known when it died.
                left = [one for one in letters if one not in out and one.letter.died_at]
                due = left[0].letter.died_at + limits.age if left else now + _LONGEST_UNREAD
                self._trim_at[queue] = min(due, now + _LONGEST_UNREAD)
        return len(out)

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        if before is not None and not is_key(before):
            raise not_a_key(before)
        async with hold_dead_letters(self._connection.get(), queue) as held:
            letters = [one.letter for one in reversed(held.letters)]
        # Keys begin with 20 digits each, so their order as texts is that of their numbers.
        return [one for one in letters if before is None or one.key < before][:limit]

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        if not letters:
            return ()
        missing: list[str] = []
        found: list[tuple[HeldDeadLetter, Envelope]] = []
        places: list[int] = []
        refused: Mapping[int, Exception] = {}
        async with hold_dead_letters(self._connection.get(), queue) as held:
            there = {one.letter.key: one for one in held.letters}
            for place, (key, envelope) in enumerate(letters):
                if key in there:
                    found.append((there.pop(key), envelope))
                    places.append(place)
                else:
                    missing.append(key)
            if found:
                await self._membership.restore([one.id for _, one in found])
                refused = await self._publish([envelope for _, envelope in found], anew=True)
                await held.drop(
                    [letter for number, (letter, _) in enumerate(found) if number not in refused]
                )
        if refused:
            raise BatchRefused({places[one]: why for one, why in refused.items()}, answer=missing)
        return missing

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        if not keys:
            return 0
        wanted = set(keys)
        async with hold_dead_letters(self._connection.get(), queue) as held:
            found = [one for one in held.letters if one.letter.key in wanted]
            await held.drop(found)
        return len(found)
