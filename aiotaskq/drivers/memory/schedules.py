"""Schedules in a `MemoryStore`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.memory.store import MemoryStore


class MemorySchedules:
    """See `aiotaskq.contract.schedules.ScheduleStore`; made by `MemoryBroker.schedules`."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        return self._store.load_schedules(ids)

    async def due(self, limit: int) -> DueSchedules:
        return self._store.due_schedules(limit)

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        await asyncio.sleep(0)  # one turn of the loop, for the reason given in `MemoryBroker`
        return self._store.swap_schedule(schedule_id, seen, new, batch)
