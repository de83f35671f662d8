"""Counts of dead letters, spared where the last one still holds."""

from __future__ import annotations


class DeadLetterCount:
    """The last count that found no queue with too many dead letters.

    Counting reads every dead letter. It is worth that only after a new one has come since the
    last count that found nothing to drop, or when the limit has changed. Dropping dead letters,
    by whatever process, never makes a count necessary.
    """

    __slots__ = ("_most", "_newest")

    def __init__(self) -> None:
        self._newest: int | None = None
        self._most = -1

    def is_due(self, newest: int | None, most: int) -> bool:
        """Return whether the dead letters have to be counted.

        Args:
            newest: The key of the newest dead letter of all queues; None: there is none.
            most: How many dead letters a queue may keep.
        """
        return newest is not None and (newest, most) != (self._newest, self._most)

    def note(self, newest: int | None, most: int) -> None:
        """Note that a count found nothing to drop."""
        self._newest, self._most = newest, most
