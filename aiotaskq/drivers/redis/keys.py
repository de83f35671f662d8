"""The names of keys. What lies under the base of a queue is told in `lua/shared.lua`."""

from __future__ import annotations

from typing import Final

_QUOTED = str.maketrans({"%": "%25", "{": "%7B", "}": "%7D"})


class Keys:
    """The keys of one prefix.

    Args:
        given: What all keys begin with.
        tag: What follows in braces, so that all of them lie in one slot of a cluster.
    """

    def __init__(self, given: str, tag: str | None = None) -> None:
        self.given: Final = given
        prefix = given if tag is None else f"{given}:{{{tag}}}"
        self.prefix: Final = prefix
        self.queues: Final = f"{prefix}:queues"  # SET: every queue that was ever used
        self.cancelled: Final = f"{prefix}:cancelled"  # ZSET: ids by the time of their cancelling
        self.results: Final = f"{given}:results"  # channel, of all slots: JSON lists of ids
        self.none: Final = f"{prefix}:none"  # never exists: scripts delete it to begin with
        self.schedules: Final = f"{prefix}:schedules"  # HASH: id -> "<revision>\n<body>"
        self.schedules_due: Final = f"{prefix}:schedules:due"  # ZSET: ids by when they are due
        self.ids: Final = f"{prefix}:ids:"  # and an id: STRING, a unique envelope was stored
        self._bases: dict[str, str] = {}

    def base(self, queue: str) -> str:
        """Return what all keys of a queue begin with, the slot of a cluster included."""
        base = self._bases.get(queue)
        if base is None:
            # A brace of the name would end, or begin, what the slot is computed from.
            base = f"{self.prefix}:{{{queue.translate(_QUOTED)}}}:"
            if len(self._bases) < 10_000:
                self._bases[queue] = base
        return base

    def result(self, task_id: str) -> str:
        """Return the key of a final outcome."""
        return f"{self.prefix}:result:{task_id}"

    def outcome(self, task_id: str) -> tuple[str, str]:
        """Return the keys of a final outcome and of one that is not final."""
        return f"{self.prefix}:result:{task_id}", f"{self.prefix}:state:{task_id}"
