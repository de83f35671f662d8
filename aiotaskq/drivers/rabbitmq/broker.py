"""The RabbitMQ broker: quorum queues, confirms, and delays in queues of their own.

A message is published to the queue that it waits in, and is there when the server has confirmed it.
What RabbitMQ cannot tell of itself (which queues there are, who consumes, what was cancelled) is in
two streams that everybody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, Self

from pamqp.commands import Queue

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.drivers.rabbitmq import ledger
from aiotaskq.drivers.rabbitmq.address import Address, parse
from aiotaskq.drivers.rabbitmq.channel import Disconnected, Refused
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.drivers.rabbitmq.items import delay_of, hops, write
from aiotaskq.drivers.rabbitmq.lease import RabbitLease
from aiotaskq.drivers.rabbitmq.ledger import Cancel, Recent, Record, Restore, Stream
from aiotaskq.drivers.rabbitmq.letters import graveyard
from aiotaskq.drivers.rabbitmq.link import Link
from aiotaskq.drivers.rabbitmq.names import Names
from aiotaskq.drivers.rabbitmq.results import RabbitBackend
from aiotaskq.drivers.rabbitmq.roster import Question, Roster
from aiotaskq.errors import BrokerFull, BrokerUnavailable, Unsupported

_MOST = 1000  # messages that wait for their confirms at once
_MOST_BYTES = 4 * 2**20
_TRIMMED = 1000  # dead letters, in one call
_LOOKED_AT = 50  # of these at once: they are held in memory
_REMEMBERED = 60.0  # seconds for which the id of a call is known
_SPARE_EVERY = 0.5  # seconds between attempts to spare what is held
_OLD_LOOK = 60.0  # seconds at most between looks for dead letters that are too old


class RabbitBroker:
    """Messages in RabbitMQ's queues.

    Args:
        url: ``amqp://[user[:password]@]host[:port][/virtual host]``, or ``amqps://`` for TLS.
        prefix: What the names of all queues and exchanges begin with.

    Raises:
        ConfigError: The URL is none of these.
    """

    traits: ClassVar[Traits] = Traits(
        priorities=False,
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
        self._address: Address = parse(url)
        self._prefix = prefix
        self._names = Names(prefix, self._address.queue_type)
        self._link: Link | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: OrderedDict[str, tuple[float, list[Envelope]]] = OrderedDict()  # oldest first

    @property
    def url(self) -> str:
        return self._address.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._prefix)

    def backend(self) -> RabbitBackend:
        return RabbitBackend(self._given_url, prefix=self._prefix)

    async def open(self) -> None:
        if self._link is not None:
            return
        link = Link(self._address, self._names, BrokerUnavailable, BrokerFull)
        try:
            await link.wire()
        except BaseException:
            await link.close()
            raise
        if self._link is not None:  # two tasks opened it at once
            await link.close()
            return
        self._link = link
        self._roster = Roster(link)
        self._cancelled = Recent()
        self._queues: dict[str, None] = {}
        self._look_at: dict[str, float] = {}
        self._ledger = Stream(
            link,
            self._names.declare_stream(self._names.ledger, days=ledger.DAYS),
            self._note,
            ledger.encode(ledger.Look()),
        )
        self._list = Stream(
            link,
            self._names.declare_stream(self._names.queues),
            lambda body: self._queues.update({body.decode(): None} if body else {}),
            b"",
        )

    async def close(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await link.close()

    # --- sending --------------------------------------------------------------------------------

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        if not batch:
            return ()
        if any(envelope.unique for envelope in batch):
            raise Unsupported(f"{self.url} cannot store an id only once")
        left = self._recall(batch, call_id)
        try:
            while left:
                count = _portion(left)
                await self._publish(left[:count])
                del left[:count]
        finally:
            if call_id is not None:
                self._calls[call_id] = (asyncio.get_running_loop().time(), left)
                self._calls.move_to_end(call_id)
        return ()

    def _recall(self, batch: Sequence[Envelope], call_id: str | None) -> list[Envelope]:
        """Return what of a call is still to be stored, as far as this client knows."""
        now = asyncio.get_running_loop().time()
        while self._calls:
            at, _ = next(iter(self._calls.values()))
            if now - at <= _REMEMBERED:
                break
            self._calls.popitem(last=False)
        known = None if call_id is None else self._calls.get(call_id)
        return list(batch) if known is None else known[1]

    async def _publish(self, batch: Sequence[Envelope], *, anew: bool = False) -> None:
        now = time.time()
        paths = [hops(delay_of(envelope, now)) for envelope in batch]
        link = self._opened()
        await link.need({one.queue for one in batch}, paths)
        await link.publish(
            [
                write(envelope, self._names, path, now, anew=anew)
                for envelope, path in zip(batch, paths, strict=True)
            ]
        )

    # --- consuming ------------------------------------------------------------------------------

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> RabbitConsumer:
        return RabbitConsumer(
            self._address, self._names, queues, name=name, lease=lease, about=about
        )

    def schedules(self) -> ScheduleStore:
        raise Unsupported(
            f"{self.url} keeps no schedules: RabbitMQ has no store that they could be changed in."
            " Use Redis, PostgreSQL or SQLite as the broker of the application that has them"
        )

    def lease(self, grant: Grant) -> RabbitLease:
        return RabbitLease(self._address, self._names, grant)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        self._opened()
        answers = await self._roster.ask(self._ledger, Question())
        return [info for info, _ in answers.values()]

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        self._opened()
        if not ids:
            return ()
        await self._ledger.declare()
        name, wanted = ledger.new_name(), tuple(ids)
        if not running:
            # Who was cancelled before is not spared, though it is held still.
            wanted = tuple(set(wanted) - await self._cancelled_among(wanted))
            if not wanted:
                return ()
        question = Question(name, wanted)
        record = ledger.encode(Cancel(name, wanted, running))
        if running:
            await self._ledger.write(record)
            # When all who consume have read it, it is done.
            await self._roster.ask(self._ledger, question)
            return ()
        try:
            await self._ledger.write(record)
            return await self._spare(question)
        except (BrokerUnavailable, asyncio.CancelledError):
            # It may be written. What is held now would be dropped when its retry comes, and
            # nobody would hear of it: so the rest is done as soon as the server is there again.
            if self._link is not None:
                self._start(self._spare_later(question))
            raise

    async def _cancelled_among(self, ids: Collection[str]) -> set[str]:
        link = self._opened()
        try:
            await self._ledger.read(await link.wire())
        except (Disconnected, Refused) as error:
            link.explain(error)
        return {one for one in ids if one in self._cancelled}

    async def _spare(self, question: Question) -> set[str]:
        """Restore what is held of what was cancelled; return what that is."""
        answers = await self._roster.ask(self._ledger, question)
        held = {one for _, answer in answers.values() if answer for one in answer.held}
        if held:
            await self._restore(held)
        return held

    async def _spare_later(self, question: Question) -> None:
        while True:
            await asyncio.sleep(_SPARE_EVERY)
            with contextlib.suppress(BrokerUnavailable):  # whoever cancelled has been told of it
                await self._spare(question)
                return

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restore(self, ids: Collection[str]) -> None:
        name = ledger.new_name()
        await self._ledger.write(ledger.encode(Restore(name, tuple(ids))))
        await self._roster.ask(self._ledger, Question(name))

    def _note(self, body: bytes) -> None:
        record: Record = ledger.decode(body)
        self._roster.apply(record)
        if isinstance(record, Cancel):
            self._cancelled.note(record.ids)
        elif isinstance(record, Restore):
            self._cancelled.drop(record.ids)

    # --- looking --------------------------------------------------------------------------------

    async def depth(self) -> Mapping[str, Depth]:
        waiting = await self._count()
        held: dict[str, int] = {}
        for _, answer in (await self._roster.ask(self._ledger, Question())).values():
            for queue, count in answer.counts.items() if answer else ():
                held[queue] = held.get(queue, 0) + count
        depths = {
            queue: Depth(ready=ready, held=held.get(queue, 0), dead=dead)
            for queue, (ready, dead) in waiting.items()
        }
        return {queue: depth for queue, depth in depths.items() if depth != Depth()}

    async def purge(self, queue: str) -> int:
        if queue not in await self._all_queues():
            return 0
        replies = await self._opened().declare(
            Queue.Purge(queue=self._names.suspects(queue)),
            Queue.Purge(queue=self._names.ready(queue)),
        )
        return sum(reply.message_count for reply in replies)

    async def _all_queues(self) -> Collection[str]:
        link = self._opened()
        try:
            await self._list.read(await link.wire())
        except (Disconnected, Refused) as error:
            link.explain(error)
        return self._queues

    async def _count(self) -> Mapping[str, tuple[int, int]]:
        """Return how many wait in each queue, and how many are dead."""
        queues = list(await self._all_queues())
        link, names = self._opened(), self._names
        await link.need(queues)
        declarations = [
            make(queue)
            for queue in queues
            for make in (names.declare_ready, names.declare_suspects, names.declare_dead)
        ]
        counts = [reply.message_count for reply in await link.declare(*declarations)]
        triples = zip(counts[::3], counts[1::3], counts[2::3], strict=True)
        return {
            queue: (ready + suspects, dead)
            for queue, (ready, suspects, dead) in zip(queues, triples, strict=True)
        }

    # --- dead letters ---------------------------------------------------------------------------

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        trimmed = 0
        for queue, (_, dead) in (await self._count()).items():
            if dead > limits.most or (dead and self._may_be_old(queue, limits)):
                trimmed += await self._trim(queue, limits)
        return Maintained(trimmed=trimmed)

    def _may_be_old(self, queue: str, limits: DeadLimits) -> bool:
        return limits.age is not None and time.time() >= self._look_at.get(queue, 0.0)

    async def _trim(self, queue: str, limits: DeadLimits) -> int:
        trimmed = count = 0
        while trimmed < _TRIMMED:
            count = await self._trim_some(queue, limits)
            trimmed += count
            if count < _LOOKED_AT:
                break
        return trimmed

    async def _trim_some(self, queue: str, limits: DeadLimits) -> int:
        # Each may be large: to find that the oldest is young the others are not read.
        async with graveyard(self._opened(), queue, most=_LOOKED_AT) as yard:
            letters, now = yard.letters, time.time()
            oldest = -float("inf") if limits.age is None else now - limits.age
            beyond = yard.total - limits.most
            out = [
                one
                for number, one in enumerate(letters)
                if number < beyond or one.letter.died_at <= oldest
            ]
            await yard.drop(out)
            if limits.age is not None:
                left = [one.letter for one in letters if one not in out]
                due = left[0].died_at + limits.age if left else now
                self._look_at[queue] = min(due, now + _OLD_LOOK)
        return len(out)

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        async with graveyard(self._opened(), queue) as yard:
            letters = [one.letter for one in reversed(yard.letters)]
        return [one for one in letters if before is None or one.key < before][:limit]

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        if not letters:
            return ()
        link = self._opened()
        missing: list[str] = []
        async with graveyard(link, queue) as yard:
            there = {one.letter.key: one for one in yard.letters}
            found = []
            for key, envelope in letters:
                letter = there.pop(key, None)
                if letter is None:
                    missing.append(key)
                else:
                    found.append((letter, envelope))
            if found:
                await self._ledger.read(await link.wire())
                ids = {one.id for _, one in found if one.id in self._cancelled}
                if ids:
                    await self._restore(ids)
                await self._publish([envelope for _, envelope in found], anew=True)
                await yard.drop([letter for letter, _ in found])
        return missing

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        if not keys:
            return 0
        wanted = set(keys)
        async with graveyard(self._opened(), queue) as yard:
            found = [one for one in yard.letters if one.letter.key in wanted]
            await yard.drop(found)
        return len(found)

    def _opened(self) -> Link:
        if self._link is None:
            raise BrokerUnavailable(f"{self.url}: the broker is not open")
        return self._link


def _portion(batch: Sequence[Envelope]) -> int:
    """Return how many to publish before their confirms are waited for; at least one."""
    size = 0
    for count, envelope in enumerate(batch[:_MOST]):
        size += len(envelope.body)
        if count and size > _MOST_BYTES:
            return count
    return min(len(batch), _MOST)
