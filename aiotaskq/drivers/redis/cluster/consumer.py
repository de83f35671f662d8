"""One incarnation of a worker over a cluster: a consumer for each shard of each queue, of one id.

Theory of operation
-------------------

A part is a `RedisConsumer` of one queue in one shard. Each keeps its own invariants, those of
`aiotaskq.drivers.redis.consumer`. This module adds two things that no part can know alone: which
part comes first, and whether the worker holds anything at all.

* There is no step over several shards. A lease that is lost in one part is lost: `fetch` and
  `news` raise for all. `settle` and `close` go to all parts, each to its end. If one fails, the
  caller repeats all, so the settlements of all parts are marked as uncertain.
* A fetch goes to one part after the other until it has enough. Between two parts it may be
  cancelled, or fail. The deliveries taken by then are in `_fetched`, or in the part
  (`has_unreturned`), and the next fetch returns them before anything else.
* A suspect is handed out alone. Only this module can tell that the worker holds nothing in any
  part. So it looks into all parts first, and then asks one part for suspects only, or for others
  only.
* An idle consumer waits for a token in all parts at once. When the first one comes, it ends the
  waiting of all others, which may have got tokens meanwhile. A token is for any consumer of its
  shard. Where this one does not fetch from a shard whose token it took, it returns the token.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.common.deliveries import hand_out, next_is_suspect
from aiotaskq.drivers.redis.cluster.gather import gather_all, gather_batches
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.notify import LONGEST_WAIT, MARGIN, SHORTEST_WAIT
from aiotaskq.errors import BatchRefused


class ClusterConsumer:
    """Fetches and settles over all shards; see `aiotaskq.contract.broker.Consumer`.

    Args:
        grant: The name of its lease.
        parts: By queue, in the order of draining: a consumer for each of its shards.
        forward: Moves on the messages of these settlements that were stored in a shard that is not
            one of their queue's.
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
        self._by_owner = {part.receipt_owner: part for part in self._parts}
        self._forward = forward
        self._fetching = asyncio.Lock()  # one `fetch` at a time
        self._rounds = itertools.count()
        self._fetched: deque[Delivery] = deque()  # received, not yet returned by `fetch`

    async def open(self) -> None:
        await gather_all(part.open() for part in self._parts)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        if len(self._parts) == 1:
            return await self._parts[0].fetch(limit, wait)
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        notified: set[RedisConsumer] = set()
        async with self._fetching:
            while True:
                pause = await self._collect(limit, order, notified)
                if self._fetched:
                    return hand_out(self._fetched, limit)
                left = until - loop.time()
                if left <= 0.0:
                    return []
                notified = await self._wait(min(pause, left))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        shares: dict[str, list[Settlement]] = {}
        gone: Counter[int] = Counter()
        for settlement in batch:
            owner = settlement.delivery.receipt[0]
            if owner in self._by_owner:
                shares.setdefault(owner, []).append(settlement)
            else:
                gone[id(settlement.delivery)] += 1
        try:
            calls = (self._by_owner[owner].settle(share) for owner, share in shares.items())
            settled, refused = await gather_batches(list(shares.values()), calls, batch)
        except BaseException:  # the caller repeats all shares, also those that succeeded
            for owner, share in shares.items():
                self._by_owner[owner].mark_uncertain(share)
            raise
        await self._forward([one for at, one in enumerate(batch) if at not in refused])
        gone.update(id(delivery) for part in settled for delivery in part)
        lost: list[Delivery] = []
        for settlement in batch:
            if gone[id(settlement.delivery)] > 0:
                gone[id(settlement.delivery)] -= 1
                lost.append(settlement.delivery)
        if refused:
            raise BatchRefused(refused, answer=lost)
        return lost

    async def news(self) -> News:
        replies = await gather_all(part.news() for part in self._parts)
        return News(
            cancelled={name for one in replies for name in one.cancelled},
            suspects=any(one.suspects for one in replies),
        )

    async def close(self) -> None:
        await gather_all(part.close() for part in self._parts)

    # --- fetching -------------------------------------------------------------------------------

    def _ordered(self, order: Sequence[str] | None) -> list[RedisConsumer]:
        """Return the parts as they are to be drained; the shards of a queue take turns."""
        number = next(self._rounds)
        ordered: list[RedisConsumer] = []
        for queue in self._by_queue if order is None else order:
            several = self._by_queue[queue]
            first = number % len(several)
            ordered += (*several[first:], *several[:first])
        return ordered

    async def _collect(
        self, limit: int, order: Sequence[str] | None, notified: set[RedisConsumer]
    ) -> float:
        """Take into `_fetched`; return the seconds until there may be more.

        Args:
            limit: The most to take.
            order: The order of the queues.
            notified: The parts whose tokens were taken, which may concern other consumers as well.
        """
        if self._fetched:  # of a call that was cancelled
            return 0.0
        for part in self._parts:
            if part.has_unreturned:
                self._fetched += await part.recover()
                if self._fetched:
                    return 0.0
        parts = self._ordered(order)
        # A worker that holds something gets no suspect, so it need not look into all parts. While
        # the first part has enough, one call will do.
        if self._holds and not notified:
            self._fetched += (await parts[0].take(limit, only="others"))[0]
            if len(self._fetched) >= limit:
                return 0.0
        seen = await gather_all(part.peek() for part in parts)
        if any(suspects for suspects, _, _ in seen) and not self._holds:
            await self._take_suspect(
                [part for part, (suspects, _, _) in zip(parts, seen, strict=True) if suspects]
            )
        with_items = {part for part, (_, more, _) in zip(parts, seen, strict=True) if more}
        for part in parts:
            if part in with_items and not self._has_enough(limit):
                got, _ = await part.take(limit - len(self._fetched), only="others")
                self._fetched += got
                with_items.discard(part)
        await gather_all(part.return_token() for part in notified & with_items)
        return min(pause for _, _, pause in seen)

    async def _take_suspect(self, parts: Sequence[RedisConsumer]) -> None:
        """Take one suspect, alone; none if other consumers were faster."""
        for part in parts:
            got, _ = await part.take(1, only="suspects")
            self._fetched += got
            if got:
                return

    def _has_enough(self, limit: int) -> bool:
        return len(self._fetched) >= limit or next_is_suspect(self._fetched)

    @property
    def _holds(self) -> bool:
        return any(part.holds for part in self._parts)

    async def _wait(self, seconds: float) -> set[RedisConsumer]:
        """Wait for a token of any part; return the parts that got one."""
        if seconds < SHORTEST_WAIT:
            await asyncio.sleep(seconds)
            return set()
        waiting = {
            asyncio.create_task(part.notifier.wait(seconds + MARGIN)): part for part in self._parts
        }
        try:
            await asyncio.wait(
                waiting,
                timeout=min(seconds, LONGEST_WAIT),
                return_when=asyncio.FIRST_COMPLETED,
            )
            await gather_all(
                part.notifier.wake() for task, part in waiting.items() if not task.done()
            )
            tokens = await gather_all(waiting)
            return {part for part, token in zip(waiting.values(), tokens, strict=True) if token}
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
