"""Schedules in a hash, and those that have a next run in a sorted set beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import Client
from aiotaskq.drivers.redis.link import Word

_AT_ONCE = 100  # read in one call of a script


class RedisSchedules:
    """See `aiotaskq.contract.schedules.ScheduleStore`.

    Args:
        client: Of the broker.
        introduce: What makes queues known before anything is stored in them.
    """

    def __init__(
        self, client: Client, introduce: Callable[[Collection[str]], Awaitable[None]]
    ) -> None:
        self._client = client
        self._introduce = introduce
        self._keys = [client.keys.schedules, client.keys.schedules_due]

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        link = self._client.link
        wanted: list[Word] = []
        if ids is None:
            wanted += await link.command("HKEYS", self._client.keys.schedules)
        else:
            wanted += set(ids)
        found: list[StoredSchedule] = []
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            found += _unpack(await link.script(scripts.LOAD, self._keys, part))
        return sorted(found, key=lambda one: one.id)

    async def due(self, limit: int) -> DueSchedules:
        words = [self._client.time_shift, limit]
        now, next_at, *due = await self._client.link.script(scripts.DUE, self._keys, words)
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
        words: list[Word] = [
            self._client.time_shift,
            schedule_id,
            b"" if seen is None else b"=" + items.pack_id(seen),
            b"" if new is None else items.pack_id(new.revision) + b"\n" + new.body,
            "" if new is None or new.due_at is None else new.due_at,
        ]
        keys = [*self._keys, *map(self._client.keys.base, queues)]
        targets = {queue: number for number, queue in enumerate(queues, len(self._keys) + 1)}
        for envelope in batch:
            words += (targets[envelope.queue], *items.place(envelope, self._client.serials))
        return bool(await self._client.link.script(scripts.SWAP, keys, words))


def _unpack(reply: Sequence[bytes]) -> list[StoredSchedule]:
    """Return what a script read: id, due time and what is kept, one after the other."""
    found: list[StoredSchedule] = []
    for name, due, kept in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
        revision, _, body = kept.partition(b"\n")
        found.append(
            StoredSchedule(
                id=name.decode(errors="replace"),
                body=body,
                due_at=_time(due),
                revision=items.unpack_id(revision),
            )
        )
    return found


def _time(text: bytes) -> float | None:
    return float(text) if text else None
