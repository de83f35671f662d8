"""One incarnation of a worker over the shards of its queues.

It has a consumer for each queue in each of its shards, all of one id. They are looked into at
once, and what is there is taken from one after the other, in the order of the queues.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from aiotaskq.contract.message import SUSPECT, Delivery
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.redis.cluster.together import together
from aiotaskq.drivers.redis.consumer import BLINK, LONGEST_NAP, MARGIN, RedisConsumer


class ClusterConsumer:
    """See `aiotaskq.contract.broker.Consumer`.

    Args:
        grant: What names its lease.
        parts: By queue, in the order of draining: a consumer for each of its shards.
        forward: Sends on what these settlements have stored where it is not at home.
    """

    def __init__(
        self,
        grant: Grant,
        parts: Mapping[str, Sequence[RedisConsumer]],
        forward: Callable[[Sequence[Settlement]], Awaitable[None]],
    ) -> None:
        self.id = grant.consumer
        self.grant = grant
        self._by_queue = parts
        self._parts = [part for several in parts.values() for part in several]
        self._by_mark = {part.mark: part for part in self._parts}
        self._forward = forward
        self._turn = asyncio.Lock()
        self._turns = itertools.count()
        self._spare: deque[Delivery] = deque()  # taken, not yet returned

    async def open(self) -> None:
        await together(part.open() for part in self._parts)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        if len(self._parts) == 1:
            return await self._parts[0].fetch(limit, wait)
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        rung: set[RedisConsumer] = set()
        async with self._turn:
            while True:
                nap = await self._collect(limit, order, rung)
                if self._spare:
                    return self._hand_out(limit)
                left = until - loop.time()
                if left <= 0.0:
                    return []
                rung = await self._doze(min(nap, left))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        shares: dict[str, list[Settlement]] = {}
        gone: Counter[int] = Counter()
        for settlement in batch:
            mark = settlement.delivery.receipt[0]
            if mark in self._by_mark:
                shares.setdefault(mark, []).append(settlement)
            else:
                gone[id(settlement.delivery)] += 1
        try:
            settled = await together(
                self._by_mark[mark].settle(share) for mark, share in shares.items()
            )
        except BaseException:  # what succeeded is repeated as well, and nobody hears of it here
            for mark, share in shares.items():
                self._by_mark[mark].doubt(share)
            raise
        await self._forward(batch)
        gone.update(id(delivery) for part in settled for delivery in part)
        lost: list[Delivery] = []
        for settlement in batch:
            if gone[id(settlement.delivery)] > 0:
                gone[id(settlement.delivery)] -= 1
                lost.append(settlement.delivery)
        return lost

    async def news(self) -> News:
        told = await together(part.news() for part in self._parts)
        return News(
            cancelled={name for one in told for name in one.cancelled},
            suspects=any(one.suspects for one in told),
        )

    async def close(self) -> None:
        await together(part.close() for part in self._parts)

    # --- fetching -------------------------------------------------------------------------------

    def _hand_out(self, limit: int) -> Sequence[Delivery]:
        """Return what was taken; a suspect alone."""
        if self._spare[0].crashes >= SUSPECT:
            return [self._spare.popleft()]
        return [self._spare.popleft() for _ in range(min(limit, len(self._spare)))]

    def _ordered(self, order: Sequence[str] | None) -> list[RedisConsumer]:
        """Return the parts as they are to be drained; the shards of a queue take turns."""
        turn = next(self._turns)
        ordered: list[RedisConsumer] = []
        for queue in self._by_queue if order is None else order:
            several = self._by_queue[queue]
            first = turn % len(several)
            ordered += (*several[first:], *several[:first])
        return ordered

    async def _collect(
        self, limit: int, order: Sequence[str] | None, rung: set[RedisConsumer]
    ) -> float:
        """Take into the spare ones; return the seconds until there may be more.

        Args:
            limit: The most to take.
            order: Of the queues.
            rung: Those whose tokens were taken, which may be meant for others as well.
        """
        if self._spare:  # of a call that was cancelled
            return 0.0
        for part in self._parts:
            if part.owes:
                self._spare += await part.recover()
                if self._spare:
                    return 0.0
        parts = self._ordered(order)
        # Who holds something wants no suspect, and while there is much, one call will do.
        if self._holds and not rung:
            self._spare += (await parts[0].take(limit, only="others"))[0]
            if len(self._spare) >= limit:
                return 0.0
        seen = await together(part.peek() for part in parts)
        if any(suspects for suspects, _, _ in seen) and not self._holds:
            await self._isolate(
                [part for part, (bad, _, _) in zip(parts, seen, strict=True) if bad]
            )
        waiting = {part for part, (_, more, _) in zip(parts, seen, strict=True) if more}
        for part in parts:
            if part in waiting and len(self._spare) < limit and not self._isolates:
                got, _ = await part.take(limit - len(self._spare), only="others")
                self._spare += got
                waiting.discard(part)
        await together(part.ring() for part in rung & waiting)
        return min(nap for _, _, nap in seen)

    async def _isolate(self, parts: Sequence[RedisConsumer]) -> None:
        """Take one suspect, alone; nothing if others were faster."""
        for part in parts:
            got, _ = await part.take(1, only="suspects")
            self._spare += got
            if got:
                return

    @property
    def _isolates(self) -> bool:
        return bool(self._spare) and self._spare[0].crashes >= SUSPECT

    @property
    def _holds(self) -> bool:
        return any(part.holds for part in self._parts)

    async def _doze(self, seconds: float) -> set[RedisConsumer]:
        """Wait for a token of any shard; return those that had one."""
        if seconds < BLINK:
            await asyncio.sleep(seconds)
            return set()
        dozing = {asyncio.create_task(part.doze(seconds + MARGIN)): part for part in self._parts}
        try:
            await asyncio.wait(
                dozing,
                timeout=min(seconds, LONGEST_NAP),
                return_when=asyncio.FIRST_COMPLETED,
            )
            await together(part.nudge() for task, part in dozing.items() if not task.done())
            rung = await together(dozing)
            return {part for part, had in zip(dozing.values(), rung, strict=True) if had}
        finally:
            for task in dozing:
                task.cancel()
            await asyncio.gather(*dozing, return_exceptions=True)
