"""One incarnation of a worker at an SQLite file: a row with a lease, and what is held under it."""

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
from aiotaskq.drivers.sqlite.database import Database, Row, Settings
from aiotaskq.drivers.sqlite.leases import fence, note_beat, remove, take_back
from aiotaskq.drivers.sqlite.link import Link
from aiotaskq.drivers.sqlite.messages import BUDGET, add, as_bytes, as_number, as_text, promote
from aiotaskq.drivers.sqlite.process import this_process
from aiotaskq.drivers.sqlite.wakeups import Bell, queue_topic
from aiotaskq.errors import BrokerFull, BrokerUnavailable, LeaseLost

Taken = tuple[list[Delivery], float | None]
"""Deliveries, and with none of them: when there may be some."""


class SQLiteConsumer:
    """See `aiotaskq.contract.broker.Consumer`."""

    def __init__(
        self,
        link: Link,
        bell: Bell,
        now: Callable[[], float],
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
    ) -> None:
        self.id = f"{name}.{uuid.uuid4().hex}"
        self._link = link
        self._bell = bell
        self._now = now
        self._queues = tuple(queues)
        self._topics = [queue_topic(queue) for queue in self._queues]
        self._name = name
        self._lease = lease
        self._about = about
        self._number = 0  # of its row; no row has 0
        self._token = 0  # of the last hand-out
        self._closed = False
        self._told: set[tuple[int, int]] = set()  # hand-outs whose cancelling was told
        self._passed_over = False  # whether the last fetch left suspects to others
        self._ear = asyncio.Event()
        # Jobs of `fetch` calls that were cancelled: what they took has to go back.
        self._abandoned: deque[Future[Taken]] = deque()

    # --- as the protocol has it ---

    @property
    def grant(self) -> Grant:
        return Grant(self.id, self._queues, self._lease)

    async def open(self) -> None:
        if self._number == 0:
            self._number = await self._link.run(self._register)
            self._bell.add(self._ear)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        end = time.monotonic() + wait
        queues = self._queues if order is None else order
        taken, _ = await self._take(limit, queues)
        while not taken and time.monotonic() < end:
            # In this order: what is committed after `listen` rings, what was before is found.
            self._ear.clear()
            await self._bell.listen(self._topics)
            taken, due_at = await self._take(limit, queues)
            if not taken:
                seconds = end - time.monotonic()
                if due_at is not None:
                    seconds = min(seconds, due_at - self._now())
                await self._bell.wait(self._ear, max(seconds, 0.001))
        return taken

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        if not batch:
            return []
        gone = await self._link.run(partial(self._settle, batch=list(batch)))
        if self._passed_over:
            self._ear.set()  # it may hold nothing any more
        return gone

    async def news(self) -> News:
        rows, suspects = await self._link.run(self._look_around)
        before, self._told = self._told, {(seq, token) for seq, token, _ in rows}
        cancelled = {name for seq, token, name in rows if (seq, token) not in before}
        return News(cancelled=cancelled, suspects=suspects)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ear.set()  # a `fetch` that waits finds out
        self._bell.discard(self._ear)
        if self._number:
            try:
                await asyncio.shield(self._link.run(self._end))
            except BrokerUnavailable:
                return  # as the protocol has it: the lease lapses by itself

    # --- taking ---

    async def _take(self, limit: int, queues: Sequence[str]) -> Taken:
        job = self._link.submit(partial(self._pick_if_any, limit=limit, queues=queues))
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            self._abandoned.append(job)
            if self._link.is_open:
                self._link.submit(self._hand_back)
            raise

    def _pick_if_any(self, db: Database, limit: int, queues: Sequence[str]) -> Taken:
        now = self._now()
        self._check_alive(db)
        self._hand_back(db)
        [(due_at, suspects)] = db.rows(sql.OUTLOOK)
        is_due = due_at is not None and due_at <= now
        alone = bool(suspects) and self._suspects_wait(db)
        self._passed_over = alone and bool(db.rows(sql.HOLDS_ANY, (self._number,)))
        alone = alone and not self._passed_over
        # Reading first: who finds nothing must not keep others from writing.
        if not (is_due or alone or any(db.rows(sql.ANY_READY, (one,)) for one in queues)):
            return [], due_at
        # Relaxed: after a power cut there is no consumer, and held or waiting is all one.
        with db.write(relaxed=True):
            self._check_alive(db)
            if alone and (taken := self._pick_suspect(db, queues, now)):
                return taken, None
            more = is_due and promote(db, now) == BUDGET
            return self._pick(db, queues, limit, now), now if more else None

    def _pick(self, db: Database, queues: Sequence[str], limit: int, now: float) -> list[Delivery]:
        self._token += 1
        taken: list[Delivery] = []
        for queue in queues:
            rows = db.rows(sql.NEXT_READY, (queue, limit - len(taken)))
            self._take_rows(db, queue, rows, now, taken)
            if len(taken) == limit:
                break
        return taken

    def _pick_suspect(self, db: Database, queues: Sequence[str], now: float) -> list[Delivery]:
        self._token += 1
        taken: list[Delivery] = []
        for queue in queues:
            self._take_rows(db, queue, db.rows(sql.NEXT_SUSPECT, (queue,)), now, taken)
            if taken:
                break
        return taken

    def _take_rows(
        self, db: Database, queue: str, rows: list[Row], now: float, taken: list[Delivery]
    ) -> None:
        db.change_many(sql.HOLD, ((self._number, self._token, row[0]) for row in rows))
        for row in rows:
            seq, name, crashes, priority, body, expires_at, note = (
                row if tuple(map(type, row)) in _SOUND else _mended(row)
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

    def _suspects_wait(self, db: Database) -> bool:
        return any(db.rows(sql.ANY_SUSPECT, (queue,)) for queue in self._queues)

    def _look_around(self, db: Database) -> tuple[list[Row], bool]:
        return db.rows(sql.CANCELLED_OF, (self._number,)), self._suspects_wait(db)

    def _hand_back(self, db: Database) -> None:
        """Give back what cancelled calls took. One that is not over has this run after it."""
        while self._abandoned and (job := self._abandoned[0]).done():
            if not job.cancelled() and job.exception() is None:
                with db.write(relaxed=True):
                    for delivery in job.result()[0]:
                        self._give_back(db, delivery)
            self._abandoned.popleft()

    def _check_alive(self, db: Database) -> None:
        if not self._is_alive(db):
            raise LeaseLost(f"the lease of {self.id} is lost")

    def _is_alive(self, db: Database) -> bool:
        return bool(db.rows(sql.IS_ALIVE, (self._number,)))

    # --- settling ---

    def _settle(self, db: Database, batch: list[Settlement]) -> list[Delivery]:
        with db.write():
            now = self._now()  # it may have taken long to come to write
            # Fenced, it holds nothing, though not all may have been taken back yet.
            alive = self._is_alive(db)
            return [
                settlement.delivery
                for settlement in batch
                if not (alive and self._apply(db, settlement, now))
            ]

    def _apply(self, db: Database, settlement: Settlement, now: float) -> bool:
        """Return whether the delivery was held."""
        hold = self._hold(settlement.delivery)
        match settlement:
            case Done():
                return db.change(sql.FORGET, hold) == 1
            case Release(delivery):
                return self._give_back(db, delivery)
            case Dead(_, reason, details):
                buried = db.change(sql.BURY, (reason, now, details, *hold))
                return buried == db.change(sql.FORGET, hold) == 1
            case Again(_, envelope):
                found = db.rows(sql.MAY_FOLLOW, (envelope.id, envelope.id, *hold))
                db.change(sql.FORGET, hold)
                if found == [(1,)]:
                    add(db, [envelope], now)
                return bool(found)

    def _give_back(self, db: Database, delivery: Delivery) -> bool:
        hold = self._hold(delivery)
        if db.change(sql.FORGET_CANCELLED, hold) == 1:
            return True
        db.wake(queue_topic(delivery.queue))
        return db.change(sql.GIVE_BACK, hold) == 1

    def _hold(self, delivery: Delivery) -> tuple[int, int, int]:
        seq, token = delivery.receipt
        return seq, self._number, token

    # --- beginning and end ---

    def _register(self, db: Database) -> int:
        queues = json.dumps(self._queues)
        with db.write(relaxed=True):
            now = self._now()
            until = now + self._lease
            row = (self.id, self._name, queues, until, this_process(), self._about)
            number = db.insert(sql.ADD_CONSUMER, row)
            note_beat(db, number, self._lease, now)
            return number

    def _end(self, db: Database) -> None:
        with db.write(relaxed=True):
            if not self._is_alive(db):
                return  # what it held is taken back, and counted, by others
            db.change(sql.FORGET_CANCELLED_OF, (self._number,))
            if db.change(sql.GIVE_BACK_ALL, (self._number,)):
                for topic in self._topics:
                    db.wake(topic)
            remove(db, self._number)


_SOUND = frozenset((int, str, int, int, bytes, moment, str) for moment in (type(None), float))


def _mended(row: Row) -> Row:
    """Return a row that we did not write as one that we could have written."""
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


class SQLiteLease:
    """See `aiotaskq.contract.broker.Lease`. It has a thread and a connection of its own."""

    def __init__(self, settings: Settings, now: Callable[[], float], grant: Grant) -> None:
        self._link = Link(settings, BrokerUnavailable, BrokerFull)
        self._now = now
        self._grant = grant

    async def renew(self) -> bool:
        await self._link.open()
        return await self._link.run(self._renew)

    async def end(self, note: str) -> int:
        await self._link.open()
        return await self._link.run(partial(self._end, note=note))

    async def close(self) -> None:
        await self._link.close()

    def _renew(self, db: Database) -> bool:
        with db.write(relaxed=True):
            now, number = self._now(), self._number(db)
            if number is None:
                return False
            db.change(sql.RENEW, (now + self._grant.seconds, number))
            note_beat(db, number, self._grant.seconds, now)
            return True

    def _end(self, db: Database, note: str) -> int:
        # Relaxed: after a power cut its process is gone, and others find out.
        with db.write(relaxed=True):
            number = self._number(db)
            if number is None:
                return 0
            fence(db, number, note)
            return take_back(db, number, BUDGET)

    def _number(self, db: Database) -> int | None:
        """Return the number of the consumer's row, or None where its lease has ended."""
        rows = db.rows(sql.NUMBER_OF, (self._grant.consumer,))
        return rows[0][0] if rows else None
