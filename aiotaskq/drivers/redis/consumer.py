"""One incarnation of a worker at the Redis broker.

A receipt is a number that the consumer itself counts up, and the field under which the item
lies in the hash of what it holds. A fetch names the number it begins with; one whose reply was
lost is made good by the next, which names the number where the lost one began and is told what
that took. So nothing is stranded under a consumer that lives on without knowing of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from aiotaskq.contract.message import SUSPECT, Delivery
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import MOST, Client, portions
from aiotaskq.drivers.redis.link import Link, Word
from aiotaskq.errors import LeaseLost, Unavailable

Only: TypeAlias = Literal["", "suspects", "others"]

LONGEST_NAP = 0.9  # seconds on the token: what it takes to find work whose token was lost
BLINK = 0.005  # seconds: a shorter nap is not worth asking the server for a token
MARGIN = 3.0  # seconds that a blocking reply may be late


class RedisConsumer:
    """Fetches and settles under a lease.

    Args:
        client: Of the broker.
        queues: In the order in which they are to be drained.
        identity: Its id, never used again.
        lease: Seconds.
        about: What the server keeps about it.
        introduce: What makes queues known before anything is stored in them.

    Attributes:
        id: Its own.
        mark: What its receipts begin with; no other has it.
        grant: What names its lease.
        is_open: Whether the lease began, and was not ended by `close`.
    """

    def __init__(
        self,
        client: Client,
        queues: Sequence[str],
        *,
        identity: str,
        lease: float,
        about: bytes,
        introduce: Callable[[Collection[str]], Awaitable[None]],
    ) -> None:
        self.id = identity
        self._client = client
        self._queues = list(queues)
        self._bases = [client.keys.base(queue) for queue in queues]
        self._keys = [*self._bases, client.keys.cancelled]
        self.mark = f"{self._bases[0]}{identity}"
        self._numbers = {queue: number for number, queue in enumerate(queues, 1)}
        self._nudge = f"{self._bases[0]}nudge:{self.id}"
        self._about = about
        self._introduce = introduce
        self._bell: Link | None = None  # blocks on the tokens
        self._turn = asyncio.Lock()
        self._spare: deque[Delivery] = deque()  # fetched, not yet returned
        self._next = 0  # receipt number
        self._missed: int | None = None  # receipt number where unanswered fetches began
        self._open: set[int] = set()  # receipt numbers that were handed out and not yet settled
        # Receipt numbers of settlements whose calls failed midway, and their kinds.
        self._unsure: dict[int, type[Settlement]] = {}
        self._settling: set[int] = set()  # receipt numbers of settlements that are under way
        self._connects = 0  # of the link, when what is held was last compared
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
            self._about,
        ]
        now = await self._script(scripts.OPEN, self._bases, words)
        self._told = float(now)
        self._connects = self._client.link.connects
        self.is_open = True

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        numbers = () if order is None else [self._numbers[queue] for queue in order]
        async with self._turn:
            while True:
                got, nap = await self.take(limit, numbers)
                if got:
                    return got
                left = until - loop.time()
                if left <= 0.0:
                    return []
                if nap < min(left, LONGEST_NAP):
                    await self._doze_until_due(nap)
                else:
                    await self.doze(min(nap, left))

    async def take(
        self, limit: int, order: Sequence[int] = (), *, only: Only = ""
    ) -> tuple[Sequence[Delivery], float]:
        """Fetch what is there now; return it, and seconds after which there may be more.

        Args:
            limit: The most to take; at least 1.
            order: The numbers of the queues, 1 being the first; empty: as they are named.
            only: What to take; of a worker that has several consumers, one alone cannot tell.
        """
        nap = 0.0
        if self._connects != self._client.link.connects:  # a call less
            await self._compare()
        while nap == 0.0 and len(self._spare) < limit and not self._isolates:
            nap = await self._fetch(min(limit - len(self._spare), MOST), order, only=only)
        if self._isolates:
            return [self._spare.popleft()], nap
        count = min(limit, len(self._spare))
        return [self._spare.popleft() for _ in range(count)], nap

    async def peek(self) -> tuple[bool, bool, float]:
        """Tell whether suspects wait, whether others do, and the seconds until something is due."""
        await self._compare()
        words: list[Word] = [self._client.time_shift, self.id]
        reply = await self._script(scripts.PEEK, self._bases, words)
        if reply is None:
            raise LeaseLost(f"{self.id} was given up for dead")
        suspects, more, due, now = reply
        wait = max(0.0, float(due) - float(now)) if due else LONGEST_NAP
        return bool(suspects), bool(more) or wait == 0.0, wait

    @property
    def holds(self) -> bool:
        """Whether there are deliveries that it has not settled."""
        return bool(self._open)

    @property
    def owes(self) -> bool:
        """Whether an earlier call took something, and was cancelled, or lost its reply."""
        return self._missed is not None or bool(self._spare)

    async def recover(self) -> Sequence[Delivery]:
        """Return what an earlier call took, and nothing else."""
        if self._missed is not None:
            await self._fetch(0, (), only="others")
        got, self._spare = self._spare, deque()
        return got

    async def ring(self) -> None:
        """Give a token back that was taken in vain: wake another one if there is anything."""
        await self._fetch(0, (), only="others")

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        by_queue: dict[str, list[Settlement]] = {}
        gone: list[Settlement] = []
        for settlement in batch:
            delivery = settlement.delivery
            if delivery.receipt[0] == self.mark:
                by_queue.setdefault(delivery.queue, []).append(settlement)
            else:
                gone.append(settlement)
        numbers = {one.delivery.receipt[1] for share in by_queue.values() for one in share}
        self._settling |= numbers
        try:
            for queue, share in by_queue.items():
                gone += await self._settle(queue, share)
        except BaseException:  # any part may have taken effect
            for share in by_queue.values():
                self.doubt(share)
            raise
        finally:
            self._settling -= numbers
        if not gone:
            return ()
        which = set(map(id, gone))
        return [settlement.delivery for settlement in batch if id(settlement) in which]

    def doubt(self, batch: Sequence[Settlement]) -> None:
        """Note settlements of its own that may have taken effect, as nobody was told of."""
        self._unsure.update((one.delivery.receipt[1], type(one)) for one in batch)

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
        """Disconnect."""
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

    async def _fetch(self, limit: int, order: Sequence[int], *, only: Only) -> float:
        """Fetch into the spare ones; return the seconds until there may be more, 0 for now.

        What a cancelled call takes counts as missed, like that of a lost reply.

        Args:
            limit: The most to take, up to `MOST`.
            order: As of `take`.
            only: As of `take`.
        """
        first, missed = self._next, self._missed
        self._next += limit
        self._missed = first if missed is None else missed
        words: list[Word] = [
            self._client.time_shift,
            self.id,
            limit,
            first,
            "" if missed is None else missed,
            only,
            *order,
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
        return min(LONGEST_NAP, float(wait)) if wait else LONGEST_NAP

    def _unpack(self, queue: str, number: int, packed: list[bytes], now: float) -> None:
        mine, unpack = self.mark, items.unpack
        self._spare.extend(
            [unpack(item, queue, (mine, at), now) for at, item in enumerate(packed, number)]
        )
        self._open.update(range(number, number + len(packed)))

    async def _doze_until_due(self, seconds: float) -> None:
        """Wait for a token, but no longer than until something falls due."""
        if seconds < BLINK:
            await asyncio.sleep(seconds)
            return
        # The server may end it a tenth of a second late by itself.
        dozing = asyncio.create_task(self.doze(seconds + MARGIN))
        try:
            await asyncio.wait([dozing], timeout=seconds)
            if not dozing.done():
                await self.nudge()
            await dozing
        finally:
            dozing.cancel()
            # What failed first is told. The other has nothing to add, but has to be asked.
            await asyncio.gather(dozing, return_exceptions=True)

    async def nudge(self) -> None:
        """End its own doze now."""
        await self._script(scripts.NUDGE, [self._nudge], [])

    async def doze(self, seconds: float) -> bool:
        """Wait for a token, which says that there is something to fetch, or for a nudge.

        Returns:
            Whether there was a token.
        """
        if self._bell is None:
            self._bell = self._client.new_link()
        bell = self._bell
        words: list[Word] = ["BLPOP", *(f"{base}wake" for base in self._bases), self._nudge]
        try:
            # Redis takes 0 for "for ever".
            wait = f"{max(seconds, 0.001):.3f}"
            reply = await bell.command(*words, wait, patience=seconds + MARGIN)
        except asyncio.CancelledError:
            bell.drop()  # or the next token would go to somebody who is not there
            raise
        return reply is not None and reply[0] != self._nudge.encode()

    async def _compare(self) -> None:
        """Hand back what the server holds for us and we have settled.

        A server that took another's place, or lost its last seconds, may have forgotten that, and
        would keep it for as long as we live.
        """
        link = self._client.link
        connects = link.connects
        if self._connects not in (0, connects):
            # What is being settled may be on its way to the new server, behind this.
            ours = self._open | self._settling | self._unsure.keys()
            first = self._next if self._missed is None else self._missed
            for base in self._bases:
                held = await link.command("HKEYS", f"{base}held:{self.id}")
                lost = sorted({int(n) for n in held if n.isdigit() and int(n) < first} - ours)
                for start in range(0, len(lost), MOST):
                    words: list[Word] = [self._client.time_shift, self.id]
                    for number in lost[start : start + MOST][::-1]:
                        words += (b"r", number)
                    await self._script(scripts.SETTLE, [self._keys[-1], base], words)
        self._connects = connects

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
        for part in portions(ordered, [_size(settlement) for settlement in ordered]):
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

    async def _settle_any(self, queue: str, part: Sequence[Settlement]) -> Sequence[Settlement]:
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

    def _learn(self, part: Sequence[Settlement]) -> Iterable[int]:
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
