"""The result backend: outcomes in a table of an SQLite file.

Theory of operation. A task id has at most one row. A row that is not final is replaced by any
later outcome, a final one by none until its time is over. Each row that is inserted gets a number
that is greater than all numbers before, whatever became of their rows. So a subscriber keeps one
number: the outcomes that it has not yielded are those with a greater one. A subscriber that loses
a notification, or cannot read the file for a while, reads on from its number and misses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, Self

from msgspec import Raw, UnsetType

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.rows import read_outcome, write_history
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.connection import SQLiteConnection
from aiotaskq.drivers.sqlite.database import Row, SQLiteDatabase
from aiotaskq.drivers.sqlite.maintenance import SQLiteSweeper
from aiotaskq.drivers.sqlite.messages import BUDGET, UNSTORABLE_ERRORS, as_text, unstorable
from aiotaskq.drivers.sqlite.notify import RESULTS, SQLiteListener
from aiotaskq.drivers.sqlite.url import SQLiteUrl
from aiotaskq.errors import BackendUnavailable, BatchRefused

_RETRY_EVERY = 0.2  # seconds between looks of a subscriber while the file cannot be read


class SQLiteBackend:
    """Outcomes in an SQLite file. See `aiotaskq.contract.results.ResultBackend`.

    The table ``<prefix>_results`` can be read with the shell ``sqlite3``: values are stored as
    text where the serializer writes text, such as JSON.

    Args:
        url: ``sqlite:///name.db`` or ``sqlite:////folder/name.db``, with options if wanted.
        prefix: The beginning of the names of all tables.

    Raises:
        ConfigError: The URL or the prefix cannot be used.
    """

    wants_arguments: ClassVar[bool] = True

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._connection = SQLiteConnection(SQLiteUrl.parse(url), prefix, BackendUnavailable)
        self._listener = SQLiteListener(self._connection)
        self._sweeper = SQLiteSweeper()
        self._time_shift = 0.0  # seconds that tests let pass on top of the real time

    @property
    def url(self) -> str:
        return self._connection.url.text

    def clone(self) -> Self:
        clone = type(self)(self.url, prefix=self._connection.prefix)
        # The same file, even if the working folder has changed since this one was opened.
        clone._connection.url = self._connection.url
        return clone

    async def open(self) -> None:
        await self._connection.open()
        self._listener.open()

    async def close(self) -> None:
        await self._listener.close()
        await self._connection.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        if not batch:
            return []
        return await self._connection.run(partial(self._store, batch=list(batch), ttl=ttl))

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        if not ids:
            return {}
        asked = (json.dumps(list(ids)), self._now())
        rows = await self._connection.run(lambda database: database.rows(sql.LOAD, asked))
        return {as_text(row[0]): read_outcome(row) for row in rows}

    async def subscribe(self) -> AsyncGenerator[Sequence[str], None]:
        look = asyncio.Event()  # set where there is a reason to look
        self._listener.add(look)
        seen: Seen | None = None
        gap_told = False  # whether the reader was told that it may have missed something
        try:
            while True:
                # In this order: an outcome is either found by the look or notified after `listen`.
                look.clear()
                try:
                    await self._listener.listen([RESULTS])
                    last, ids = await self._connection.run(partial(_arrived_since, seen=seen))
                    if seen is not None and seen.generation != last.generation:
                        gap_told = False  # it is another file
                    seen = last
                except BackendUnavailable:
                    if not self._connection.is_open:
                        return
                    gap_told = False
                    await asyncio.sleep(_RETRY_EVERY)
                    continue
                if not gap_told:
                    gap_told = True
                    yield []
                if ids:
                    yield ids
                else:
                    await self._listener.wait(look, self._listener.poll)
        finally:
            self._listener.discard(look)

    async def forget(self, ids: Collection[str]) -> int:
        if not ids:
            return 0
        return await self._connection.run(
            partial(_forget, ids=json.dumps(list(ids)), now=self._now())
        )

    def _now(self) -> float:
        return time.time() + self._time_shift

    # --- in the thread ---

    def _store(
        self, database: SQLiteDatabase, batch: list[Outcome], ttl: float | None
    ) -> list[str]:
        try:
            return self._store_all(database, batch, ttl)
        except UNSTORABLE_ERRORS:
            return self._store_all(database, batch, ttl, singly=True)

    def _store_all(
        self,
        database: SQLiteDatabase,
        batch: list[Outcome],
        ttl: float | None,
        *,
        singly: bool = False,
    ) -> list[str]:
        """Store outcomes; where `singly`, those that SQLite cannot store are refused."""
        now = self._now()
        expires_at = None if ttl is None else now + ttl
        refused: list[str] = []
        errors: dict[int, Exception] = {}
        with database.write():
            for place, outcome in enumerate(batch):
                try:
                    with database.apart() if singly else contextlib.nullcontext():
                        kept = _keep(database, _row(outcome, expires_at), now)
                except UNSTORABLE_ERRORS as error:
                    if not singly:
                        raise
                    errors[place] = unstorable(error)
                    continue
                if not kept:
                    refused.append(outcome.task_id)
                elif outcome.status.final:
                    database.notify(RESULTS)
            self._sweeper.sweep_if_due(database, now)
        if errors:
            raise BatchRefused(errors, answer=refused)
        return refused


def _keep(database: SQLiteDatabase, row: Row, now: float) -> bool:
    """Store one outcome unless a final one exists; return whether it was stored.

    Mostly there is none, so the insertion comes first.
    """
    if database.change(sql.ADD_RESULT, row) == 1:
        return True
    return (
        database.change(sql.DROP_REPLACEABLE, (row[0], now)) == 1
        and database.change(sql.ADD_RESULT, row) == 1
    )


class Seen(NamedTuple):
    """The last outcome that a subscriber has seen.

    Attributes:
        generation: That of the file; see `SQLiteDatabase`.
        number: The number of the outcome.
    """

    generation: int
    number: int


def _arrived_since(database: SQLiteDatabase, seen: Seen | None) -> tuple[Seen, list[str]]:
    """Return the ids of final outcomes after one, and the one to go on from."""
    generation = database.generation
    if seen is None or seen.generation != generation:
        return Seen(generation, database.rows(sql.LAST_ARRIVAL)[0][0] or 0), []
    rows = database.rows(sql.ARRIVED_SINCE, (seen.number, BUDGET))
    last = rows[-1][0] if rows else seen.number
    return Seen(generation, last), [as_text(row[1]) for row in rows]


def _forget(database: SQLiteDatabase, ids: str, now: float) -> int:
    with database.write():
        return database.change(sql.FORGET_RESULTS, (ids, now))


def _row(outcome: Outcome, expires_at: float | None) -> Row:
    return (
        outcome.task_id,
        outcome.status.value,
        _at_rest(outcome.result),
        None if outcome.date_done is None else outcome.date_done.isoformat(),
        outcome.traceback,
        json.dumps(outcome.children, ensure_ascii=False),
        outcome.name,
        _at_rest(outcome.args),
        _at_rest(outcome.kwargs),
        outcome.worker,
        outcome.retries,
        outcome.queue,
        outcome.execution_time,
        write_history(outcome.history),
        expires_at,
    )


def _at_rest(value: Raw | UnsetType) -> str | bytes | None:
    """Return an encoded value as text where it is text, for people that read the table."""
    if isinstance(value, UnsetType):
        return None
    data = bytes(value)
    # The shell shows a text only up to the first NUL.
    if b"\x00" in data:
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
