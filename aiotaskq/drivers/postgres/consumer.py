"""One incarnation of a worker at the PostgreSQL broker: a row with a lease, and what is held.

A receipt is the row's number in the line and the token of the fetch that took it. A fetch whose
answer was lost, or was not waited for, is made good by the next one, which asks what the tokens
since then took, and raises a floor so that nothing is taken under them any more.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import asyncpg
import msgspec

from aiotaskq.contract.message import SUSPECT, Delivery, Envelope
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.housekeeping import promote, spare
from aiotaskq.drivers.postgres.link import Connection, Link
from aiotaskq.drivers.postgres.messages import insert
from aiotaskq.drivers.postgres.repair import cleaned
from aiotaskq.drivers.postgres.waking import Bell, Ear
from aiotaskq.errors import BrokerUnavailable, LeaseLost

logger = logging.getLogger("aiotaskq.drivers.postgres")

Receipt: TypeAlias = tuple[int, int]

_LONGEST_NAP = 2.0  # seconds: what it takes to find work whose notice was lost


class PostgresConsumer:
    """See `aiotaskq.contract.broker.Consumer`.

    Args:
        link: Of the broker.
        bell: Of the broker.
        shift: Returns the seconds that the clock is ahead, for tests.
        queues: In the order of draining.
        name: For people.
        lease: Seconds.
        about: What it tells of itself.
    """

    def __init__(
        self,
        link: Link,
        bell: Bell,
        shift: Callable[[], float],
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
    ) -> None:
        self.id = f"{name}.{uuid.uuid4().hex}"
        self._link = link
        self._bell = bell
        self._shift = shift
        self._queues = list(queues)
        self._name = name
        self._lease = lease
        self._about = about
        self._number = 0  # of its row; no row has 0
        self._closed = False
        self._turn = asyncio.Lock()
        self._ear = Ear()
        self._spare: deque[Delivery] = deque()  # taken, not yet returned
        self._token = 0  # of the last fetch
        self._missed: int | None = None  # token where unanswered fetches began
        self._waits = False  # whether its row says so, unless a notice is on its way
        self._passed_over = False  # whether the last fetch left suspects to others
        self._vain: list[Receipt] = []  # of what was taken and is cancelled, until it is settled
        self._told: set[Receipt] = set()  # receipts whose cancelling was told
        # Receipts of settlements whose calls failed midway, and their kinds.
        self._unsure: dict[Receipt, type[Settlement]] = {}

    @property
    def grant(self) -> Grant:
        return Grant(self.id, tuple(self._queues), self._lease)

    async def open(self) -> None:
        if self._number:
            return
        names = self._link.names

        async def join(connection: Connection) -> int:
            # Nobody judges before this is committed, as in `PostgresLease.renew`.
            await connection.fetch(names.render(sql.SILENCE))
            [row] = await connection.fetch(
                names.render(sql.ADD_CONSUMER),
                self._shift(),
                self.id,
                self._name,
                self._queues,
                self._about,
                self._lease,
            )
            # The server was started after the last sign of life, so it was away, and the others,
            # who come back in a moment, are not to be judged by that.
            if row["last_beat"] is not None and row["started"] > row["last_beat"]:
                await spare(connection, names, self._shift())
            return int(row["number"])

        self._number = await self._link.transact(join, repeat=True)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        queues = self._queues if order is None else list(order)
        async with self._turn:
            while True:
                nap = _LONGEST_NAP
                if not self._spare:
                    self._ear.event.clear()
                    nap = await self._take(limit, queues)
                if self._spare:
                    await self._wait_no_more(nap)
                    return self._return(limit)
                left = until - loop.time()
                if left <= 0.0:
                    return []
                # Whoever has just said that it waits looks once more: see `waking`.
                if not await self._say_that_it_waits():
                    await self._doze(min(left, nap))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        if not batch:
            return []
        try:
            settled = await self._settle(batch)
        except BaseException:  # any part may have taken effect
            self._unsure.update((one.delivery.receipt, type(one)) for one in batch)
            raise
        if self._passed_over:
            self._ear.event.set()  # it may hold nothing any more
        gone = [one for one in batch if not _strike(settled, one)]
        if self._unsure:
            gone = await self._without_unsure(batch, gone)
        return [one.delivery for one in gone]

    async def news(self) -> News:
        rows = await self._link.fetch(sql.NEWS, self._number, self._queues)
        if not rows:
            raise LeaseLost(f"the lease of {self.id} is lost")
        cancelled: dict[Receipt, str] = {}
        if rows[0]["cancels"]:
            for row in await self._link.fetch(sql.CANCELLED_OF, self._number):
                cancelled[row["seq"], row["token"]] = row["id"]
        before, self._told = self._told, set(cancelled)
        told = {name for receipt, name in cancelled.items() if receipt not in before}
        return News(cancelled=told, suspects=rows[0]["suspects"])

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ear.event.set()  # a `fetch` that waits finds out
        if not self._number:
            return
        self._bell.forget(self._number)
        try:
            back = await self._link.transact(self._end, repeat=True)
        except BrokerUnavailable:
            return  # as the protocol has it: the lease lapses by itself
        await self._bell.wake(back)

    async def _end(self, connection: Connection) -> dict[str, int]:
        render = self._link.names.render
        if not await connection.fetch(render(sql.LOCK_CONSUMER), self._number):
            return {}  # what it held is taken back, and counted, by others
        rows = await connection.fetch(render(sql.GIVE_BACK_ALL), self._number)
        await connection.fetch(render(sql.REMOVE_CONSUMER), self._number)
        return {row["queue"]: row["count"] for row in rows}

    # --- taking ---------------------------------------------------------------------------------

    def _return(self, limit: int) -> list[Delivery]:
        if self._spare[0].crashes >= SUSPECT:
            return [self._spare.popleft()]
        return [self._spare.popleft() for _ in range(min(limit, len(self._spare)))]

    async def _take(self, limit: int, queues: list[str]) -> float:
        """Take up to a limit; return the seconds until it is worth to look again."""
        if self._missed is not None:
            await self._recall()
            if self._spare:
                return _LONGEST_NAP
        await self._drop_vain()
        head, rows = await self._try_to_take(limit, queues, promoted=False)
        now, next_due = head["now"], head["expires_at"]
        found: dict[str, int] = {}
        if next_due is not None and next_due <= now:
            found = await promote(self._link, self._shift())
            head, rows = await self._try_to_take(limit, queues, promoted=True)
            now, next_due = head["now"], head["expires_at"]
        # Before anything else is waited for, as this call may be cancelled there.
        deliveries = [_delivery(row, now, self._token) for row in rows if not row["cancelled"]]
        self._keep(deliveries, queues)
        self._vain += [(row["seq"], self._token) for row in rows if row["cancelled"]]
        self._passed_over = head["cancelled"] and not deliveries
        if sum(found.values()) > len(rows):
            await self._bell.wake(found)
        await self._drop_vain()
        nap = _LONGEST_NAP * random.uniform(0.8, 1.0)  # not all at the same time
        return nap if next_due is None else min(max(next_due - now, 0.0), nap)

    async def _drop_vain(self) -> None:
        if self._vain:
            seqs, tokens = zip(*self._vain, strict=True)
            await self._link.fetch(sql.DONE, self._number, list(seqs), list(tokens))
            self._vain.clear()

    async def _try_to_take(
        self, limit: int, queues: list[str], *, promoted: bool
    ) -> tuple[asyncpg.Record, Sequence[asyncpg.Record]]:
        self._token += 1
        self._missed = self._token
        rows = await self._link.fetch(
            sql.TAKE,
            self._shift(),
            self._number,
            self._token,
            queues,
            limit,
            not promoted,
            repeat=False,
        )
        self._missed = None
        if not rows:
            raise LeaseLost(f"the lease of {self.id} is lost")
        return rows[0], rows[1:]

    async def _recall(self) -> None:
        async def recall(connection: Connection) -> list[asyncpg.Record] | None:
            render = self._link.names.render
            if not await connection.fetch(render(sql.RAISE_FLOOR), self._number, self._token + 1):
                return None
            return await connection.fetch(
                render(sql.RECALL), self._shift(), self._number, self._missed
            )

        rows = await self._link.transact(recall, repeat=True)
        if rows is None:
            raise LeaseLost(f"the lease of {self.id} is lost")
        self._missed = None
        self._keep([_delivery(row, row["now"], row["token"]) for row in rows], self._queues)

    def _keep(self, deliveries: list[Delivery], queues: Sequence[str]) -> None:
        """Add deliveries to the spare ones, in the order in which they are to be handed out."""
        places = {queue: place for place, queue in enumerate(queues)}
        deliveries.sort(key=lambda one: (places[one.queue], -one.priority, one.receipt))
        self._spare.extend(deliveries)

    # --- waiting --------------------------------------------------------------------------------

    async def _say_that_it_waits(self) -> bool:
        """Return whether nobody could know it before."""
        await self._bell.listen(self._number, self._ear)
        if self._waits and not self._ear.called:
            return False
        self._waits, self._ear.called = True, False
        return bool(await self._link.fetch(sql.WAIT, self._number))

    async def _wait_no_more(self, nap: float) -> None:
        """Before it goes to work: have another one wait for what only this one may know of."""
        if not self._waits:
            return
        was_called, self._waits, self._ear.called = self._ear.called, False, False
        try:
            # Called in the meantime, by a notice that is on its way, for something that may be
            # left to do when this one is at work.
            was_called = was_called or bool(await self._link.fetch(sql.WAIT_NO_MORE, self._number))
        except BrokerUnavailable as error:  # what was taken is to be returned all the same
            logger.debug("still noted as waiting: %s", error)
            return
        if not was_called or nap < _LONGEST_NAP / 2:
            await self._bell.wake({self._queues[0]: 1})

    async def _doze(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0.001)):
                await self._ear.event.wait()
        except TimeoutError:
            return  # it is time to look

    # --- settling -------------------------------------------------------------------------------

    async def _settle(self, batch: Sequence[Settlement]) -> set[Receipt]:
        """Settle; return the receipts that were settled by it."""
        if all(type(one) is Done for one in batch):
            rows = await self._link.fetch(sql.DONE, *self._receipts(batch), repeat=False)
            return {(row["seq"], row["token"]) for row in rows}
        settled, back = await self._link.transact(
            lambda connection: self._settle_any(connection, batch), repeat=False
        )
        await self._bell.wake(back)
        return settled

    async def _settle_any(
        self, connection: Connection, batch: Sequence[Settlement]
    ) -> tuple[set[Receipt], dict[str, int]]:
        settled: set[Receipt] = set()
        back: dict[str, int] = {}

        async def run(template: str, some: Sequence[Settlement], *more: Any) -> None:
            if some:
                statement = self._link.names.render(template)
                rows = await connection.fetch(statement, *self._receipts(some), *more)
                settled.update((row["seq"], row["token"]) for row in rows)

        ended = [one for one in batch if isinstance(one, Done | Again)]
        await run(sql.DONE, ended)
        again = _follow([one for one in ended if isinstance(one, Again)], settled)
        await insert(connection.fetch, self._link.names, again, shift=self._shift())
        dead = [one for one in batch if isinstance(one, Dead)]
        reasons = [cleaned(one.reason) for one in dead]
        await run(sql.BURY, dead, reasons, [one.details for one in dead], self._shift())
        released = [one for one in batch if isinstance(one, Release)]
        await run(sql.RELEASE, released)
        for queue in [*(one.queue for one in again), *(one.delivery.queue for one in released)]:
            back[queue] = back.get(queue, 0) + 1
        return settled, back

    def _receipts(self, batch: Sequence[Settlement]) -> tuple[int, list[int], list[int]]:
        receipts = [one.delivery.receipt for one in batch]
        return self._number, [seq for seq, _ in receipts], [token for _, token in receipts]

    async def _without_unsure(
        self, batch: Sequence[Settlement], gone: list[Settlement]
    ) -> list[Settlement]:
        """Leave out what an earlier call settled in the same way, whose answer was lost.

        While the lease lasts, nobody else can have.
        """
        sure = [one for one in gone if self._unsure.get(one.delivery.receipt) is not type(one)]
        for one in batch:
            self._unsure.pop(one.delivery.receipt, None)
        if len(sure) < len(gone) and not await self._link.fetch(sql.IS_ALIVE, self._number):
            return gone
        return sure


def _strike(settled: set[Receipt], one: Settlement) -> bool:
    """Strike a receipt off; what is settled twice in one batch is gone the second time."""
    if one.delivery.receipt not in settled:
        return False
    settled.discard(one.delivery.receipt)
    return True


def _follow(batch: Sequence[Again], settled: set[Receipt]) -> list[Envelope]:
    """Return the envelopes that follow what was held, each once, and none refused as known."""
    left = set(settled)
    return [
        msgspec.structs.replace(one.envelope, unique=False) for one in batch if _strike(left, one)
    ]


def _delivery(row: asyncpg.Record, now: float, token: int) -> Delivery:
    expires_at = row["expires_at"]
    return Delivery(
        row["id"],
        row["queue"],
        row["body"],
        (row["seq"], token),
        row["crashes"],
        row["priority"],
        expires_at is not None and expires_at <= now,
        expires_at,
        row["crash_note"] or "",
    )
