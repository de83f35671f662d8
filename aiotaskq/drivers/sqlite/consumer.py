"""A consumer at an SQLite file: one incarnation of a worker, and the messages that it holds.

Theory of operation. States: new (number 0), open (a row in ``consumers``), *fenced* by another
process or removed, closed. Only `open` leads from new to open, and nothing leads back.

A message is held by the number of the consumer's row and a *token*, which is another one for each
hand-out. A receipt is the message's place in the queue and the token. *Invariant: a settlement
takes effect only if exactly this hand-out is still held and the consumer is alive*; both are
looked at in the transaction that applies it. So a settlement that comes twice, or after the
message was taken back and handed out again, changes nothing.

A consumer is *alive* while a row has its number and its id and is not fenced. The number alone
proves nothing: in a file that has replaced another one, places, numbers and tokens begin at 1 again
and belong to others. So every job looks at both before it acts by number.

Events that may come between any two steps:

- A call of `fetch` is cancelled while its job waits or runs. The job may take messages that nobody
  receives. Its future is kept in `_abandoned`, and the messages are handed back by the next job:
  one that is submitted at once, or the next fetch.
- Another process fences the consumer at any time. Each job looks at that first, and again inside
  the transaction that takes messages.
- Something is stored between a fetch that found nothing and the wait. The order of the steps in
  `fetch` covers that; see `aiotaskq.drivers.sqlite.notify`.
- The process dies. Its row and its holds stay, and maintenance takes the messages back.
- A power cut may undo the last holds, as they are written in relaxed transactions. After a power
  cut there is no process that could have relied on them.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.connection import SQLiteConnection
from aiotaskq.drivers.sqlite.database import Row, SQLiteDatabase
from aiotaskq.drivers.sqlite.lease import note_beat, remove
from aiotaskq.drivers.sqlite.maintenance import promote
from aiotaskq.drivers.sqlite.messages import (
    BUDGET,
    UNSTORABLE_ERRORS,
    add,
    as_bytes,
    as_number,
    as_text,
    unstorable,
)
from aiotaskq.drivers.sqlite.notify import SQLiteListener, queue_topic
from aiotaskq.drivers.sqlite.process_identity import this_process
from aiotaskq.errors import BatchRefused, BrokerUnavailable, LeaseLost

Taken = tuple[list[Delivery], float | None]
"""Deliveries; and if there are none, the time at which there may be some."""


class SQLiteConsumer:
    """See `aiotaskq.contract.broker.Consumer`.

    Args:
        connection: The broker's connection.
        listener: The broker's listener.
        now: Returns the time of the store.
        queues: The queues, in the order of draining.
        name: The worker's name, for people.
        lease: Seconds.
        about: The text that `Broker.consumers` returns for this consumer.
    """

    def __init__(
        self,
        connection: SQLiteConnection,
        listener: SQLiteListener,
        now: Callable[[], float],
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
    ) -> None:
        self.id = f"{name}.{uuid.uuid4().hex}"
        self._connection = connection
        self._listener = listener
        self._now = now
        self._queues = tuple(queues)
        self._topics = [queue_topic(queue) for queue in self._queues]
        self._name = name
        self._lease = lease
        self._about = about
        self._number = 0  # of its row; no row has 0
        self._token = 0  # of the last hand-out
        self._closed = False
        self._told: set[tuple[int, int]] = set()  # hand-outs that `news` reported as cancelled
        self._passed_over = False  # whether the last fetch left suspects to others
        self._look = asyncio.Event()  # set where there is a reason to look
        # Jobs of `fetch` calls that were cancelled: the messages that they took have to go back.
        self._abandoned: deque[Future[Taken]] = deque()

    @property
    def grant(self) -> Grant:
        return Grant(self.id, self._queues, self._lease)

    async def open(self) -> None:
        if self._number == 0:
            self._number = await self._connection.run(self._register)
            self._listener.add(self._look)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        end = time.monotonic() + wait
        queues = self._queues if order is None else order
        taken, _ = await self._take(limit, queues)
        while not taken and time.monotonic() < end:
            # In this order: a change is either found by the look or notified after `listen`.
            self._look.clear()
            await self._listener.listen(self._topics)
            taken, due_at = await self._take(limit, queues)
            if not taken:
                seconds = end - time.monotonic()
                if due_at is not None:
                    seconds = min(seconds, due_at - self._now())
                await self._listener.wait(self._look, max(seconds, 0.001))
        return taken

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        if not batch:
            return []
        gone = await self._connection.run(partial(self._settle, batch=list(batch)))
        if self._passed_over:
            self._look.set()  # it may hold nothing any more
        return gone

    async def news(self) -> News:
        rows, suspects = await self._connection.run(self._read_news)
        before, self._told = self._told, {(seq, token) for seq, token, _ in rows}
        cancelled = {name for seq, token, name in rows if (seq, token) not in before}
        return News(cancelled=cancelled, suspects=suspects)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._look.set()  # a `fetch` that waits notices it
        self._listener.discard(self._look)
        if self._number:
            try:
                await asyncio.shield(self._connection.run(self._end))
            except BrokerUnavailable:
                return  # as the contract has it: the lease lapses by itself

    # --- taking ---

    async def _take(self, limit: int, queues: Sequence[str]) -> Taken:
        job = self._connection.submit(partial(self._pick_if_any, limit=limit, queues=queues))
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            self._abandoned.append(job)
            if self._connection.is_open:
                self._connection.submit(self._hand_back)
            raise

    def _pick_if_any(self, database: SQLiteDatabase, limit: int, queues: Sequence[str]) -> Taken:
        now = self._now()
        self._check_alive(database)
        self._hand_back(database)
        [(due_at, suspects)] = database.rows(sql.OUTLOOK)
        is_due = due_at is not None and due_at <= now
        alone = bool(suspects) and self._suspects_wait(database)
        self._passed_over = alone and bool(database.rows(sql.HOLDS_ANY, (self._number,)))
        alone = alone and not self._passed_over
        # Reading first: a fetch that finds nothing must not keep others from writing.
        if not (is_due or alone or any(database.rows(sql.ANY_READY, (one,)) for one in queues)):
            return [], due_at
        # Relaxed: after a power cut there is no consumer, and held is as good as ready.
        with database.write(relaxed=True):
            self._check_alive(database)
            if alone and (taken := self._pick_suspect(database, queues, now)):
                return taken, None
            more = is_due and promote(database, now) == BUDGET
            return self._pick(database, queues, limit, now), now if more else None

    def _pick(
        self, database: SQLiteDatabase, queues: Sequence[str], limit: int, now: float
    ) -> list[Delivery]:
        self._token += 1
        taken: list[Delivery] = []
        for queue in queues:
            rows = database.rows(sql.NEXT_READY, (queue, limit - len(taken)))
            self._take_rows(database, queue, rows, now, taken)
            if len(taken) == limit:
                break
        return taken

    def _pick_suspect(
        self, database: SQLiteDatabase, queues: Sequence[str], now: float
    ) -> list[Delivery]:
        self._token += 1
        taken: list[Delivery] = []
        for queue in queues:
            self._take_rows(database, queue, database.rows(sql.NEXT_SUSPECT, (queue,)), now, taken)
            if taken:
                break
        return taken

    def _take_rows(
        self,
        database: SQLiteDatabase,
        queue: str,
        rows: list[Row],
        now: float,
        taken: list[Delivery],
    ) -> None:
        database.change_many(sql.HOLD, ((self._number, self._token, row[0]) for row in rows))
        for row in rows:
            seq, name, crashes, priority, body, expires_at, note = (
                row if tuple(map(type, row)) in _SOUND else _repaired(row)
            )
            expired = expires_at is not None and expires_at <= now
            taken.append(
                Delivery(
                    name,
                    queue,
                    body,
                    (seq, self._token),
                    crashes,
                    priority,
                    expired,
                    expires_at,
                    note,
                )
            )

    def _suspects_wait(self, database: SQLiteDatabase) -> bool:
        return any(database.rows(sql.ANY_SUSPECT, (queue,)) for queue in self._queues)

    def _read_news(self, database: SQLiteDatabase) -> tuple[list[Row], bool]:
        alive = self._is_alive(database)
        cancelled = database.rows(sql.CANCELLED_OF, (self._number,)) if alive else []
        return cancelled, self._suspects_wait(database)

    def _hand_back(self, database: SQLiteDatabase) -> None:
        """Give back what cancelled calls took, as far as their jobs are over.

        For a job that is not over, the call that was cancelled has submitted this as the next job.
        """
        while self._abandoned and (job := self._abandoned[0]).done():
            if not job.cancelled() and job.exception() is None:
                with database.write(relaxed=True):
                    # Another file may have taken the place of the one that they were taken from.
                    if self._is_alive(database):
                        for delivery in job.result()[0]:
                            self._give_back(database, delivery)
            self._abandoned.popleft()

    def _check_alive(self, database: SQLiteDatabase) -> None:
        if not self._is_alive(database):
            raise LeaseLost(f"the lease of {self.id} is lost")

    def _is_alive(self, database: SQLiteDatabase) -> bool:
        return bool(database.rows(sql.IS_ALIVE, (self._number, self.id)))

    # --- settling ---

    def _settle(self, database: SQLiteDatabase, batch: list[Settlement]) -> list[Delivery]:
        try:
            return self._settle_all(database, batch)
        except UNSTORABLE_ERRORS:
            return self._settle_singly(database, batch)

    def _settle_singly(self, database: SQLiteDatabase, batch: list[Settlement]) -> list[Delivery]:
        """Settle each by itself, where SQLite cannot store a value of one of them."""
        gone: list[Delivery] = []
        refused: dict[int, Exception] = {}
        with database.write():
            now = self._now()
            alive = self._is_alive(database)
            for place, one in enumerate(batch):
                try:
                    with database.apart():
                        held = alive and self._apply(database, one, now)
                except UNSTORABLE_ERRORS as error:
                    refused[place] = unstorable(error)
                else:
                    if not held:
                        gone.append(one.delivery)
        if refused:
            raise BatchRefused(refused, answer=gone)
        return gone

    def _settle_all(self, database: SQLiteDatabase, batch: list[Settlement]) -> list[Delivery]:
        with database.write():
            now = self._now()  # it may have waited long for the lock
            # A fenced consumer holds nothing, though some of it may not be taken back yet.
            alive = self._is_alive(database)
            return [
                settlement.delivery
                for settlement in batch
                if not (alive and self._apply(database, settlement, now))
            ]

    def _apply(self, database: SQLiteDatabase, settlement: Settlement, now: float) -> bool:
        """Return whether the delivery was held."""
        hold = self._hold(settlement.delivery)
        match settlement:
            case Done():
                return database.change(sql.FORGET, hold) == 1
            case Release(delivery):
                return self._give_back(database, delivery)
            case Dead(_, reason, details):
                reason = reason.encode(errors="backslashreplace").decode()
                buried = database.change(sql.BURY, (reason, now, details, *hold))
                return buried == database.change(sql.FORGET, hold) == 1
            case Again(_, envelope):
                found = database.rows(sql.MAY_FOLLOW, (envelope.id, envelope.id, *hold))
                database.change(sql.FORGET, hold)
                if found == [(1,)]:
                    add(database, [envelope], now)
                return bool(found)

    def _give_back(self, database: SQLiteDatabase, delivery: Delivery) -> bool:
        hold = self._hold(delivery)
        if database.change(sql.FORGET_CANCELLED, hold) == 1:
            return True
        database.notify(queue_topic(delivery.queue))
        return database.change(sql.GIVE_BACK, hold) == 1

    def _hold(self, delivery: Delivery) -> tuple[int, int, int]:
        seq, token = delivery.receipt
        return seq, self._number, token

    # --- beginning and end ---

    def _register(self, database: SQLiteDatabase) -> int:
        queues = json.dumps(self._queues)
        with database.write(relaxed=True):
            now = self._now()
            until = now + self._lease
            row = (self.id, self._name, queues, until, this_process(), self._about)
            number = database.insert(sql.ADD_CONSUMER, row)
            note_beat(database, number, self._lease, now)
            return number

    def _end(self, database: SQLiteDatabase) -> None:
        with database.write(relaxed=True):
            if not self._is_alive(database):
                return  # others take back what it held, and count the crash
            database.change(sql.FORGET_CANCELLED_OF, (self._number,))
            if database.change(sql.GIVE_BACK_ALL, (self._number,)):
                for topic in self._topics:
                    database.notify(topic)
            remove(database, self._number)


# The types of a row that this driver wrote; with a set, the test costs next to nothing.
_SOUND = frozenset((int, str, int, int, bytes, moment, str) for moment in (type(None), float))


def _repaired(row: Row) -> Row:
    """Return a row that another program wrote as one that this driver could have written."""
    seq, name, crashes, priority, body, expires_at, note = row
    return (
        seq,
        as_text(name),
        as_number(crashes),
        as_number(priority),
        as_bytes(body),
        expires_at if isinstance(expires_at, float) else None,
        as_text(note),
    )
