"""The Redis broker: plain lists, and scripts that move what is in them.

A task pays for what it uses: it is pushed to a list, popped into the hash of what its consumer
holds, and deleted from there. No task rides in a blocking reply: idle consumers block on a token
and then fetch, so that a reply that is lost on the wire strands nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import ClassVar, Self

from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.address import parse
from aiotaskq.drivers.redis.client import MOST, Client, portions
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.link import Word
from aiotaskq.drivers.redis.results import RedisBackend
from aiotaskq.message import DeadLetter, Depth, Envelope, Tended
from aiotaskq.protocols import Traits

_TENDED = 100  # at most, of each queue in one call
_QUEUES = 50  # in one call of a script
_CANCELLED_FOR = 7 * 86_400.0  # seconds for which cancelled ids are known
_LATENESS = 2.5  # seconds after which housekeeping that was asked for is out of date
_LATELY = 30.0  # seconds after a failure in which others may not have found their way back


class RedisBroker:
    """Messages in Redis lists.

    Args:
        url: ``redis://[[user]:password@]host[:port][/database]``, ``rediss://`` for TLS, or
            ``unix:///path/to/socket[?db=database]``.
        prefix: What all keys begin with.

    Raises:
        ConfigError: The URL is none of these.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._client = Client(parse(url), Keys(prefix))
        self._consumers: weakref.WeakSet[RedisConsumer] = weakref.WeakSet()
        self._known: set[str] = set()  # queues that are in the set of queues
        self._known_at = 0  # connects of the link, when that was learned
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
        clone = type(self)(self._given_url, prefix=self._client.keys.prefix)
        clone._time_shift = self._time_shift
        return clone

    def backend(self) -> RedisBackend:
        return RedisBackend(self._given_url, prefix=self._client.keys.prefix)

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
            await self._introduce([queue])
            call = "" if call_id is None else f"{call_id}:{number}"
            words: list[Word] = [self._time_shift, call, *self._layout(part)]
            keys = [self._client.keys.base(queue), self._client.keys.ids]
            reply = await self._client.link.script(scripts.PUBLISH, keys, words)
            refused += [name.decode() for name in reply]
        return refused

    def consumer(self, queues: Sequence[str], *, name: str, lease: float) -> RedisConsumer:
        consumer = RedisConsumer(
            self._client, queues, name=name, lease=lease, introduce=self._introduce
        )
        self._consumers.add(consumer)
        return consumer

    async def cancel(self, ids: Collection[str]) -> None:
        packed = [items.pack_id(name) for name in ids]
        for start in range(0, len(packed), MOST):
            words: list[Word] = [self._time_shift, _CANCELLED_FOR, *packed[start : start + MOST]]
            await self._client.link.script(scripts.CANCEL, [self._client.keys.cancelled], words)

    async def tend(self) -> Tended:
        promoted = reclaimed = 0
        queues = await self._queues()
        for start in range(0, len(queues), _QUEUES):
            reply = await self._tend(queues[start : start + _QUEUES])
            promoted += reply[1]
            reclaimed += reply[2]
        return Tended(promoted=promoted, reclaimed=reclaimed)

    async def depth(self) -> Mapping[str, Depth]:
        depths: dict[str, Depth] = {}
        queues = await self._queues()
        for start in range(0, len(queues), _QUEUES):
            part = queues[start : start + _QUEUES]
            keys = [self._client.keys.base(queue) for queue in part]
            counts = await self._client.link.script(scripts.DEPTH, keys, [self._time_shift])
            for queue, (ready, delayed, held, dead) in zip(part, counts, strict=True):
                if ready or delayed or held or dead:
                    depths[queue] = Depth(ready=ready, delayed=delayed, held=held, dead=dead)
        return depths

    async def purge(self, queue: str) -> int:
        count: int = await self._client.link.script(
            scripts.PURGE, [self._client.keys.base(queue)], []
        )
        return count

    async def dead(self, queue: str, limit: int = 100) -> Sequence[DeadLetter]:
        key = self._client.keys.base(queue) + "dead"
        letters = await self._client.link.command("LRANGE", key, -limit, -1)
        return [items.unpack_dead(letter, queue) for letter in reversed(letters)]

    def _layout(self, part: Sequence[Envelope]) -> list[Word]:
        """Return envelopes of one queue as groups, in order, as `publish.lua` takes them."""
        words: list[Word] = []
        kind, count, counted_at = "", 0, 0
        for envelope in part:
            due, item = items.place(envelope, self._client.serials)
            its_kind = "u" if envelope.unique else "d" if due else str(envelope.priority)
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

    async def _tend(self, queues: Sequence[str]) -> tuple[bytes, int, int]:
        loop = asyncio.get_running_loop()
        link = self._client.link
        missed = link.failed_at is not None and loop.time() - link.failed_at < _LATELY
        words: list[Word] = [
            self._time_shift,
            loop.time() + self._ahead + _LATENESS,
            _TENDED,
            "1" if missed else "",
            *(consumer.id for consumer in list(self._consumers) if consumer.is_open),
        ]
        keys = [*map(self._client.keys.base, queues), self._client.keys.cancelled]
        reply: tuple[bytes, int, int] = await link.script(scripts.TEND, keys, words)
        self._set_clock(float(reply[0]))
        return reply

    def _set_clock(self, server_time: float) -> None:
        self._ahead = server_time - asyncio.get_running_loop().time()

    async def _queues(self) -> list[str]:
        """Return all queues that were ever used."""
        names = await self._client.link.command("SMEMBERS", self._client.keys.queues)
        stored = {name.decode() for name in names}
        if not self._known <= stored:  # the server lost them
            self._known_at = 0
            await self._introduce(self._known - stored)
        return sorted(stored | self._known)

    async def _introduce(self, queues: Collection[str]) -> None:
        """See that queues are in the set of queues, before anything is in them."""
        link = self._client.link
        if self._known_at != link.connects:  # another server, or one that lost something
            self._known.clear()
        if self._known.issuperset(queues):
            return
        held = await link.command("SMISMEMBER", self._client.keys.queues, *queues)
        # Asked first, since a server without memory refuses to add, even what is there.
        if not all(held):
            await link.command("SADD", self._client.keys.queues, *queues)
        self._known.update(queues)
        self._known_at = link.connects


def _parts(batch: Sequence[Envelope]) -> Iterator[list[Envelope]]:
    """Split a batch by queue, and each queue's share into what one call takes."""
    shares: Iterable[Iterable[Envelope]]
    if any(envelope.unique for envelope in batch):
        # Of two with one id the first is stored, though their queues differ.
        shares = (share for _, share in itertools.groupby(batch, attrgetter("queue")))
    else:
        by_queue: dict[str, list[Envelope]] = {}
        for envelope in batch:
            by_queue.setdefault(envelope.queue, []).append(envelope)
        shares = by_queue.values()
    for share in shares:
        yield from portions((len(envelope.body), envelope) for envelope in share)
