"""Schedules in a table beside the messages, so that one transaction changes both."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import partial

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.connection import SQLiteConnection
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.messages import add_unless_cancelled, as_bytes, as_text, as_time


class SQLiteSchedules:
    """See `aiotaskq.contract.schedules.ScheduleStore`.

    Args:
        connection: The broker's connection.
        now: Returns the time of the store.
    """

    def __init__(self, connection: SQLiteConnection, now: Callable[[], float]) -> None:
        self._connection = connection
        self._now = now

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        if ids is None:
            return await self._connection.run(lambda database: _read(database, sql.ALL_SCHEDULES))
        named = json.dumps(list(set(ids)))
        return await self._connection.run(
            lambda database: _read(database, sql.SCHEDULES_AMONG, (named,))
        )

    async def due(self, limit: int) -> DueSchedules:
        return await self._connection.run(partial(self._due, limit=limit))

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        return await self._connection.run(
            partial(self._swap, name=schedule_id, seen=seen, new=new, batch=list(batch))
        )

    # --- in the thread ---

    def _due(self, database: SQLiteDatabase, limit: int) -> DueSchedules:
        now = self._now()
        *due, (_, _, next_at, _) = database.rows(sql.DUE_SCHEDULES, {"now": now, "limit": limit})
        return DueSchedules(
            schedules=[_schedule(*row) for row in due], now=now, next_at=as_time(next_at)
        )

    def _swap(
        self,
        database: SQLiteDatabase,
        name: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: list[Envelope],
    ) -> bool:
        with database.write():
            there = database.rows(sql.REVISION_OF, (name,))
            if seen != (as_text(there[0][0]) if there else None):
                return False
            if new is None:
                database.change(sql.DROP_SCHEDULE, (name,))
            else:
                database.change(sql.WRITE_SCHEDULE, (name, new.revision, new.due_at, new.body))
            if batch:
                add_unless_cancelled(database, batch, self._now())
        return True


def _read(
    database: SQLiteDatabase, query: str, parameters: Sequence[str] = ()
) -> list[StoredSchedule]:
    return [_schedule(*row) for row in database.rows(query, parameters)]


def _schedule(name: object, revision: object, due_at: object, body: object) -> StoredSchedule:
    return StoredSchedule(
        id=as_text(name), body=as_bytes(body), due_at=as_time(due_at), revision=as_text(revision)
    )
