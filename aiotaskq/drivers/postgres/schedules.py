"""Schedules, in the database of the messages, so that one transaction changes both.

Nothing is locked between calls. A change names the revision that its caller has seen; of two
callers that have seen the same one, the row lock lets the first one change it, and the second finds
another revision. The messages are stored in the same transaction as the change, so a crash leaves
both or neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import asyncpg

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.drivers.postgres.messages import count_by_queue, insert
from aiotaskq.drivers.postgres.notify import PostgresNotifier
from aiotaskq.drivers.postgres.sql import schedules as schedules_sql
from aiotaskq.drivers.postgres.storable import is_storable


class PostgresSchedules:
    """The schedules of a broker; see `aiotaskq.contract.schedules.ScheduleStore`.

    Args:
        pool: The pool of the broker.
        notifier: The notifier of the broker.
        shift: Returns the offset of the clock in seconds, for tests.
    """

    def __init__(
        self, pool: PostgresPool, notifier: PostgresNotifier, shift: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._notifier = notifier
        self._shift = shift

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        if ids is None:
            rows = await self._pool.fetch(schedules_sql.ALL)
        else:
            known = list(filter(is_storable, set(ids)))  # no schedule has another id
            rows = await self._pool.fetch(schedules_sql.AMONG, known)
        # Sorted here, because databases differ in the order of text.
        return sorted(map(_schedule, rows), key=lambda one: one.id)

    async def due(self, limit: int) -> DueSchedules:
        head, *rows = await self._pool.fetch(schedules_sql.DUE, self._shift(), limit)
        return DueSchedules(
            schedules=list(map(_schedule, rows)), now=head["now"], next_at=head["due_at"]
        )

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        async def compare_and_swap(connection: Connection) -> bool:
            if not await self._change(connection, schedule_id, seen, new):
                return False
            await insert(connection.fetch, self._pool.names, batch, shift=self._shift())
            return True

        swapped = await self._pool.transact(compare_and_swap, repeat=False)
        if swapped:
            await self._notifier.wake(count_by_queue(batch))
        return swapped

    async def _change(
        self, connection: Connection, name: str, seen: str | None, new: StoredSchedule | None
    ) -> bool:
        template: str
        arguments: tuple[Any, ...]
        if seen is None and new is None:
            template, arguments = schedules_sql.IS_ABSENT, (name,)
        elif new is None:
            template, arguments = schedules_sql.REMOVE, (name, seen)
        elif seen is None:
            template, arguments = schedules_sql.ADD, (name, new.revision, new.due_at, new.body)
        else:
            template = schedules_sql.CHANGE
            arguments = (name, new.revision, new.due_at, new.body, seen)
        return bool(await connection.fetch(self._pool.names.render(template), *arguments))


def _schedule(row: asyncpg.Record) -> StoredSchedule:
    return StoredSchedule(
        id=row["id"], body=row["body"], due_at=row["due_at"], revision=row["revision"]
    )
