"""The Redis broker: plain lists, and scripts that move what is in them.

A task pays for what it uses: it is pushed to a list, popped into the hash of what its consumer
holds, and deleted from there. No task rides in a blocking reply: idle consumers block on a token
and then fetch, so that a reply that is lost on the wire strands nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
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
from operator import attrgetter
from typing import Any, ClassVar, Self

import msgspec

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.drivers.redis import health, items, scripts
from aiotaskq.drivers.redis.address import parse
from aiotaskq.drivers.redis.client import MOST, Client, portions
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.lease import RedisLease
from aiotaskq.drivers.redis.link import Word, is_odd_data
from aiotaskq.drivers.redis.results import RedisBackend
from aiotaskq.drivers.redis.schedules import RedisSchedules
from aiotaskq.errors import Unavailable

logger = logging.getLogger("aiotaskq.redis")

_TENDED = 100  # at most, of each queue in one call
_LETTERS = 100  # read in one call of a script
_SWEPT = 500  # delayed ones, about, that one call of a script looks at
_QUEUES = 50  # in one call of a script
_CANCELLED_FOR = 7 * 86_400.0  # seconds for which cancelled ids are known
_LATENESS = 2.5  # seconds after which housekeeping that was asked for is out of date
_LATELY = 30.0  # seconds after a failure in which others may not have found their way back


class RedisBroker:
    """Messages in Redis lists.

    Args:
        url: ``redis://[[user]:password@]host[:port][/database]``, ``rediss://`` for TLS,
            ``redis+sentinel://`` with the sentinels as hosts, or
            ``unix:///path/to/socket[?db=database]``.
        prefix: What all keys begin with.
        client: What speaks to the server, where the URL does not say it all.

    Raises:
        ConfigError: The URL is none of these.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, url: str, *, prefix: str = "aiotaskq", client: Client | None = None) -> None:
        self._given_url = url
        self._client = client or Client(parse(url), Keys(prefix))
        self._consumers: weakref.WeakSet[RedisConsumer] = weakref.WeakSet()
        self._known: set[str] = set()  # queues that are in the set of queues
        self._known_at = 0  # connects of the link, when that was learned
        self._introduced: set[str] = set()  # queues that were in the set of queues once
        self._odd: set[str] = set()  # queues with keys that no script can work on
        self._warned = False  # of what the server may lose
        self._ahead = 0.0  # the server's clock less that of the event loop

    @property
    def url(self) -> str:
        return self._client.address.url

    @property
    def _time_shift(self) -> float:
        """Seconds added to the server's clock. For test harnesses."""
        return self._client.time_shift

    @_time_shift.setter
    def _time_shift(self, seconds: float) -> None:
        self._client.time_shift = seconds

    def clone(self) -> Self:
        clone = type(self)(self._given_url, prefix=self._client.keys.given)
        clone._time_shift = self._time_shift
        return clone

    def backend(self) -> RedisBackend:
        return RedisBackend(self._given_url, prefix=self._client.keys.given)

    async def open(self) -> None:
        if self._client.is_open:
            return
        await self._client.open()
        try:
            seconds, micros = await self._client.link.command("TIME")
        except BaseException:
            await self._client.close()
            raise
        self._set_clock(int(seconds) + int(micros) / 1e6)

    async def close(self) -> None:
        for consumer in list(self._consumers):
            await consumer.let_go()
        await self._client.close()

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        refused: list[str] = []
        for number, part in enumerate(_parts(batch)):
            queue = part[0].queue
            await self.introduce([queue])
            call = "" if call_id is None else f"{call_id}:{number}"
            words: list[Word] = [self._time_shift, call, *self._layout(part)]
            keys = [self._client.keys.base(queue), self._client.keys.ids]
            reply = await self._client.link.script(scripts.PUBLISH, keys, words)
            refused += [name.decode() for name in reply]
        return refused

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> RedisConsumer:
        return self.member(f"{name}:{uuid.uuid4().hex}", queues, queues, lease=lease, about=about)

    def member(
        self,
        identity: str,
        queues: Sequence[str],
        all_queues: Sequence[str],
        *,
        lease: float,
        about: bytes,
        warns: bool = True,
    ) -> RedisConsumer:
        """Return a new consumer of a given id, which may have queues elsewhere as well.

        Args:
            identity: Its id.
            queues: That it has here.
            all_queues: That it has in all.
            lease: Seconds.
            about: What `consumers` tells of it.
            warns: Whether people are to hear what this server may lose.
        """
        consumer = RedisConsumer(
            self._client,
            queues,
            identity=identity,
            lease=lease,
            about=msgspec.json.encode(list(all_queues)) + b"\n" + about,
            introduce=self._welcome if warns else self.introduce,
        )
        self._consumers.add(consumer)
        return consumer

    def schedules(self) -> RedisSchedules:
        return RedisSchedules(self._client, self.introduce)

    def lease(self, grant: Grant) -> RedisLease:
        return RedisLease(self._client, grant, self._client.new_link())

    async def consumers(self) -> Sequence[ConsumerInfo]:
        found: list[ConsumerInfo] = []
        async for part, reply in self._in_parts(await self.queues(), self._list_consumers):
            for name, about in zip(reply[::2], reply[1::2], strict=True):
                queues, _, told = about.partition(b"\n")
                try:
                    decoded = tuple(msgspec.json.decode(queues, type=list[str]))
                except msgspec.MsgspecError:
                    decoded = tuple(part)
                found.append(ConsumerInfo(id=name.decode(), queues=decoded, about=told))
        return found

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        packed = [items.pack_id(name) for name in ids]
        bases: list[str] = []
        if packed and not running:
            bases = [self._client.keys.base(queue) for queue in await self.queues()]
        held: set[str] = set()
        for start in range(0, len(packed), MOST):
            held |= await self._cancel(packed[start : start + MOST], bases)
        return held

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        promoted = reclaimed = trimmed = 0

        async def call(queues: Sequence[str]) -> Sequence[Any]:
            return await self._maintain(queues, limits)

        async for _, reply in self._in_parts(await self.queues(), call):
            promoted += reply[1]
            reclaimed += reply[2]
            trimmed += reply[3]
        return Maintained(promoted=promoted, reclaimed=reclaimed, trimmed=trimmed)

    async def depth(self) -> Mapping[str, Depth]:
        depths: dict[str, Depth] = {}
        async for part, counts in self._in_parts(await self.queues(), self._count):
            for queue, (ready, delayed, held, dead) in zip(part, counts, strict=True):
                if ready or delayed or held or dead:
                    depths[queue] = Depth(ready=ready, delayed=delayed, held=held, dead=dead)
        return depths

    async def purge(self, queue: str) -> int:
        count: int = await self._client.link.script(
            scripts.PURGE, [self._client.keys.base(queue)], []
        )
        return count

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        letters: list[DeadLetter] = []
        keys = [self._client.keys.base(queue)]
        last = _known_key(before)
        while (most := min(limit - len(letters), _LETTERS)) > 0:
            reply = await self._client.link.script(scripts.DEAD, keys, [last, most])
            letters += [
                items.unpack_dead(key, letter, queue)
                for key, letter in zip(reply[::2], reply[1::2], strict=True)
            ]
            if len(reply) < 2 * most:
                break
            last = reply[-2]
        return letters

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        await self.introduce({envelope.queue for _, envelope in letters})
        missing: list[str] = []
        keys_of = self._client.keys
        for part in portions(letters, [len(envelope.body) for _, envelope in letters]):
            keys = [keys_of.base(queue), keys_of.ids, keys_of.cancelled]
            words: list[Word] = [self._time_shift]
            for key, envelope in part:
                base = keys_of.base(envelope.queue)
                if base not in keys[3:]:
                    keys.append(base)
                due, item = items.place(envelope, self._client.serials)
                target = keys.index(base, 3) + 1
                unique = "1" if envelope.unique else ""
                words += (key, target, items.pack_id(envelope.id), envelope.id, unique, due, item)
            reply = await self._client.link.script(scripts.REVIVE, keys, words)
            missing += [key.decode() for key in reply]
        return missing

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        count = 0
        wanted = list(set(keys))
        for start in range(0, len(wanted), MOST):
            part = wanted[start : start + MOST]
            base = self._client.keys.base(queue)
            count += await self._client.link.script(scripts.DISCARD, [base], part)
        return count

    async def cancelled_among(self, ids: Sequence[str]) -> set[str]:
        """Return those that were cancelled, of a thousand at most."""
        packed = [items.pack_id(name) for name in ids]
        scores = await self._client.link.command("ZMSCORE", self._client.keys.cancelled, *packed)
        return {name for name, at in zip(ids, scores, strict=True) if at is not None}

    async def uncancel(self, ids: Collection[str]) -> None:
        """Forget that ids were cancelled."""
        packed = [items.pack_id(name) for name in ids]
        for start in range(0, len(packed), MOST):
            part = packed[start : start + MOST]
            await self._client.link.command("ZREM", self._client.keys.cancelled, *part)

    async def note_unique(self, name: str) -> None:
        """Note that a unique envelope of this id was stored."""
        await self._client.link.command("SET", f"{self._client.keys.ids}{name}", 1, "EX", 86_400)

    def _layout(self, part: Sequence[Envelope]) -> list[Word]:
        """Return envelopes of one queue as groups, in order, as `publish.lua` takes them."""
        words: list[Word] = []
        kind, count, counted_at = "", 0, 0
        for envelope in part:
            due, item = items.place(envelope, self._client.serials)
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
        """Note ids of one call; return those that are held, where bases are given to look at."""
        keys = self._client.keys
        left, held, seen = dict.fromkeys(packed), set[str](), b""
        while left:
            words: list[Word] = [self._time_shift, _CANCELLED_FOR, seen, *left]
            reply = await self._client.link.script(scripts.CANCEL, [keys.cancelled, *bases], words)
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
        """Drop the notes of ids that were cancelled before a time, and first what is delayed of it.

        That may be delayed for longer than the notes are kept, and would be run without them.
        """
        keys, link = self._client.keys, self._client.link
        for queue in await self.queues():
            cursor = b"0"
            while True:
                pair = [keys.cancelled, keys.base(queue)]
                cursor = await link.script(scripts.SWEEP, pair, [cursor, _SWEPT])
                if cursor == b"0":
                    break
        await link.command("ZREMRANGEBYSCORE", keys.cancelled, "-inf", b"(" + before)

    async def _list_consumers(self, queues: Sequence[str]) -> Sequence[Any]:
        keys = [self._client.keys.base(queue) for queue in queues]
        reply: Sequence[Any] = await self._client.link.script(
            scripts.CONSUMERS, keys, [self._time_shift]
        )
        return reply

    async def _count(self, queues: Sequence[str]) -> Sequence[Any]:
        keys = [self._client.keys.base(queue) for queue in queues]
        reply: Sequence[Any] = await self._client.link.script(
            scripts.DEPTH, keys, [self._time_shift]
        )
        return reply

    async def _in_parts(
        self, queues: Sequence[str], call: Callable[[Sequence[str]], Awaitable[Sequence[Any]]]
    ) -> AsyncIterator[tuple[Sequence[str], Sequence[Any]]]:
        """Make a call for some queues at a time; yield them with its replies.

        A queue with keys that no script can work on is left out, and told of once.
        """
        sound = [queue for queue in queues if queue not in self._odd]
        alone = [queue for queue in queues if queue in self._odd]
        for start in range(0, len(sound), _QUEUES):
            part = sound[start : start + _QUEUES]
            reply, _ = await self._attempt(part, call)
            if reply is None:
                alone += part
            else:
                yield part, reply
        for queue in alone:
            reply, error = await self._attempt([queue], call)
            if reply is not None:
                yield [queue], reply
            elif queue not in self._odd:
                self._odd.add(queue)
                logger.error(
                    "Keys of queue %r are not as aiotaskq wrote them; it is left alone: %s",
                    queue,
                    error,
                    extra={"event": "redis_odd_data", "url": self.url, "queue": queue},
                )

    async def _attempt(
        self, queues: Sequence[str], call: Callable[[Sequence[str]], Awaitable[Sequence[Any]]]
    ) -> tuple[Sequence[Any] | None, Unavailable | None]:
        """Make a call; return its reply, or why a script cannot work on what is there."""
        try:
            return await call(queues), None
        except Unavailable as error:
            if not is_odd_data(error.__cause__):
                raise
            return None, error

    async def _maintain(self, queues: Sequence[str], limits: DeadLimits) -> Sequence[Any]:
        loop = asyncio.get_running_loop()
        link = self._client.link
        missed = link.failed_at is not None and loop.time() - link.failed_at < _LATELY
        words: list[Word] = [
            self._time_shift,
            loop.time() + self._ahead + _LATENESS,
            _TENDED,
            "1" if missed else "",
            limits.most,
            "" if limits.age is None else limits.age,
            *(consumer.id for consumer in list(self._consumers) if consumer.is_open),
        ]
        keys = [*map(self._client.keys.base, queues), self._client.keys.cancelled]
        reply: Sequence[Any] = await link.script(scripts.TEND, keys, words)
        self._set_clock(float(reply[0]))
        return reply

    def _set_clock(self, server_time: float) -> None:
        self._ahead = server_time - asyncio.get_running_loop().time()

    async def queues(self) -> list[str]:
        """Return all queues that were ever used."""
        names = await self._client.link.command("SMEMBERS", self._client.keys.queues)
        stored = {name.decode() for name in names}
        if not self._introduced <= stored:
            self._known_at = 0
            await self.introduce(self._introduced - stored)
        return sorted(stored | self._introduced)

    async def _welcome(self, queues: Collection[str]) -> None:
        """Make ready for a consumer of queues."""
        await self.introduce(queues)
        if not self._warned:
            self._warned = True
            await health.warn(self._client.link, self.url)

    async def introduce(self, queues: Collection[str]) -> None:
        """See that queues are in the set of queues, before anything is in them."""
        link = self._client.link
        if self._known_at != link.connects:  # another server, or one that lost something
            self._known.clear()
        if self._known.issuperset(queues):
            return
        asked = list(queues)
        held = await link.command("SMISMEMBER", self._client.keys.queues, *asked)
        # Asked first, since a server without memory refuses to add, even what is there.
        if not all(held):
            missing = {queue for queue, there in zip(asked, held, strict=True) if not there}
            if not missing.isdisjoint(self._introduced):
                self._tell_lost()
            await link.command("SADD", self._client.keys.queues, *asked)
        self._known.update(asked)
        self._introduced.update(asked)
        self._known_at = link.connects

    def _tell_lost(self) -> None:
        logger.critical(
            "The Redis server has lost its data: it was emptied, or another has taken its place."
            " What was queued is gone; going on with what comes",
            extra={"event": "redis_lost_data", "url": self.url},
        )
        self._introduced.clear()  # so that it is told once


def _kind(envelope: Envelope, due: bytes) -> str:
    """Return the kind of group that `publish.lua` wants an envelope in."""
    if envelope.unique:
        return "u"
    if due:
        return "d"
    return str(envelope.priority) if envelope.expires_in is None else "e"


def _known_key(before: str | None) -> str:
    """Return the key of a dead letter as `dead.lua` takes it."""
    if before is None:
        return ""
    try:
        float(before)
    except ValueError:
        raise ValueError(
            f"{before!r} is not the key of a dead letter: give one that `dead` returned"
        ) from None
    return before


def _parts(batch: Sequence[Envelope]) -> Iterator[Sequence[Envelope]]:
    """Split a batch by queue, and each queue's share into what one call takes."""
    shares: Iterable[Sequence[Envelope]]
    if any(envelope.unique for envelope in batch):
        # Of two with one id the first is stored, though their queues differ.
        shares = (list(share) for _, share in itertools.groupby(batch, attrgetter("queue")))
    else:
        by_queue: dict[str, list[Envelope]] = {}
        for envelope in batch:
            by_queue.setdefault(envelope.queue, []).append(envelope)
        shares = by_queue.values()
    for share in shares:
        yield from portions(share, [len(envelope.body) for envelope in share])
