"""A consumer at the PostgreSQL broker: a row with a lease, and the messages held under it.

Theory of operation. A consumer is new (it has no row), open, or closed. While it is open, another
process may fence its row at any moment: then `fetch` and `news` raise `LeaseLost`, `settle` reports
every delivery as no longer held, and the messages go to other consumers.

A receipt is the number of the message's row and the token of the fetch that took it; each fetch has
a higher token than the one before. Between any two steps a call may be cancelled, or may lose the
answer of the server:

- Fetching. Invariant: each message that the consumer holds was returned to the caller, or is in
  `_buffer`, or is in `_cancelled`, or was taken with the token `_unanswered` or a later one.
  A fetch without an answer leaves `_unanswered` behind. The next one first raises the floor of the
  row above all tokens used so far, so that a statement that arrives late takes nothing. Then it
  loads the messages taken since. An answer is put into `_buffer` before anything else is awaited.
- Settling. A call without an answer leaves its receipts in `_unsure`. When the caller repeats it
  and the server no longer finds a receipt, the earlier call has settled it: no other process could,
  as long as the lease was not lost.
- Waiting. `_waits` says that the row is marked as waiting, or that the mark was cleared by a notice
  that is on its way; see `notify`. A consumer that stops waiting with such a notice unheard, or
  with a message about to fall due, notifies another one in its place.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import asyncpg
import msgspec

from aiotaskq.backoff import jittered
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.common.deliveries import hand_out
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.drivers.postgres.maintenance import extend_leases, promote
from aiotaskq.drivers.postgres.messages import insert
from aiotaskq.drivers.postgres.notify import PostgresListener, PostgresNotifier
from aiotaskq.drivers.postgres.sql import consumers as consumers_sql
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.drivers.postgres.storable import storable_text
from aiotaskq.errors import BatchRefused, BrokerUnavailable, LeaseLost
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.drivers.postgres")

Receipt: TypeAlias = tuple[int, int]

# Seconds. A consumer that waits looks at least that often, to find messages whose notice was lost.
_LONGEST_PAUSE = 2.0
_DEAF_PAUSE = 0.5  # the same while there is no connection that receives notices


class PostgresConsumer:
    """A consumer; see `aiotaskq.contract.broker.Consumer`.

    Args:
        pool: The pool of the broker.
        notifier: The notifier of the broker.
        shift: Returns the offset of the clock in seconds, for tests.
        queues: The queues, in the order of draining.
        name: The name of the worker, for people.
        lease: The length of the lease in seconds.
        about: Information about the worker, for `Broker.consumers`.
    """

    def __init__(
        self,
        pool: PostgresPool,
        notifier: PostgresNotifier,
        shift: Callable[[], float],
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
    ) -> None:
        self.id = f"{name}.{uuid.uuid4().hex}"
        self._pool = pool
        self._notifier = notifier
        self._shift = shift
        self._queues = list(queues)
        self._name = name
        self._lease = lease
        self._about = about
        self._number = 0  # of its row; 0 while it has none
        self._closed = False
        self._fetch_lock = asyncio.Lock()
        self._listener = PostgresListener()
        self._buffer: deque[Delivery] = deque()  # taken, but not returned yet
        self._token = 0  # of the last fetch
        self._unanswered: int | None = None  # the first token of fetches without an answer
        self._cancelled: list[Receipt] = []  # taken, but cancelled: to be deleted
        self._waits = False  # whether its row is marked, or a notice is on its way
        self._left_suspects = False  # whether the last fetch left suspects to others
        self._reported: set[Receipt] = set()  # receipts reported as cancelled by `news`
        # Receipts of calls of `settle` without an answer, and the kinds of their settlements.
        self._unsure: dict[Receipt, type[Settlement]] = {}

    @property
    def grant(self) -> Grant:
        return Grant(self.id, tuple(self._queues), self._lease)

    async def open(self) -> None:
        if self._number:
            return
        names = self._pool.names

        async def join(connection: Connection) -> int:
            # Until this is committed nobody is fenced, as in `PostgresLease.renew`.
            await connection.fetch(names.render(consumers_sql.LOCK_SILENCE))
            [row] = await connection.fetch(
                names.render(consumers_sql.ADD_CONSUMER),
                self._shift(),
                self.id,
                self._name,
                self._queues,
                self._about,
                self._lease,
            )
            # The server was started after the last sign of life. So it was away, and the other
            # consumers, which will be back in a moment, could not renew their leases.
            if row["last_beat"] is not None and row["started"] > row["last_beat"]:
                await extend_leases(connection, names, self._shift())
            return int(row["number"])

        self._number = await self._pool.transact(join, repeat=True)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        queues = self._queues if order is None else list(order)
        async with self._fetch_lock:
            while True:
                pause = _LONGEST_PAUSE
                if not self._buffer:
                    self._listener.event.clear()
                    pause = await self._take(limit, queues)
                if self._buffer:
                    await self._stop_waiting(pause)
                    return hand_out(self._buffer, limit)
                left = until - loop.time()
                if left <= 0.0:
                    return []
                # After marking its row it looks once more: see `notify`.
                if not await self._mark_as_waiting():
                    longest = pause if self._notifier.listens else min(pause, _DEAF_PAUSE)
                    await self._wait_for_notice(min(left, longest))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        if not batch:
            return []
        refused: dict[int, Exception] = {}
        try:
            try:
                settled = await self._settle(batch)
            except UnstorableValue:
                settled = await self._settle_singly(batch, refused)
        except BaseException:  # any part may have taken effect
            self._unsure.update((one.delivery.receipt, type(one)) for one in batch)
            raise
        if self._left_suspects:
            self._listener.event.set()  # it may hold nothing now, and so may be given a suspect
        done = [one for place, one in enumerate(batch) if place not in refused]
        gone = [one for one in done if not _remove(settled, one)]
        if self._unsure:
            gone = await self._without_unsure(done, gone)
        answer = [one.delivery for one in gone]
        if refused:
            raise BatchRefused(refused, answer=answer)
        return answer

    async def news(self) -> News:
        rows = await self._pool.fetch(consumers_sql.NEWS, self._number, self._queues)
        if not rows:
            raise LeaseLost(f"the lease of {self.id} is lost")
        cancelled: dict[Receipt, str] = {}
        if rows[0]["cancels"]:
            for row in await self._pool.fetch(messages_sql.CANCELLED_OF, self._number):
                cancelled[row["seq"], row["token"]] = row["id"]
        before, self._reported = self._reported, set(cancelled)
        new = {name for receipt, name in cancelled.items() if receipt not in before}
        return News(cancelled=new, suspects=rows[0]["suspects"])

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._listener.event.set()  # a `fetch` that waits looks, and finds the lease lost
        if not self._number:
            return
        self._notifier.forget(self._number)
        try:
            back = await self._pool.transact(self._leave, repeat=True)
        except BrokerUnavailable:
            return  # the lease lapses by itself
        await self._notifier.wake(back)

    async def _leave(self, connection: Connection) -> dict[str, int]:
        """Hand back all messages and remove the row; return the number for each queue."""
        render = self._pool.names.render
        if not await connection.fetch(render(consumers_sql.LOCK_CONSUMER), self._number):
            return {}  # fenced: others take its messages back, and count the crash
        rows = await connection.fetch(render(messages_sql.RELEASE_ALL), self._number)
        await connection.fetch(render(consumers_sql.REMOVE_CONSUMER), self._number)
        return {row["queue"]: row["count"] for row in rows}

    # --- taking ---------------------------------------------------------------------------------

    async def _take(self, limit: int, queues: list[str]) -> float:
        """Take messages into the buffer; return the seconds after which to look again."""
        if self._unanswered is not None:
            await self._recover()
            if self._buffer:
                return _LONGEST_PAUSE
        await self._delete_cancelled()
        head, rows = await self._try_to_take(limit, queues, promoted=False)
        now, next_due = head["now"], head["expires_at"]
        promoted: dict[str, int] = {}
        if next_due is not None and next_due <= now:
            promoted = await promote(self._pool, self._shift())
            head, rows = await self._try_to_take(limit, queues, promoted=True)
            now, next_due = head["now"], head["expires_at"]
        # Before the next await, at which this call may be cancelled.
        deliveries = [_delivery(row, now, self._token) for row in rows if not row["cancelled"]]
        self._add_to_buffer(deliveries, queues)
        self._cancelled += [(row["seq"], self._token) for row in rows if row["cancelled"]]
        self._left_suspects = head["cancelled"] and not deliveries
        if sum(promoted.values()) > len(rows):
            await self._notifier.wake(promoted)
        await self._delete_cancelled()
        pause = jittered(_LONGEST_PAUSE)  # consumers do not all look at the same moment
        return pause if next_due is None else min(max(next_due - now, 0.0), pause)

    async def _delete_cancelled(self) -> None:
        if self._cancelled:
            seqs, tokens = zip(*self._cancelled, strict=True)
            await self._pool.fetch(messages_sql.DONE, self._number, list(seqs), list(tokens))
            self._cancelled.clear()

    async def _try_to_take(
        self, limit: int, queues: list[str], *, promoted: bool
    ) -> tuple[asyncpg.Record, Sequence[asyncpg.Record]]:
        """Run the statement that takes messages; return its overview, and the rows taken.

        In the overview, `expires_at` is the next due time, and `cancelled` says that suspects wait.
        """
        self._token += 1
        self._unanswered = self._token
        rows = await self._pool.fetch(
            messages_sql.TAKE,
            self._shift(),
            self._number,
            self._token,
            queues,
            limit,
            not promoted,
            repeat=False,
        )
        self._unanswered = None
        if not rows:
            raise LeaseLost(f"the lease of {self.id} is lost")
        return rows[0], rows[1:]

    async def _recover(self) -> None:
        """Put the messages that fetches without an answer took into the buffer."""

        async def recover(connection: Connection) -> list[asyncpg.Record] | None:
            render = self._pool.names.render
            floor = self._token + 1
            if not await connection.fetch(render(consumers_sql.RAISE_FLOOR), self._number, floor):
                return None
            return await connection.fetch(
                render(messages_sql.TAKEN_SINCE),
                self._shift(),
                self._number,
                self._unanswered,
                self._queues,
            )

        rows = await self._pool.transact(recover, repeat=True)
        if rows is None:
            raise LeaseLost(f"the lease of {self.id} is lost")
        deliveries = [_delivery(row, row["now"], row["token"]) for row in rows]
        self._add_to_buffer(deliveries, self._queues)
        self._unanswered = None  # last: nobody else knows of them

    def _add_to_buffer(self, deliveries: list[Delivery], queues: Sequence[str]) -> None:
        """Add deliveries in the order in which they are to be returned."""
        places = {queue: place for place, queue in enumerate(queues)}
        deliveries.sort(key=lambda one: (places[one.queue], -one.priority, one.receipt))
        self._buffer.extend(deliveries)

    # --- waiting --------------------------------------------------------------------------------

    async def _mark_as_waiting(self) -> bool:
        """Mark its row; return whether the mark is new, so that it has to look once more."""
        if not await self._notifier.listen(self._number, self._listener):
            return False
        if self._waits and not self._listener.notified:
            return False
        self._waits, self._listener.notified = True, False
        return bool(await self._pool.fetch(consumers_sql.SET_WAITING, self._number))

    async def _stop_waiting(self, pause: float) -> None:
        """Clear the mark of its row, and notify another consumer if this one may be missed."""
        if not self._waits:
            return
        notified, self._waits, self._listener.notified = self._listener.notified, False, False
        try:
            # If it was not notified and its mark is gone, a notice is on its way here, perhaps for
            # a message that is left when this consumer goes to work.
            wasted = not notified and not await self._pool.fetch(
                consumers_sql.CLEAR_WAITING, self._number
            )
        except BrokerUnavailable as error:  # its messages are to be returned all the same
            logger.debug("still marked as waiting: %s", error)
            return
        # With a short pause, a message is about to fall due, and only this consumer may know it.
        if wasted or pause < _LONGEST_PAUSE / 2:
            await self._notifier.wake({self._queues[0]: 1})

    async def _wait_for_notice(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0.001)):
                await self._listener.event.wait()
        except TimeoutError:
            return  # it is time to look

    # --- settling -------------------------------------------------------------------------------

    async def _settle(self, batch: Sequence[Settlement]) -> set[Receipt]:
        """Settle a batch; return the receipts that it settled."""
        if all(type(one) is Done for one in batch):
            rows = await self._pool.fetch(messages_sql.DONE, *self._receipts(batch), repeat=False)
            return {(row["seq"], row["token"]) for row in rows}
        settled, back = await self._pool.transact(
            lambda connection: self._settle_any(connection, batch), repeat=False
        )
        await self._notifier.wake(back)
        return settled

    async def _settle_singly(
        self, batch: Sequence[Settlement], refused: dict[int, Exception]
    ) -> set[Receipt]:
        """Settle each by itself, where PostgreSQL cannot store a value of one of them."""
        settled: set[Receipt] = set()
        for place, one in enumerate(batch):
            try:
                settled |= await self._settle([one])
            except UnstorableValue as error:
                refused[place] = error
        return settled

    async def _settle_any(
        self, connection: Connection, batch: Sequence[Settlement]
    ) -> tuple[set[Receipt], dict[str, int]]:
        """Settle a batch of any kinds; return the receipts settled, and the messages stored."""
        settled: set[Receipt] = set()
        back: dict[str, int] = {}

        async def run(template: str, some: Sequence[Settlement], *more: Any) -> None:
            if some:
                statement = self._pool.names.render(template)
                rows = await connection.fetch(statement, *self._receipts(some), *more)
                settled.update((row["seq"], row["token"]) for row in rows)

        ended = [one for one in batch if isinstance(one, Done | Again)]
        await run(messages_sql.DONE, ended)
        again = _successors([one for one in ended if isinstance(one, Again)], settled)
        await insert(connection.fetch, self._pool.names, again, shift=self._shift())
        dead = [one for one in batch if isinstance(one, Dead)]
        reasons = [storable_text(one.reason) for one in dead]
        details = [one.details for one in dead]
        await run(messages_sql.MOVE_TO_DEAD, dead, reasons, details, self._shift())
        released = [one for one in batch if isinstance(one, Release)]
        await run(messages_sql.RELEASE, released)
        for queue in [*(one.queue for one in again), *(one.delivery.queue for one in released)]:
            back[queue] = back.get(queue, 0) + 1
        return settled, back

    def _receipts(self, batch: Sequence[Settlement]) -> tuple[int, list[int], list[int]]:
        receipts = [one.delivery.receipt for one in batch]
        return self._number, [seq for seq, _ in receipts], [token for _, token in receipts]

    async def _without_unsure(
        self, batch: Sequence[Settlement], gone: list[Settlement]
    ) -> list[Settlement]:
        """Leave out what an earlier call without an answer has settled in the same way.

        While the lease is alive, nobody else can have done it.
        """
        sure = [one for one in gone if self._unsure.get(one.delivery.receipt) is not type(one)]
        for one in batch:
            self._unsure.pop(one.delivery.receipt, None)
        if len(sure) < len(gone) and not await self._pool.fetch(
            consumers_sql.IS_ALIVE, self._number
        ):
            return gone
        return sure


def _remove(settled: set[Receipt], one: Settlement) -> bool:
    """Remove a receipt; return whether it was there. Settled twice in a batch, it counts once."""
    if one.delivery.receipt not in settled:
        return False
    settled.discard(one.delivery.receipt)
    return True


def _successors(batch: Sequence[Again], settled: set[Receipt]) -> list[Envelope]:
    """Return the envelopes to store in place of settled ones, each once.

    Not as unique ones: those of the same id would be refused.
    """
    left = set(settled)
    return [
        msgspec.structs.replace(one.envelope, unique=False) for one in batch if _remove(left, one)
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
