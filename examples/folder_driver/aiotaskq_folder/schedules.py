"""The store of schedules.

Theory of operation. Each schedule is one file. A change compares the revision under the lock, and
replaces the file and stores the messages of its runs with one call of `apply`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq_folder.connection import FolderConnection, in_thread
from aiotaskq_folder.messages import hashed, store
from aiotaskq_folder.notify import MESSAGES


class FolderSchedules:
    """See `aiotaskq.contract.schedules.ScheduleStore`; made by `FolderBroker.schedules`."""

    def __init__(self, folder: FolderConnection) -> None:
        self.folder = folder

    @in_thread
    def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        return [one for one in self._all() if ids is None or one.id in ids]

    def _all(self) -> list[StoredSchedule]:
        """Return all schedules in the order of their ids."""
        names = self.folder.names("schedules")
        read = [self.folder.read(f"schedules/{name}", StoredSchedule) for name in names]
        return sorted((one for one in read if one is not None), key=lambda one: one.id)

    @in_thread
    def due(self, limit: int) -> DueSchedules:
        now = self.folder.clock()
        timed = [(one.due_at, one.id, one) for one in self._all() if one.due_at is not None]
        due = sorted(one for one in timed if one[0] <= now)
        return DueSchedules(
            schedules=[one for _, _, one in due[:limit]],
            now=now,
            next_at=min((due_at for due_at, _, _ in timed if due_at > now), default=None),
        )

    @in_thread
    def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        file = f"schedules/{hashed(schedule_id)}"
        there = self.folder.read(file, StoredSchedule)
        if seen != (None if there is None else there.revision):
            return False
        steps = store(self.folder, batch)
        steps.append((file, None) if new is None else (self.folder.write(new), file))
        self.folder.apply(steps)
        self.folder.wake(MESSAGES)
        return True
