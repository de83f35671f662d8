"""Timing that several drivers share: work that is due from time to time, and signs of a stall."""

from __future__ import annotations


def is_stall(silence: float, lease: float) -> bool:
    """Return whether a silence means that the store or its clock stood still.

    The holder of a lease renews it several times within the lease. When no consumer at all gave a
    sign of life for half a lease, none of them could: the server stood still or was away, somebody
    held a lock, or the clock was set forward. A lease that ran out meanwhile proves no death.

    Args:
        silence: Seconds since the last sign of life of any consumer.
        lease: Seconds of the lease in question.
    """
    return silence > lease / 2


class SweepTimer:
    """Tells when expired rows have to be removed: now and then, and at once while there are more.

    Args:
        every: Seconds between two sweeps.
    """

    __slots__ = ("due_at", "every")

    def __init__(self, every: float) -> None:
        self.every = every
        self.due_at = 0.0

    def is_due(self, now: float) -> bool:
        """Return whether it is time for a sweep."""
        return now >= self.due_at

    def note(self, now: float, *, more: bool) -> None:
        """Note a sweep, by the clock that `is_due` is asked with.

        Args:
            now: The time of the sweep.
            more: Whether the sweep reached its limit, so that there may be more to remove.
        """
        self.due_at = now if more else now + self.every
