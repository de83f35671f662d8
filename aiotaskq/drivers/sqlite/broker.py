"""The broker."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.drivers.sqlite import letters, sql
from aiotaskq.drivers.sqlite.consumer import SQLiteConsumer, SQLiteLease
from aiotaskq.drivers.sqlite.database import Database, Settings
from aiotaskq.drivers.sqlite.leases import (
    give_up,
    is_anybody_spared,
    note_look,
    take_back,
)
from aiotaskq.drivers.sqlite.link import Link
from aiotaskq.drivers.sqlite.messages import BUDGET, add, claim, promote, sweep
from aiotaskq.drivers.sqlite.process import is_gone
from aiotaskq.drivers.sqlite.results import SQLiteBackend
from aiotaskq.drivers.sqlite.schedules import SQLiteSchedules
from aiotaskq.drivers.sqlite.wakeups import Bell
from aiotaskq.errors import BrokerFull, BrokerUnavailable

_CALL_MEMORY = 60.0
_CANCEL_MEMORY = 7 * 86_400.0
_SWEEP_EVERY = 10.0
_PURGE_STEP = 10_000


class SQLiteBroker:
    """Messages in an SQLite file. See `aiotaskq.contract.broker.Broker`.

    Args:
        url: ``sqlite:///name.db`` or ``sqlite:////folder/name.db``, with options if wanted.
        prefix: Of the tables.

    Raises:
        ConfigError: The URL is none of this driver.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._link = Link(Settings.parse(url, prefix), BrokerUnavailable, BrokerFull)
        self._bell = Bell(self._link)
        self._time_shift = 0.0  # for tests: seconds that have passed without passing
        self._sweep_at = 0.0
        self._trimmer = letters.Trimmer()

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

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> SQLiteConsumer:
        return SQLiteConsumer(
            self._link, self._bell, self._now, queues, name=name, lease=lease, about=about
        )

    def schedules(self) -> SQLiteSchedules:
        return SQLiteSchedules(self._link, self._now, _store)

    def lease(self, grant: Grant) -> SQLiteLease:
        return SQLiteLease(self._link.settings, self._now, grant)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        rows = await self._link.run(lambda db: db.rows(sql.LIVING, (self._now(),)))
        return [
            ConsumerInfo(id=name, queues=tuple(json.loads(queues)), about=about)
            for name, queues, about in rows
        ]

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        if not ids:
            return []
        return await self._link.run(partial(self._cancel, ids=set(ids), running=running))

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        return await self._link.run(partial(self._maintain, limits=limits))

    async def depth(self) -> Mapping[str, Depth]:
        return await self._link.run(partial(_depth, now=self._now()))

    async def purge(self, queue: str) -> int:
        # In steps, so that others come to write in between.
        return sum([await self._purge(statement, queue) for statement in sql.PURGES])

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        """Return dead letters of a queue, the newest first.

        Raises:
            BrokerUnavailable: The file cannot be read now.
            ConfigError: `before` is no key.
        """
        return await self._link.run(partial(letters.read, queue=queue, limit=limit, before=before))

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        # In steps, so that others come to write in between.
        absent: list[str] = []
        for start in range(0, len(letters), BUDGET):
            some = list(letters[start : start + BUDGET])
            absent += await self._link.run(partial(self._revive, queue=queue, batch=some))
        return absent

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        if not keys:
            return 0
        return await self._link.run(partial(letters.discard, queue=queue, keys=set(keys)))

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
        with db.write():
            now = self._now()  # it may have taken long to come to write
            cancels, stored, refused = _before(db, call_id, now)
            told = list({one.id: None for one in batch if one.id in refused})
            fresh: list[Envelope] = []
            for one in batch:
                if one.id in stored or one.id in refused:
                    continue
                if one.unique and not claim(db, one.id, now):
                    told.append(one.id)
                else:
                    fresh.append(one)
            (_store if cancels else add)(db, fresh, now)
            if call_id is not None:
                ids = json.dumps([*stored, *(one.id for one in fresh)])
                answer = json.dumps(list(refused.union(told)))
                db.change(sql.WRITE_CALL, (call_id, now + _CALL_MEMORY, ids, answer))
            self._sweep_if_time(db, now)
        return told

    def _cancel(self, db: Database, ids: set[str], running: bool) -> set[str]:
        named = json.dumps(list(ids))
        with db.write():
            spared = set() if running else {row[0] for row in db.rows(sql.HELD_AMONG, (named,))}
            db.change(sql.CANCEL_WAITING, (named,))
            if running:
                db.change(sql.CANCEL_HELD, (named,))
            kept = json.dumps(list(ids - spared))
            db.change(sql.REMEMBER_CANCEL, (self._now() + _CANCEL_MEMORY, kept))
            self._sweep_if_time(db, self._now())
        return spared

    def _revive(self, db: Database, queue: str, batch: list[tuple[str, Envelope]]) -> list[str]:
        with db.write():
            return letters.revive(db, queue, batch, self._now())

    def _maintain(self, db: Database, limits: DeadLimits) -> Maintained:
        now = self._now()
        gone = _gone(db)
        lapsed = [
            number
            for number, lease_until, process, fenced in db.rows(sql.ALL_CONSUMERS)
            if fenced or lease_until <= now or process in gone
        ]
        # Reading first: with nothing to do, others are not kept from writing.
        [(due_at, _)] = db.rows(sql.OUTLOOK)
        is_due = due_at is not None and due_at <= now
        trims = self._trimmer.is_due(db, limits, now)
        spared = is_anybody_spared(db)
        if not (lapsed or is_due or trims or spared or now >= self._sweep_at):
            return Maintained()
        # Relaxed: what a power cut undoes of this is done again.
        with db.write(relaxed=True):
            now = self._now()  # again: it may have taken long to come to write
            promoted = promote(db, now)
            reclaimed = _reclaim(db, lapsed, now, gone)
            if spared:
                note_look(db)
            trimmed = self._trimmer.trim(db, limits, now) if trims else 0
            self._sweep_if_time(db, now)
        return Maintained(promoted=promoted, reclaimed=reclaimed, trimmed=trimmed)

    def _sweep_if_time(self, db: Database, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now if sweep(db, now) else now + _SWEEP_EVERY


def _before(db: Database, call_id: str | None, now: float) -> tuple[bool, set[str], set[str]]:
    """Tell what went before a call of `publish`.

    Whether any ids are cancelled; the ids that earlier calls of this id have stored, and those
    that they refused.
    """
    [(cancels, stored, refused)] = db.rows(sql.READ_CALL, {"call": call_id, "now": now})
    return bool(cancels), set(json.loads(stored or "[]")), set(json.loads(refused or "[]"))


def _store(db: Database, batch: list[Envelope], now: float) -> None:
    """Store envelopes, inside a transaction, but for those whose ids are cancelled."""
    ids = json.dumps([one.id for one in batch])
    cancelled = {row[0] for row in db.rows(sql.CANCELLED_AMONG, (ids,))}
    add(db, [one for one in batch if one.id not in cancelled], now)


def _gone(db: Database) -> set[str]:
    """Return the processes of consumers that are surely dead."""
    return {process for [process] in db.rows(sql.ALL_PROCESSES) if is_gone(process)}


def _reclaim(db: Database, lapsed: list[int], now: float, gone: set[str]) -> int:
    reclaimed = 0
    for number in lapsed:
        if not give_up(db, number, now, gone):
            continue
        reclaimed += take_back(db, number, BUDGET - reclaimed)
        if reclaimed == BUDGET:
            break  # the next round goes on with it
    return reclaimed


def _depth(db: Database, now: float) -> dict[str, Depth]:
    counts: dict[str, dict[str, int]] = {}
    for state, query in sql.DEPTHS.items():
        for queue, count in db.rows(query, {"now": now}):
            if count:
                counts.setdefault(queue, {})[state] = count
    return {queue: Depth(**states) for queue, states in counts.items()}
