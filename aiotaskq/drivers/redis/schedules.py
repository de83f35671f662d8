"""Schedules in a Redis hash, with a sorted set of those that have a next run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.common.batches import slices
from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import RedisClient
from aiotaskq.drivers.redis.connection import Word
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.redis")

_LOADED = 100  # schedules in one call of a script


class RedisSchedules:
    """Loads and changes schedules; see `aiotaskq.contract.schedules.ScheduleStore`.

    Args:
        client: The client of the broker.
        introduce: Adds queues to the set of all queues, before anything is stored in them.
    """

    def __init__(
        self, client: RedisClient, introduce: Callable[[Collection[str]], Awaitable[None]]
    ) -> None:
        self._client = client
        self._introduce = introduce
        self._keys = [client.keys.schedules, client.keys.schedules_due]

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        connection = self._client.connection
        wanted: list[Word] = []
        if ids is None:
            wanted += await connection.command("HKEYS", self._client.keys.schedules)
        else:
            wanted += [one for one in set(ids) if items.is_text(one)]
        found: list[StoredSchedule] = []
        for part in slices(wanted, _LOADED):
            found += _unpack(await connection.script(scripts.LOAD, self._keys, part))
        return sorted(found, key=lambda one: one.id)

    async def due(self, limit: int) -> DueSchedules:
        args = [self._client.time_shift, limit]
        now, next_at, *due = await self._client.connection.script(scripts.DUE, self._keys, args)
        unreadable = [name for name in due[::3] if not _is_text(name)]
        if unreadable:  # nobody can name them, and they would keep others out
            logger.error("schedules whose ids are no text are parked: %.500r", unreadable)
            await self._client.connection.command("ZREM", self._keys[1], *unreadable)
        return DueSchedules(schedules=_unpack(due), now=float(now), next_at=_time(next_at))

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        queues = list({envelope.queue: None for envelope in batch})
        if queues:
            await self._introduce(queues)
        args: list[Word] = [
            self._client.time_shift,
            schedule_id,
            b"" if seen is None else b"=" + items.pack_revision(seen),
            b"" if new is None else items.pack_revision(new.revision) + b"\n" + new.body,
            "" if new is None or new.due_at is None else new.due_at,
        ]
        keys = [*self._keys, *map(self._client.keys.base, queues)]
        targets = {queue: number for number, queue in enumerate(queues, len(self._keys) + 1)}
        for envelope in batch:
            due, item = items.pack_with_due(envelope, self._client.serials)
            args += (targets[envelope.queue], due, item)
        swap = scripts.COMPARE_AND_SWAP
        return bool(await self._client.connection.script(swap, keys, args))


def _unpack(reply: Sequence[bytes]) -> list[StoredSchedule]:
    """Return the schedules in a script's reply: for each its id, due time and stored text."""
    found: list[StoredSchedule] = []
    for name, due, stored in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
        if not _is_text(name):
            continue
        revision, _, body = stored.partition(b"\n")
        found.append(
            StoredSchedule(
                id=name.decode(),
                body=body,
                due_at=_time(due),
                revision=items.unpack_revision(revision),
            )
        )
    return found


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _time(text: bytes) -> float | None:
    return float(text) if text else None
