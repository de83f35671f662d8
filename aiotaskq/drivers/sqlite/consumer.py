"""One incarnation of a worker at an SQLite file: a row with a lease, and what is held under it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial

from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.database import Database
from aiotaskq.drivers.sqlite.leases import note_beat, remove
from aiotaskq.drivers.sqlite.link import Link
from aiotaskq.drivers.sqlite.messages import BUDGET, add, promote
from aiotaskq.drivers.sqlite.process import this_process
from aiotaskq.drivers.sqlite.wakeups import Bell, queue_topic
from aiotaskq.errors import BrokerUnavailable, LeaseLost
from aiotaskq.message import Again, Dead, Delivery, Done, Release, Settlement

Taken = tuple[list[Delivery], float | None]
"""Deliveries, and with none of them: when there may be some."""


class SQLiteConsumer:
    """See `aiotaskq.protocols.Consumer`."""

    def __init__(
        self,
        link: Link,
        bell: Bell,
        now: Callable[[], float],
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
    ) -> None:
        self.id = f"{name}.{uuid.uuid4().hex}"
        self._link = link
        self._bell = bell
        self._now = now
        self._queues = tuple(queues)
        self._topics = [queue_topic(queue) for queue in self._queues]
        self._name = name
        self._lease = lease
        self._number = 0  # of its row; no row has 0
        self._token = 0  # of the last hand-out
        self._closed = False
        self._told: set[tuple[int, int]] = set()  # hand-outs whose cancelling was told
        self._ear = asyncio.Event()
        # Jobs of `fetch` calls that were cancelled: what they took has to go back.
        self._abandoned: deque[Future[Taken]] = deque()

    # --- as the protocol has it ---

    async def open(self) -> None:
        if self._number == 0:
            self._number = await self._link.run(self._register)
            self._bell.add(self._ear)

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        end = time.monotonic() + wait
        taken, _ = await self._take(limit)
        while not taken and time.monotonic() < end:
            # In this order: what is committed after `listen` rings, what was before is found.
            self._ear.clear()
            await self._bell.listen(self._topics)
            taken, due_at = await self._take(limit)
            if not taken:
                seconds = end - time.monotonic()
                if due_at is not None:
                    seconds = min(seconds, due_at - self._now())
                await self._bell.wait(self._ear, max(seconds, 0.001))
        return taken

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        if not batch:
            return []
        return await self._link.run(partial(self._settle, batch=list(batch)))

    async def cancelled(self) -> Collection[str]:
        rows = await self._link.run(lambda db: db.rows(sql.CANCELLED_OF, (self._number,)))
        before, self._told = self._told, {(seq, token) for seq, token, _ in rows}
        return {name for seq, token, name in rows if (seq, token) not in before}

    def lease(self) -> SQLiteLease:
        return SQLiteLease(self._link, self._now, lambda: self._number, self._lease)

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

    async def _take(self, limit: int) -> Taken:
        job = self._link.submit(partial(self._pick_if_any, limit=limit))
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            self._abandoned.append(job)
            if self._link.is_open:
                self._link.submit(self._hand_back)
            raise

    def _pick_if_any(self, db: Database, limit: int) -> Taken:
        now = self._now()
        self._check_alive(db)
        self._hand_back(db)
        due = db.rows(sql.NEXT_DUE)
        due_at: float | None = due[0][0] if due else None
        is_due = due_at is not None and due_at <= now
        # Reading first: who finds nothing must not keep others from writing.
        if not is_due and not any(db.rows(sql.ANY_READY, (queue,)) for queue in self._queues):
            return [], due_at
        # Relaxed: after a power cut there is no consumer, and held or waiting is all one.
        with db.write(relaxed=True):
            self._check_alive(db)
            more = is_due and promote(db, now) == BUDGET
            return self._pick(db, limit, now), now if more else None

    def _pick(self, db: Database, limit: int, now: float) -> list[Delivery]:
        self._token += 1
        taken: list[Delivery] = []
        for queue in self._queues:
            rows = db.rows(sql.NEXT_READY, (now, queue, limit - len(taken)))
            db.change_many(sql.HOLD, ((self._number, self._token, row[0]) for row in rows))
            for seq, name, crashes, priority, body, expired in rows:
                receipt = (seq, self._token)
                taken.append(Delivery(name, queue, body, receipt, crashes, priority, bool(expired)))
            if len(taken) == limit:
                break
        return taken

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
        now = self._now()
        with db.write():
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
            case Dead(_, reason):
                return db.change(sql.BURY, (reason, now, *hold)) == db.change(sql.FORGET, hold) == 1
            case Again(_, envelope):
                found = db.rows(sql.IS_CANCELLED, hold)
                db.change(sql.FORGET, hold)
                if found == [(0,)]:
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
            row = (self.id, self._name, queues, now + self._lease, this_process())
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


class SQLiteLease:
    """See `aiotaskq.protocols.Lease`. It has a thread and a connection of its own."""

    def __init__(
        self,
        link: Link,
        now: Callable[[], float],
        number: Callable[[], int],
        seconds: float,
    ) -> None:
        self._link = Link(link.settings, BrokerUnavailable)
        self._now = now
        self._number = number
        self._seconds = seconds

    async def renew(self) -> bool:
        await self._link.open()
        return await self._link.run(self._renew)

    async def close(self) -> None:
        await self._link.close()

    def _renew(self, db: Database) -> bool:
        with db.write(relaxed=True):
            now, number = self._now(), self._number()
            if db.change(sql.RENEW, (now + self._seconds, number)) == 0:
                return False
            note_beat(db, number, self._seconds, now)
            return True
