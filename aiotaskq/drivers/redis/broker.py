"""The Redis broker: messages in plain lists, and scripts that move them.

Theory of operation
-------------------

A message is ready, delayed, held by a consumer, or dead; then it is gone. `keys.py` lists the
keys of these places. Each step from one place to another is one script, so that it happens as a
whole or not at all, whichever process dies in between. A task pays only for the features that it
uses: a plain one is pushed to a list, popped into the hash of its consumer, and deleted from there.

* No message travels in the reply to a blocking command. Idle consumers block on a token and then
  fetch, so a reply that is lost on the way costs no message. See `notify.py` and `consumer.py`.
* A queue is added to the set of all queues before anything is stored in it. Maintenance goes
  over that set, so it finds each message, also where the process dies in between.
* A call of `publish` may have taken effect though it failed. With a `call_id` it may be repeated:
  the server keeps the answer, by queue and part, and the same batch always has the same parts.
* A call of `maintain` names the server's time at which it is out of date, as estimated by
  `_clock_offset`. One that lay in a buffer, while a server stood still, must not give up
  consumers whose renewals lie in other buffers.
* Keys may hold data that no script wrote. A script that fails because of that fails for all
  queues of its call. The queues are then called one by one, and only the malformed one is left
  out.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
import weakref
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Self

import msgspec

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.drivers.common.batches import portions, slices
from aiotaskq.drivers.common.retention import CANCELLED_IDS_FOR, UNIQUE_IDS_FOR
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import MAX_BYTES, MAX_ENTRIES, MAX_QUEUES, RedisClient
from aiotaskq.drivers.redis.connection import (
    RedisConnection,
    Word,
    is_malformed_data,
)
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.dead_letters import RedisDeadLetters
from aiotaskq.drivers.redis.keys import RedisKeys
from aiotaskq.drivers.redis.lease import RedisLease
from aiotaskq.drivers.redis.queue_names import RedisQueueNames
from aiotaskq.drivers.redis.results import RedisBackend
from aiotaskq.drivers.redis.schedules import RedisSchedules
from aiotaskq.drivers.redis.scripts import RedisScript
from aiotaskq.drivers.redis.server_settings import warn_of_data_loss
from aiotaskq.drivers.redis.url import parse_url
from aiotaskq.errors import BatchRefused, Unavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.redis")

_MAINTAINED = 100  # messages of each queue, at most, that one call of a script moves
_TRIMMED = 1000  # dead letters of each queue, at most, that one call of a script drops
_LOOKED_AT = 500  # delayed messages, about, that one call of a script looks at
_OUT_OF_DATE = 2.5  # seconds after which a call of `maintain` is not carried out any more
_RECONNECTING = 30.0  # seconds after a failure in which other clients may not be back yet


class RedisBroker:
    """Messages in Redis lists.

    Args:
        url: ``redis://[[user]:password@]host[:port][/database]``, ``rediss://`` for TLS,
            ``redis+sentinel://`` with the sentinels as hosts, or
            ``unix:///path/to/socket[?db=database]``.
        prefix: The beginning of all keys.
        client: The client of the store, where that is a shard of a cluster.

    Raises:
        ConfigError: The URL has another form.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(
        self, url: str, *, prefix: str = "aiotaskq", client: RedisClient | None = None
    ) -> None:
        self._given_url = url
        self._client = client or RedisClient(parse_url(url), RedisKeys(prefix))
        self._consumers: weakref.WeakSet[RedisConsumer] = weakref.WeakSet()
        self.names = RedisQueueNames(self._client)
        self._malformed: set[str] = set()  # queues with keys that no script can work on
        self._aside = 0  # keys set aside, as last told
        self._warned = False  # whether warnings about the server's settings were logged
        self._clock_offset = 0.0  # seconds: the server's clock less that of the event loop

    @property
    def url(self) -> str:
        return self._client.server.url

    @property
    def _time_shift(self) -> float:
        """Seconds added to the server's clock; for test harnesses."""
        return self._client.time_shift

    @_time_shift.setter
    def _time_shift(self, seconds: float) -> None:
        self._client.time_shift = seconds

    @property
    def letters(self) -> RedisDeadLetters:
        """The dead letters of the store."""
        return RedisDeadLetters(self._client, self.names.introduce)

    def clone(self) -> Self:
        clone = type(self)(self._given_url, prefix=self._client.keys.given)
        clone._time_shift = self._time_shift
        return clone

    def backend(self) -> RedisBackend:
        return RedisBackend(self._given_url, prefix=self._client.keys.given)

    async def open(self) -> None:
        await self._client.open(self._read_clock)

    async def close(self) -> None:
        for consumer in list(self._consumers):
            await consumer.disconnect()
        await self._client.close()

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        refused: list[str] = []
        unstorable: dict[int, Exception] = {}  # by identity
        for number, part in enumerate(_parts(batch)):
            call = "" if call_id is None else f"{call_id}:{number}"
            try:
                refused += await self._publish(part, call)
            except (UnstorableValue, UnicodeEncodeError):  # the script did not run
                for place, one in enumerate(part):
                    try:
                        refused += await self._publish([one], call and f"{call}:{place}")
                    except (UnstorableValue, UnicodeEncodeError) as error:
                        unstorable[id(one)] = items.unstorable(error)
        if unstorable:
            errors = {
                place: unstorable[id(one)]
                for place, one in enumerate(batch)
                if id(one) in unstorable
            }
            raise BatchRefused(errors, answer=refused)
        return refused

    async def _publish(self, part: Sequence[Envelope], call: str) -> list[str]:
        """Store envelopes of one queue; return the ids refused as duplicates."""
        queue = part[0].queue
        words = self._groups(part)
        await self.names.introduce([queue])
        keys = [self._client.keys.base(queue), self._client.keys.ids]
        args: list[Word] = [self._time_shift, call, *words]
        reply = await self._client.connection.script(scripts.PUBLISH, keys, args)
        return [name.decode(errors="replace") for name in reply]

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> RedisConsumer:
        return self.part_of_consumer(
            f"{name}:{uuid.uuid4().hex}", queues, queues, lease=lease, about=about
        )

    def part_of_consumer(
        self,
        identity: str,
        queues: Sequence[str],
        all_queues: Sequence[str],
        *,
        lease: float,
        about: bytes,
        warns: bool = True,
    ) -> RedisConsumer:
        """Return a consumer of queues in this store, of a consumer that may have others elsewhere.

        Args:
            identity: The consumer's id.
            queues: Its queues in this store.
            all_queues: All of its queues.
            lease: Seconds.
            about: The description that `consumers` returns.
            warns: Whether `open` logs warnings about the server's settings.
        """
        consumer = RedisConsumer(
            self._client,
            queues,
            identity=identity,
            lease=lease,
            about=msgspec.json.encode(list(all_queues)) + b"\n" + about,
            introduce=self._introduce_for_worker if warns else self.names.introduce,
        )
        self._consumers.add(consumer)
        return consumer

    def schedules(self) -> RedisSchedules:
        return RedisSchedules(self._client, self.names.introduce)

    def lease(self, grant: Grant) -> RedisLease:
        return RedisLease(self._client, grant, self._client.new_connection())

    async def consumers(self) -> Sequence[ConsumerInfo]:
        found: list[ConsumerInfo] = []
        call = partial(self._read, scripts.CONSUMERS)
        async for part, reply in self._in_parts(await self.names.all(), call):
            for name, about in zip(reply[::2], reply[1::2], strict=True):
                queues, _, described = about.partition(b"\n")
                try:
                    decoded = tuple(msgspec.json.decode(queues, type=list[str]))
                except (msgspec.MsgspecError, UnicodeError, RecursionError):
                    decoded = tuple(part)
                identity = name.decode(errors="replace")
                found.append(ConsumerInfo(id=identity, queues=decoded, about=described))
        return found

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        packed = [items.pack_id(name) for name in ids if items.is_text(name)]
        bases: list[str] = []
        if packed and not running:
            bases = [self._client.keys.base(queue) for queue in await self.names.all()]
        held: set[str] = set()
        for part in slices(packed, MAX_ENTRIES):
            held |= await self._cancel(part, bases)
        return held

    async def cancelled_among(self, ids: Collection[str]) -> set[str]:
        key, found = self._client.keys.cancelled, set[str]()
        for part in slices([one for one in ids if items.is_text(one)], MAX_ENTRIES):
            packed = map(items.pack_id, part)
            scores = await self._client.connection.command("ZMSCORE", key, *packed)
            found |= {name for name, at in zip(part, scores, strict=True) if at is not None}
        return found

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        return await self.maintain_some(await self.some_queues(), limits)

    async def maintain_some(self, queues: Sequence[str], limits: DeadLimits) -> Maintained:
        """Do the maintenance of some queues; see `maintain`."""
        promoted = reclaimed = trimmed = 0
        call = partial(self._maintain, limits)
        async for _, reply in self._in_parts(queues, call):
            promoted += reply[1]
            reclaimed += reply[2]
            trimmed += reply[3]
        aside = self._client.connection.aside
        before, self._aside = self._aside, aside
        return Maintained(
            promoted=promoted,
            reclaimed=reclaimed,
            trimmed=trimmed,
            aside=max(aside - before, 0),
        )

    async def depth(self) -> Mapping[str, Depth]:
        depths: dict[str, Depth] = {}
        call = partial(self._read, scripts.DEPTH)
        async for part, counts in self._in_parts(await self.names.all(), call):
            for queue, (ready, delayed, held, dead) in zip(part, counts, strict=True):
                if ready or delayed or held or dead:
                    depths[queue] = Depth(ready=ready, delayed=delayed, held=held, dead=dead)
        return depths

    async def purge(self, queue: str) -> int:
        count: int = await self._client.connection.script(
            scripts.PURGE, [self._client.keys.base(queue)], []
        )
        return count

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        return await self.letters.read(queue, limit, before)

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return await self.letters.revive(queue, letters)

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return await self.letters.discard(queue, keys)

    async def uncancel(self, ids: Collection[str]) -> None:
        """Forget that ids were cancelled."""
        key = self._client.keys.cancelled
        for part in slices(list(ids), MAX_ENTRIES):
            await self._client.connection.command("ZREM", key, *map(items.pack_id, part))

    async def note_unique(self, name: str) -> None:
        """Note that a unique envelope of this id was stored."""
        await self._client.connection.command(
            "SET", f"{self._client.keys.ids}{name}", 1, "EX", int(UNIQUE_IDS_FOR)
        )

    def _groups(self, part: Sequence[Envelope]) -> list[Word]:
        """Return envelopes of one queue as groups, in order, as `publish.lua` takes them."""
        words: list[Word] = []
        kind, count, counted_at = "", 0, 0
        for envelope in part:
            due, item = items.pack_with_due(envelope, self._client.serials)
            its_kind = _kind(envelope, due)
            if its_kind != kind:
                if count:
                    words[counted_at] = count
                words += (its_kind, 0)
                kind, count, counted_at = its_kind, 0, len(words) - 1
            count += 1
            if envelope.unique:
                words += (envelope.id, due, item)
            elif due:
                words += (due, item)
            else:
                words.append(item)
        words[counted_at] = count
        return words

    async def _cancel(self, packed: Sequence[bytes], bases: Sequence[str]) -> set[str]:
        """Cancel the ids of one call; return those that are held in queues of these bases."""
        keys = self._client.keys
        left, held, seen = dict.fromkeys(packed), set[str](), b""
        while left:
            args: list[Word] = [self._time_shift, CANCELLED_IDS_FOR, seen, *left]
            reply = await self._client.connection.script(
                scripts.CANCEL, [keys.cancelled, *bases], args
            )
            is_done, found, seen, out_of_date = reply
            for name in found:
                held.add(items.unpack_id(name))
                left.pop(name, None)
            if is_done:
                if out_of_date:
                    await self._forget_cancelled(out_of_date)
                break
        return held

    async def _forget_cancelled(self, before: bytes) -> None:
        """Drop the notes of ids that were cancelled before a time.

        Their delayed messages are dropped first. They may be delayed for longer than the notes are
        kept, and would run without them.
        """
        keys, connection = self._client.keys, self._client.connection
        for queue in await self.names.all():
            cursor = b"0"
            while True:
                pair = [keys.cancelled, keys.base(queue)]
                cursor = await connection.script(scripts.DROP_CANCELLED, pair, [cursor, _LOOKED_AT])
                if cursor == b"0":
                    break
        await connection.command("ZREMRANGEBYSCORE", keys.cancelled, "-inf", b"(" + before)

    async def _read(self, script: RedisScript, queues: Sequence[str]) -> Sequence[Any]:
        """Call a script that only reads the keys of queues."""
        keys = [self._client.keys.base(queue) for queue in queues]
        reply: Sequence[Any] = await self._client.connection.script(
            script, keys, [self._time_shift]
        )
        return reply

    async def _in_parts(
        self, queues: Sequence[str], call: Callable[[Sequence[str]], Awaitable[Sequence[Any]]]
    ) -> AsyncIterator[tuple[Sequence[str], Sequence[Any]]]:
        """Make a call for some queues at a time; yield them with its reply.

        A queue with keys that no script can work on is left out, and logged once.
        """
        sound = [queue for queue in queues if queue not in self._malformed]
        alone = [queue for queue in queues if queue in self._malformed]
        for part in slices(sound, MAX_QUEUES):
            reply, _ = await self._attempt(part, call)
            if reply is None:
                alone += part
            else:
                yield part, reply
        for queue in alone:
            reply, error = await self._attempt([queue], call)
            if reply is not None:
                yield [queue], reply
            elif queue not in self._malformed:
                self._malformed.add(queue)
                logger.error(
                    "Keys of queue %r are not as aiotaskq wrote them; it is left alone: %s",
                    queue,
                    error,
                    extra={"event": "redis_odd_data", "url": self.url, "queue": queue},
                )

    async def _attempt(
        self, queues: Sequence[str], call: Callable[[Sequence[str]], Awaitable[Sequence[Any]]]
    ) -> tuple[Sequence[Any] | None, Unavailable | None]:
        """Make a call; return its reply, or the error where a script cannot work on the keys."""
        try:
            return await call(queues), None
        except Unavailable as error:
            if not is_malformed_data(error.__cause__):
                raise
            return None, error

    async def _maintain(self, limits: DeadLimits, queues: Sequence[str]) -> Sequence[Any]:
        loop = asyncio.get_running_loop()
        connection = self._client.connection
        failed_at = connection.failed_at
        was_away = failed_at is not None and loop.time() - failed_at < _RECONNECTING
        args: list[Word] = [
            self._time_shift,
            loop.time() + self._clock_offset + _OUT_OF_DATE,
            _MAINTAINED,
            "1" if was_away else "",
            limits.most,
            "" if limits.age is None else limits.age,
            _TRIMMED,
            *(consumer.id for consumer in list(self._consumers) if consumer.is_open),
        ]
        keys = [*map(self._client.keys.base, queues), self._client.keys.cancelled]
        reply: Sequence[Any] = await connection.script(scripts.MAINTAIN, keys, args)
        self._set_clock(float(reply[0]))
        return reply

    async def _read_clock(self, connection: RedisConnection) -> None:
        seconds, micros = await connection.command("TIME")
        self._set_clock(int(seconds) + int(micros) / 1e6)

    def _set_clock(self, server_time: float) -> None:
        self._clock_offset = server_time - asyncio.get_running_loop().time()

    async def some_queues(self) -> list[str]:
        """Return the queues for a round of maintenance: those of the open consumers, and others."""
        own = {
            queue
            for consumer in list(self._consumers)
            if consumer.is_open
            for queue in consumer.grant.queues
        }
        return await self.names.some(own)

    async def _introduce_for_worker(self, queues: Collection[str]) -> None:
        """Introduce queues; the first time, also log warnings about the server's settings."""
        await self.names.introduce(queues)
        if not self._warned:
            self._warned = True
            await warn_of_data_loss(self._client.connection, self.url)


def _kind(envelope: Envelope, due: bytes) -> str:
    """Return the kind of group in `publish.lua` that an envelope goes to."""
    if envelope.unique:
        return "u"
    if due:
        return "d"
    return str(envelope.priority) if envelope.expires_in is None else "e"


def _parts(batch: Sequence[Envelope]) -> Iterator[Sequence[Envelope]]:
    """Split a batch by queue, and each queue's share into parts for one call each."""
    shares: Iterable[Sequence[Envelope]]
    if any(envelope.unique for envelope in batch):
        # Of two envelopes with the same id the first has to be stored, also where queues differ.
        shares = (list(share) for _, share in itertools.groupby(batch, attrgetter("queue")))
    else:
        by_queue: dict[str, list[Envelope]] = {}
        for envelope in batch:
            by_queue.setdefault(envelope.queue, []).append(envelope)
        shares = by_queue.values()
    for share in shares:
        sizes = [len(envelope.body) for envelope in share]
        yield from portions(share, sizes, most=MAX_ENTRIES, most_bytes=MAX_BYTES)
