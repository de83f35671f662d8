"""The broker: messages in a table of an SQLite file.

Theory of operation. All state is in the file, and each operation is one transaction or a few
(`SQLiteDatabase.write`), so that a crash at any instant leaves it done or not done. The broker
object itself has a connection, a listener for the waiting fetches of its consumers, and the timers
of its maintenance. It can be dropped without loss.

*A call of `publish` may be repeated after an error.* The error may have come before the commit or
after it. With a `call_id`, the transaction that stores the envelopes also stores, under this id,
which ids were stored and which were refused; a later call of the same id skips both. *Invariant:
for a call, its envelopes and its answer commit together.*

*Cancelling* drops the messages that wait, marks those that are held, and remembers the ids, all in
one transaction. Every later transaction that stores an envelope looks at the remembered ids. So
whatever comes first, a cancelled id is never handed out again.

Steps that may touch many rows (`purge`, `revive`) are cut into several transactions, between which
other processes can write. A crash in between leaves the rest as it was.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

import msgspec

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.drivers.common.batches import slices
from aiotaskq.drivers.common.dead_letter_keys import number_before
from aiotaskq.drivers.common.retention import CALLS_FOR, CANCELLED_IDS_FOR
from aiotaskq.drivers.common.rows import count_depths
from aiotaskq.drivers.sqlite import dead_letters, sql
from aiotaskq.drivers.sqlite.connection import SQLiteConnection
from aiotaskq.drivers.sqlite.consumer import SQLiteConsumer
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.lease import SQLiteLease
from aiotaskq.drivers.sqlite.maintenance import SQLiteMaintenance
from aiotaskq.drivers.sqlite.messages import (
    BUDGET,
    UNSTORABLE_ERRORS,
    add,
    add_unless_cancelled,
    as_bytes,
    as_text,
    claim,
    unstorable,
)
from aiotaskq.drivers.sqlite.notify import SQLiteListener
from aiotaskq.drivers.sqlite.results import SQLiteBackend
from aiotaskq.drivers.sqlite.schedules import SQLiteSchedules
from aiotaskq.drivers.sqlite.url import SQLiteUrl
from aiotaskq.errors import BatchRefused, BrokerFull, BrokerUnavailable

_PURGE_STEP = 10_000  # rows


class SQLiteBroker:
    """Messages in an SQLite file. See `aiotaskq.contract.broker.Broker`.

    Args:
        url: ``sqlite:///name.db`` or ``sqlite:////folder/name.db``, with options if wanted.
        prefix: The beginning of the names of all tables.

    Raises:
        ConfigError: The URL or the prefix cannot be used.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._connection = self._new_connection(SQLiteUrl.parse(url), prefix)
        self._listener = SQLiteListener(self._connection)
        self._maintenance = SQLiteMaintenance(self._now)
        self._time_shift = 0.0  # seconds that tests let pass on top of the real time

    @property
    def url(self) -> str:
        return self._connection.url.text

    def clone(self) -> Self:
        clone = type(self)(self.url, prefix=self._connection.prefix)
        # The same file, even if the working folder has changed since this one was opened.
        clone._connection.url = self._connection.url
        return clone

    def backend(self) -> SQLiteBackend:
        backend = SQLiteBackend(self.url, prefix=self._connection.prefix)
        backend._connection.url = self._connection.url  # as in `clone`
        return backend

    async def open(self) -> None:
        await self._connection.open()
        self._listener.open()

    async def close(self) -> None:
        await self._listener.close()
        await self._connection.close()

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        if not batch:
            return []
        return await self._connection.run(
            partial(self._publish, batch=list(batch), call_id=call_id)
        )

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> SQLiteConsumer:
        return SQLiteConsumer(
            self._connection, self._listener, self._now, queues, name=name, lease=lease, about=about
        )

    def schedules(self) -> SQLiteSchedules:
        return SQLiteSchedules(self._connection, self._now)

    def lease(self, grant: Grant) -> SQLiteLease:
        connection = self._new_connection(self._connection.url, self._connection.prefix)
        return SQLiteLease(connection, self._now, grant)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        rows = await self._connection.run(
            lambda database: database.rows(sql.LIVING, (self._now(),))
        )
        return [
            ConsumerInfo(id=as_text(name), queues=_texts(queues), about=as_bytes(about))
            for name, queues, about in rows
        ]

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        if not ids:
            return []
        return await self._connection.run(partial(self._cancel, ids=set(ids), running=running))

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        named = json.dumps(list(ids))
        rows = await self._connection.run(
            lambda database: database.rows(sql.CANCELLED_AMONG, (named,))
        )
        return {row[0] for row in rows}

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        return await self._connection.run(partial(self._maintenance.maintain, limits=limits))

    async def depth(self) -> Mapping[str, Depth]:
        return await self._connection.run(partial(_depth, now=self._now()))

    async def purge(self, queue: str) -> int:
        # In steps, so that others can write in between.
        return sum([await self._purge(statement, queue) for statement in sql.PURGES])

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        """Return dead letters of a queue, the newest first.

        Raises:
            BrokerUnavailable: The file cannot be read now.
            ConfigError: `before` is not the key of a dead letter.
        """
        number = number_before(before)
        return await self._connection.run(
            partial(dead_letters.read, queue=queue, limit=limit, before=number)
        )

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        # In steps, so that others can write in between.
        missing: list[str] = []
        refused: dict[int, Exception] = {}
        for number, some in enumerate(slices(letters, BUDGET)):
            try:
                missing += await self._connection.run(
                    partial(self._revive, queue=queue, letters=list(some))
                )
            except BatchRefused as error:
                missing += error.answer
                refused |= {number * BUDGET + at: why for at, why in error.errors.items()}
        if refused:
            raise BatchRefused(refused, answer=missing)
        return missing

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        if not keys:
            return 0
        return await self._connection.run(
            partial(dead_letters.discard, queue=queue, keys=set(keys))
        )

    def _now(self) -> float:
        return time.time() + self._time_shift

    def _new_connection(self, url: SQLiteUrl, prefix: str) -> SQLiteConnection:
        return SQLiteConnection(url, prefix, BrokerUnavailable, BrokerFull)

    async def _purge(self, statement: str, queue: str) -> int:
        def step(database: SQLiteDatabase) -> int:
            with database.write():
                return database.change(statement, (queue, _PURGE_STEP))

        dropped = 0
        while (found := await self._connection.run(step)) > 0:
            dropped += found
        return dropped

    # --- in the thread ---

    def _publish(
        self, database: SQLiteDatabase, batch: list[Envelope], call_id: str | None
    ) -> list[str]:
        try:
            return self._publish_all(database, batch, call_id)
        except UNSTORABLE_ERRORS:
            refused = _unstorable_among(database, batch)
        fine = [one for place, one in enumerate(batch) if place not in refused]
        raise BatchRefused(refused, answer=self._publish_all(database, fine, call_id))

    def _publish_all(
        self, database: SQLiteDatabase, batch: list[Envelope], call_id: str | None
    ) -> list[str]:
        with database.write():
            now = self._now()  # it may have waited long for the lock
            cancels, stored, refused = _earlier_calls(database, call_id, now)
            told = list({one.id: None for one in batch if one.id in refused})
            fresh: list[Envelope] = []
            for one in batch:
                if one.id in stored or one.id in refused:
                    continue
                if one.unique and not claim(database, one.id, now):
                    told.append(one.id)
                else:
                    fresh.append(one)
            (add_unless_cancelled if cancels else add)(database, fresh, now)
            if call_id is not None:
                ids = json.dumps([*stored, *(one.id for one in fresh)])
                answer = json.dumps(list(refused.union(told)))
                database.change(sql.WRITE_CALL, (call_id, now + CALLS_FOR, ids, answer))
            self._maintenance.sweeper.sweep_if_due(database, now)
        return told

    def _cancel(self, database: SQLiteDatabase, ids: set[str], running: bool) -> set[str]:
        named = json.dumps(list(ids))
        with database.write():
            spared = (
                set() if running else {row[0] for row in database.rows(sql.HELD_AMONG, (named,))}
            )
            database.change(sql.CANCEL_WAITING, (named,))
            if running:
                database.change(sql.CANCEL_HELD, (named,))
            kept = json.dumps(list(ids - spared))
            database.change(sql.REMEMBER_CANCEL, (self._now() + CANCELLED_IDS_FOR, kept))
            self._maintenance.sweeper.sweep_if_due(database, self._now())
        return spared

    def _revive(
        self, database: SQLiteDatabase, queue: str, letters: list[tuple[str, Envelope]]
    ) -> list[str]:
        try:
            with database.write():
                return dead_letters.revive(database, queue, letters, self._now())
        except UNSTORABLE_ERRORS:
            refused = _unstorable_among(database, [envelope for _, envelope in letters])
        fine = [one for place, one in enumerate(letters) if place not in refused]
        with database.write():
            missing = dead_letters.revive(database, queue, fine, self._now())
        raise BatchRefused(refused, answer=missing)


def _earlier_calls(
    database: SQLiteDatabase, call_id: str | None, now: float
) -> tuple[bool, set[str], set[str]]:
    """Return what is known before a call of `publish`.

    Returns:
        Whether any ids are cancelled; the ids that earlier calls with this `call_id` have stored;
        and the ids that they refused.
    """
    [(cancels, stored, refused)] = database.rows(sql.READ_CALL, {"call": call_id, "now": now})
    return bool(cancels), set(_texts(stored or "[]")), set(_texts(refused or "[]"))


def _unstorable_among(database: SQLiteDatabase, batch: list[Envelope]) -> dict[int, Exception]:
    """Return the envelopes that SQLite cannot store, by their positions; store none of them."""
    found: dict[int, Exception] = {}
    with database.write():
        for place, one in enumerate(batch):
            with contextlib.suppress(_Undo), database.apart():
                try:
                    add(database, [one], 0.0)
                    claim(database, one.id, 0.0)
                except UNSTORABLE_ERRORS as error:
                    found[place] = unstorable(error)
                raise _Undo
    return found


class _Undo(Exception):
    """Raised to undo an attempt."""


def _texts(text: object) -> tuple[str, ...]:
    """Return a stored list of texts; empty where another program wrote something else."""
    try:
        return tuple(msgspec.json.decode(as_text(text), type=list[str]))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return ()


def _depth(database: SQLiteDatabase, now: float) -> dict[str, Depth]:
    return count_depths(
        (as_text(queue), state, count)
        for state, query in sql.DEPTHS.items()
        for queue, count in database.rows(query, {"now": now})
    )
