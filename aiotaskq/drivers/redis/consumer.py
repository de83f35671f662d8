"""One incarnation of a worker at the Redis broker.

A receipt is a number that the consumer itself counts up, and the field under which the item
lies in the hash of what it holds. A fetch names the number it begins with; one whose reply was
lost is made good by the next, which names the number where the lost one began and is told what
that took. So nothing is stranded under a consumer that lives on without knowing of it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

import msgspec

from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import MOST, Client, portions
from aiotaskq.drivers.redis.link import Link, Word
from aiotaskq.errors import BrokerUnavailable, LeaseLost, Unavailable
from aiotaskq.message import (
    SUSPECT,
    Again,
    Dead,
    Delivery,
    Done,
    Grant,
    News,
    Release,
    Settlement,
)

_LONGEST_NAP = 0.9  # seconds on the token: what it takes to find work whose token was lost
_MARGIN = 3.0  # seconds that a blocking reply may be late


class RedisConsumer:
    """Fetches and settles under a lease.

    Attributes:
        id: Its own, never used again.
        grant: What names its lease.
        is_open: Whether the lease began, and was not ended by `close`.
    """

    def __init__(
        self,
        client: Client,
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
        introduce: Callable[[Collection[str]], Awaitable[None]],
    ) -> None:
        self.id = f"{name}:{uuid.uuid4().hex}"
        self._client = client
        self._queues = list(queues)
        self._bases = [client.keys.base(queue) for queue in queues]
        self._keys = [*self._bases, client.keys.cancelled]
        self._about = about
        self._introduce = introduce
        self._bell: Link | None = None  # blocks on the tokens
        self._turn = asyncio.Lock()
        self._round: asyncio.Task[float] | None = None  # a fetch under way
        self._spare: deque[Delivery] = deque()  # fetched, not yet returned
        self._next = 0  # receipt number
        self._missed: int | None = None  # receipt number where unanswered fetches began
        self._open: set[int] = set()  # receipt numbers that were handed out and not yet settled
        # Receipt numbers of settlements whose calls failed midway, and their kinds.
        self._unsure: dict[int, type[Settlement]] = {}
        self._told = 0.0  # when the last cancelling was that we know of
        self.grant = Grant(self.id, tuple(queues), lease)
        self.is_open = False

    async def open(self) -> None:
        if self.is_open:
            return
        await self._introduce(self._queues)
        words: list[Word] = [
            self._client.time_shift,
            self.id,
            self.grant.seconds,
            msgspec.json.encode(self._queues) + b"\n" + self._about,
        ]
        now = await self._script(scripts.OPEN, self._bases, words)
        self._told = float(now)
        self.is_open = True

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        async with self._turn:
            while True:
                nap = 0.0
                while nap == 0.0 and len(self._spare) < limit and not self._isolates:
                    nap = await self._take(limit - len(self._spare))
                if self._isolates:
                    return [self._spare.popleft()]
                if self._spare:
                    count = min(limit, len(self._spare))
                    return [self._spare.popleft() for _ in range(count)]
                left = until - loop.time()
                if left <= 0.0:
                    return []
                await self._doze(min(nap, left))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        by_queue: dict[str, list[Settlement]] = {}
        gone: list[Settlement] = []
        for settlement in batch:
            delivery = settlement.delivery
            if delivery.receipt[0] == self.id:
                by_queue.setdefault(delivery.queue, []).append(settlement)
            else:
                gone.append(settlement)
        try:
            for queue, share in by_queue.items():
                gone += await self._settle(queue, share)
        except BaseException:  # any part may have taken effect
            for share in by_queue.values():
                self._unsure.update((one.delivery.receipt[1], type(one)) for one in share)
            raise
        if not gone:
            return ()
        which = set(map(id, gone))
        return [settlement.delivery for settlement in batch if id(settlement) in which]

    async def news(self) -> News:
        reply = await self._script(scripts.NEWS, self._keys, [self.id, f"{self._told:.6f}"])
        if reply is None:
            raise LeaseLost(f"{self.id} was given up for dead")
        suspects, cancelled = reply
        # Each cancelling has a time of its own, greater than those before.
        if cancelled:
            self._told = float(cancelled[-1])
        ids = {items.unpack_id(name) for name in cancelled[::2]}
        return News(cancelled=ids, suspects=bool(suspects))

    async def close(self) -> None:
        was_open, self.is_open = self.is_open, False
        await self.let_go()
        if not was_open:
            return
        try:
            await self._script(scripts.CLOSE, self._keys, [self.id])
        except Unavailable:
            return  # then the lease lapses by itself

    async def let_go(self) -> None:
        """Disconnect, and stop what is under way."""
        current, self._round = self._round, None
        if current is not None:
            current.cancel()
            await asyncio.wait([current])
        bell, self._bell = self._bell, None
        if bell is not None:
            await bell.close()

    async def _script(
        self, script: scripts.Script, keys: Sequence[Word], words: Sequence[Word]
    ) -> Any:
        return await self._client.link.script(script, keys, words)

    # --- fetching -------------------------------------------------------------------------------

    @property
    def _isolates(self) -> bool:
        """Whether the next delivery is a suspect; there is no other then."""
        return bool(self._spare) and self._spare[0].crashes >= SUSPECT

    async def _take(self, limit: int) -> float:
        """Fetch into the spare ones; return the seconds until there may be more, 0 for now.

        A cancelled call leaves the round going, and the next call takes over.
        """
        if self._round is None:
            self._round = asyncio.create_task(self._fetch(min(limit, MOST)))
        current = self._round
        try:
            nap = await asyncio.shield(current)
        except asyncio.CancelledError:
            if current.cancelled() and current is not self._round:
                raise BrokerUnavailable(f"{self._client.address.url}: closed meanwhile") from None
            raise
        finally:
            if current.done() and self._round is current:
                self._round = None
        return nap

    async def _fetch(self, limit: int) -> float:
        first, missed = self._next, self._missed
        self._next += limit
        self._missed = first if missed is None else missed
        words: list[Word] = [
            self._client.time_shift,
            self.id,
            limit,
            first,
            "" if missed is None else missed,
        ]
        reply = await self._script(scripts.FETCH, self._keys, words)
        self._missed = None
        if reply is None:
            raise LeaseLost(f"{self.id} was given up for dead")
        wait, unfinished, runs, now = reply
        before = len(self._spare)
        for queue, number, *packed in runs:
            self._unpack(self._queues[queue - 1], number, packed, float(now))
        if unfinished or len(self._spare) - before == MOST:
            return 0.0  # one call takes no more than that, and there may be more
        return min(_LONGEST_NAP, float(wait)) if wait else _LONGEST_NAP

    def _unpack(self, queue: str, number: int, packed: list[bytes], now: float) -> None:
        mine, unpack = self.id, items.unpack
        self._spare.extend(
            [unpack(item, queue, (mine, at), now) for at, item in enumerate(packed, number)]
        )
        self._open.update(range(number, number + len(packed)))

    async def _doze(self, seconds: float) -> None:
        """Wait for a token, which says that there is something to fetch."""
        if self._bell is None:
            self._bell = self._client.new_link()
        bell = self._bell
        # Redis takes 0 for "for ever".
        words: list[Word] = ["BLPOP", *(f"{base}wake" for base in self._bases)]
        try:
            await bell.command(*words, f"{max(seconds, 0.001):.3f}", patience=seconds + _MARGIN)
        except asyncio.CancelledError:
            bell.drop()  # or the next token would go to somebody who is not there
            raise

    # --- settling -------------------------------------------------------------------------------

    async def _settle(self, queue: str, share: list[Settlement]) -> list[Settlement]:
        if all(type(settlement) is Done for settlement in share):
            numbers = {settlement.delivery.receipt[1] for settlement in share}
            # What is held, as far as we know, is asked for in one word; only where we are
            # wrong, or told so before, the script has to tell which.
            if len(numbers) == len(share) and numbers <= self._open:
                return await self._settle_done(queue, share)
        gone: list[Settlement] = []
        # What is released goes before what was released earlier: the oldest at last.
        ordered = sorted(share, key=_order)
        for part in portions((_size(settlement), settlement) for settlement in ordered):
            gone += await self._settle_any(queue, part)
        return gone

    async def _settle_done(self, queue: str, share: list[Settlement]) -> list[Settlement]:
        base = self._client.keys.base(queue)
        gone: list[Settlement] = []
        for start in range(0, len(share), MOST):
            part = share[start : start + MOST]
            numbers: list[int] = [settlement.delivery.receipt[1] for settlement in part]
            self._open.difference_update(numbers)
            count = await self._script(scripts.DONE, [base], [self.id, *numbers])
            if count != len(part):  # the lease is gone, or the server lost what it had
                gone += part
        return gone

    async def _settle_any(self, queue: str, part: list[Settlement]) -> list[Settlement]:
        keys = [self._client.keys.cancelled, self._client.keys.base(queue)]
        words: list[Word] = [self._client.time_shift, self.id]
        await self._introduce({one.envelope.queue for one in part if isinstance(one, Again)})
        for settlement in part:
            self._open.discard(settlement.delivery.receipt[1])
            words += self._words(settlement, keys)
        reply = await self._script(scripts.SETTLE, keys, words)
        unsure = self._learn(part) if self._unsure else ()
        if reply is None:
            return part
        left = Counter(map(int, reply))
        # An earlier call settled them, and only its reply was lost: nobody else can have.
        left.subtract([number for number in unsure if left[number]])
        gone: list[Settlement] = []
        # A receipt that is settled twice in one batch is gone the second time only.
        for settlement in reversed(part):
            number = settlement.delivery.receipt[1]
            if left[number]:
                left[number] -= 1
                gone.append(settlement)
        return gone

    def _learn(self, part: list[Settlement]) -> Iterable[int]:
        """Return the receipt numbers that an earlier call may have settled in the same way."""
        earlier = {one.delivery.receipt[1]: type(one) for one in part}.items() & (
            self._unsure.items()
        )
        for settlement in part:
            self._unsure.pop(settlement.delivery.receipt[1], None)
        return [number for number, _ in earlier]

    def _words(self, settlement: Settlement, keys: list[str]) -> tuple[Word, ...]:
        """Return a settlement as `settle.lua` takes it; a queue it goes to is added to `keys`."""
        number: int = settlement.delivery.receipt[1]
        match settlement:
            case Done():
                return b"d", number
            case Again(envelope=envelope):
                base = self._client.keys.base(envelope.queue)
                if base not in keys:
                    keys.append(base)
                due, item = items.place(envelope, self._client.serials)
                return b"a", number, keys.index(base) + 1, due, item
            case Dead(reason=reason, details=details):
                return b"x", number, msgspec.json.encode(reason), details
            case Release():
                return b"r", number


def _order(settlement: Settlement) -> tuple[bool, int]:
    if type(settlement) is Release:
        return True, -settlement.delivery.receipt[1]
    return False, 0


def _size(settlement: Settlement) -> int:
    match settlement:
        case Again(envelope=envelope):
            return len(envelope.body)
        case Dead(details=details):
            return len(details)
    return 0
