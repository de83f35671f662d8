"""Schedules in one shard of a cluster; the messages that they send are moved on from there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.redis.schedules import RedisSchedules


class ClusterSchedules:
    """Schedules of a cluster; see `aiotaskq.contract.schedules.ScheduleStore`.

    Args:
        store: The schedules in their shard.
        forward: Moves on the messages of these queues that were stored beside them.
    """

    def __init__(
        self, store: RedisSchedules, forward: Callable[[Collection[str]], Awaitable[None]]
    ) -> None:
        self._store = store
        self._forward = forward

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        return await self._store.load(ids)

    async def due(self, limit: int) -> DueSchedules:
        return await self._store.due(limit)

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        swapped = await self._store.compare_and_swap(schedule_id, seen, new, batch)
        # Also where nothing was swapped: the process that did may have died before it moved its
        # messages on.
        await self._forward({envelope.queue for envelope in batch})
        return swapped
