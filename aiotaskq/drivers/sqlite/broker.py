"""The broker."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.consumer import SQLiteConsumer
from aiotaskq.drivers.sqlite.database import Database, Settings
from aiotaskq.drivers.sqlite.leases import give_up, remove
from aiotaskq.drivers.sqlite.link import Link
from aiotaskq.drivers.sqlite.messages import BUDGET, add, promote, sweep
from aiotaskq.drivers.sqlite.process import is_gone
from aiotaskq.drivers.sqlite.results import SQLiteBackend
from aiotaskq.drivers.sqlite.wakeups import Bell, queue_topic
from aiotaskq.errors import BrokerUnavailable
from aiotaskq.message import DeadLetter, Depth, Envelope, Tended
from aiotaskq.protocols import Traits

_DAY = 86_400.0
_CALL_MEMORY = 60.0
_SWEEP_EVERY = 10.0
_PURGE_STEP = 10_000


class SQLiteBroker:
    """Messages in an SQLite file. See `aiotaskq.protocols.Broker`.

    Args:
        url: ``sqlite:///name.db`` or ``sqlite:////folder/name.db``, with options if wanted.
        prefix: Of the tables.

    Raises:
        ConfigError: The URL is none of this driver.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._link = Link(Settings.parse(url, prefix), BrokerUnavailable)
        self._bell = Bell(self._link)
        self._time_shift = 0.0  # for tests: seconds that have passed without passing
        self._sweep_at = 0.0

    @property
    def url(self) -> str:
        return self._link.settings.url

    def clone(self) -> Self:
        twin = type(self)(self.url, prefix=self._link.settings.prefix)
        twin._link.settings = self._link.settings  # the same file, wherever we work by then
        return twin

    def backend(self) -> SQLiteBackend:
        twin = SQLiteBackend(self.url, prefix=self._link.settings.prefix)
        twin._link.settings = self._link.settings  # as above
        return twin

    async def open(self) -> None:
        await self._link.open()
        self._bell.open()

    async def close(self) -> None:
        await self._bell.close()
        await self._link.close()

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        if not batch:
            return []
        return await self._link.run(partial(self._publish, batch=list(batch), call_id=call_id))

    def consumer(self, queues: Sequence[str], *, name: str, lease: float) -> SQLiteConsumer:
        return SQLiteConsumer(self._link, self._bell, self._now, queues, name=name, lease=lease)

    async def cancel(self, ids: Collection[str]) -> None:
        if ids:
            await self._link.run(partial(_cancel, ids=json.dumps(list(ids))))

    async def tend(self) -> Tended:
        return await self._link.run(self._tend)

    async def depth(self) -> Mapping[str, Depth]:
        return await self._link.run(partial(_depth, now=self._now()))

    async def purge(self, queue: str) -> int:
        # In steps, so that others come to write in between.
        return sum([await self._purge(statement, queue) for statement in sql.PURGES])

    async def dead(self, queue: str, limit: int = 100) -> Sequence[DeadLetter]:
        rows = await self._link.run(lambda db: db.rows(sql.NEWEST_DEAD, (queue, limit)))
        return [
            DeadLetter(
                id=name, queue=queue, body=body, reason=reason, crashes=crashes, died_at=died_at
            )
            for name, queue, body, reason, crashes, died_at in rows
        ]

    def _now(self) -> float:
        return time.time() + self._time_shift

    async def _purge(self, statement: str, queue: str) -> int:
        def step(db: Database) -> int:
            with db.write():
                return db.change(statement, (queue, _PURGE_STEP))

        dropped = 0
        while (found := await self._link.run(step)) > 0:
            dropped += found
        return dropped

    # --- in the thread ---

    def _publish(self, db: Database, batch: list[Envelope], call_id: str | None) -> list[str]:
        now = self._now()
        with db.write():
            stored, refused = _outcome_of(db, call_id, now)
            told = list({one.id: None for one in batch if one.id in refused})
            fresh: list[Envelope] = []
            for one in batch:
                if one.id in stored or one.id in refused:
                    continue
                if one.unique and not _claim(db, one.id, now):
                    told.append(one.id)
                else:
                    fresh.append(one)
            add(db, fresh, now)
            if call_id is not None:
                ids = json.dumps([*stored, *(one.id for one in fresh)])
                answer = json.dumps(list(refused.union(told)))
                db.change(sql.WRITE_CALL, (call_id, now + _CALL_MEMORY, ids, answer))
            self._sweep_if_time(db, now)
        return told

    def _tend(self, db: Database) -> Tended:
        now = self._now()
        gone = _gone(db)
        lapsed = [
            number
            for number, lease_until, process, fenced in db.rows(sql.ALL_CONSUMERS)
            if fenced or lease_until <= now or process in gone
        ]
        # Reading first: with nothing to do, others are not kept from writing.
        due = db.rows(sql.NEXT_DUE)
        if not lapsed and now < self._sweep_at and not (due and due[0][0] <= now):
            return Tended()
        # Relaxed: what a power cut undoes of this is done again.
        with db.write(relaxed=True):
            now = self._now()  # again: it may have taken long to come to write
            promoted = promote(db, now)
            reclaimed = _reclaim(db, lapsed, now, gone)
            self._sweep_if_time(db, now)
        return Tended(promoted=promoted, reclaimed=reclaimed)

    def _sweep_if_time(self, db: Database, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now if sweep(db, now) else now + _SWEEP_EVERY


def _outcome_of(db: Database, call_id: str | None, now: float) -> tuple[set[str], set[str]]:
    """Return the ids that earlier calls of this id have stored, and those they refused."""
    rows = [] if call_id is None else db.rows(sql.READ_CALL, (call_id, now))
    if not rows:
        return set(), set()
    [(stored, refused)] = rows
    return set(json.loads(stored)), set(json.loads(refused))


def _claim(db: Database, name: str, now: float) -> bool:
    return db.change(sql.CLAIM_ID, {"id": name, "now": now, "until": now + _DAY}) == 1


def _cancel(db: Database, ids: str) -> None:
    with db.write():
        db.change(sql.CANCEL_WAITING, (ids,))
        db.change(sql.CANCEL_HELD, (ids,))


def _gone(db: Database) -> set[str]:
    """Return the processes of consumers that are surely dead."""
    return {process for [process] in db.rows(sql.ALL_PROCESSES) if is_gone(process)}


def _reclaim(db: Database, lapsed: list[int], now: float, gone: set[str]) -> int:
    reclaimed = 0
    for number in lapsed:
        if not give_up(db, number, now, gone):
            continue
        held = db.rows(sql.HELD_BY, (number, BUDGET - reclaimed))
        for seq, queue, cancelled in held:
            if cancelled:
                db.change(sql.FORGET_SEQ, (seq,))
            else:
                db.change(sql.TAKE_BACK, (seq,))
                db.wake(queue_topic(queue))
        reclaimed += len(held)
        if reclaimed == BUDGET:
            break  # it stays fenced, and the next round goes on with it
        remove(db, number)
    return reclaimed


def _depth(db: Database, now: float) -> dict[str, Depth]:
    counts: dict[str, dict[str, int]] = {}
    for state, query in sql.DEPTHS.items():
        for queue, count in db.rows(query, {"now": now}):
            if count:
                counts.setdefault(queue, {})[state] = count
    return {queue: Depth(**states) for queue, states in counts.items()}
