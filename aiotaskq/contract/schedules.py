"""Contract of a schedule store, a part of a broker: see `Broker.schedules`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule


class ScheduleStore(Protocol):
    """Store of schedules, from which each due run is sent once.

    Any number of schedulers use it at the same time, without a lock or a lease. A scheduler that
    changes a schedule names the revision that it has read; of several that read the same revision,
    one succeeds. The same step stores the messages of the runs and moves the schedule on to its
    next run. So a run is sent once, even if a scheduler dies between any two operations.
    """

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        """Return schedules, sorted by id: those with these ids, or all of them.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def due(self, limit: int) -> DueSchedules:
        """Return up to `limit` schedules that are due, the earliest first.

        This changes nothing: the next call returns the same schedules until they are changed.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        """Change a schedule and store the envelopes of its runs, in one step.

        Args:
            schedule_id: The id of the schedule, the same as in `new`.
            seen: The revision that the caller has read; None: there was no schedule with this id.
            new: The new schedule; None deletes the schedule.
            batch: Envelopes to store as by `Broker.publish`; none of them is unique.

        Returns:
            True if `seen` is still the revision of the schedule. If not, nothing was changed.

        Raises:
            BrokerUnavailable: The broker cannot be reached now. Either all of it was done, or
                nothing.
        """
        ...
