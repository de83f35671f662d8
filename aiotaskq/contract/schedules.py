"""The contract of a schedule store."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule


class ScheduleStore(Protocol):
    """Where schedules rest, and from where each due run is sent once.

    There is no lease and no lock: whoever changes a schedule names the revision that it has seen,
    and of several who saw the same one succeeds. A run is sent in the same step in which its
    schedule is moved on, so that it happens once however many schedulers there are, whichever
    dies at whatever instant.
    """

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        """Return schedules in the order of their ids; None: all of them.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def due(self, limit: int) -> DueSchedules:
        """Return up to `limit` schedules that are due, the earliest first.

        Nothing is taken: whoever asks next is given the same until they are changed.

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
            schedule_id: Its id, as in `new`.
            seen: The revision that it is to have now; None: there is to be none of this id.
            new: What takes its place; None: it is removed.
            batch: Stored as `Broker.publish` does it, none of them unique.

        Returns:
            Whether `seen` was right. If not, nothing has happened.

        Raises:
            BrokerUnavailable: The broker cannot be reached now; it may have happened, in whole.
        """
        ...
