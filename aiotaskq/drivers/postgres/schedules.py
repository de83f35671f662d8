"""Schedules: rows beside the messages, so that one transaction changes both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import asyncpg

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.link import Connection, Link
from aiotaskq.drivers.postgres.messages import counted, insert
from aiotaskq.drivers.postgres.waking import Bell


class PostgresSchedules:
    """See `aiotaskq.contract.schedules.ScheduleStore`.

    Args:
        link: Of the broker.
        bell: Of the broker.
        shift: Returns the seconds that the clock is ahead, for tests.
    """

    def __init__(self, link: Link, bell: Bell, shift: Callable[[], float]) -> None:
        self._link = link
        self._bell = bell
        self._shift = shift

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        if ids is None:
            rows = await self._link.fetch(sql.ALL_SCHEDULES)
        else:
            rows = await self._link.fetch(sql.SCHEDULES_AMONG, list(set(ids)))
        # Here, as the order of text is another one in every database.
        return sorted(map(_schedule, rows), key=lambda one: one.id)

    async def due(self, limit: int) -> DueSchedules:
        head, *rows = await self._link.fetch(sql.DUE_SCHEDULES, self._shift(), limit)
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
            await insert(connection.fetch, self._link.names, batch, shift=self._shift())
            return True

        swapped = await self._link.transact(compare_and_swap, repeat=False)
        if swapped:
            await self._bell.wake(counted(batch))
        return swapped

    async def _change(
        self, connection: Connection, name: str, seen: str | None, new: StoredSchedule | None
    ) -> bool:
        template: str
        arguments: tuple[Any, ...]
        if seen is None and new is None:
            template, arguments = sql.LACKS_SCHEDULE, (name,)
        elif new is None:
            template, arguments = sql.DROP_SCHEDULE, (name, seen)
        elif seen is None:
            template, arguments = sql.PUT_SCHEDULE, (name, new.revision, new.due_at, new.body)
        else:
            template = sql.CHANGE_SCHEDULE
            arguments = (name, new.revision, new.due_at, new.body, seen)
        return bool(await connection.fetch(self._link.names.render(template), *arguments))


def _schedule(row: asyncpg.Record) -> StoredSchedule:
    return StoredSchedule(
        id=row["id"], body=row["body"], due_at=row["due_at"], revision=row["revision"]
    )
