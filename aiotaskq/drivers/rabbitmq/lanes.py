"""The lanes of a consumer: the queues of the server that its task queues consist of.

Each priority of a task queue that is in use has a queue of its own, a lane. Those above 0 are found
on the list of queues (`membership/`), which the consumer reads as it grows.

Theory of operation
-------------------
`stale` is set in the reader when a priority is new on the list. The next fetch calls `find`, which
declares the lane, because the sender that put it on the list may have died before it did so, and
adds it. A lane that cannot be declared is left out for good, with a warning: the others are served.
After a queue was deleted, `find` makes all lanes again, as senders do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aiotaskq.drivers.rabbitmq.membership import RabbitMembership
from aiotaskq.drivers.rabbitmq.names import Declaration, Lane, RabbitNames, Source
from aiotaskq.drivers.rabbitmq.topology import RabbitTopology
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.rabbitmq")


class ConsumerLanes:
    """The lanes of some task queues.

    Args:
        names: The names of queues.
        topology: Declares them.
        membership: It has the list of queues; this object takes its callbacks.
        queues: The task queues.
        on_stale: Called when there may be a new lane.
        on_made_again: Called when a lane that was deleted was made again by another process.

    Attributes:
        of: The lanes of each task queue, those of higher priorities first.
        sources: The queues of suspects of all task queues, and all lanes.
        stale: Whether `find` may find another lane.
    """

    def __init__(
        self,
        names: RabbitNames,
        topology: RabbitTopology,
        membership: RabbitMembership,
        queues: Sequence[str],
        on_stale: Callable[[], None],
        on_made_again: Callable[[], None],
    ) -> None:
        self._names = names
        self._topology = topology
        self._membership = membership
        self._on_stale = on_stale
        self._on_made_again = on_made_again
        self._unusable: set[Lane] = set()
        self.of: dict[str, list[Lane]] = {one: [(one, 0)] for one in queues}
        self.sources: list[Source] = []
        self._note_sources()
        self.stale = True
        membership.on_level = self._note_level

    def _note_level(self, queue: str) -> None:
        if queue in self.of:
            self.stale = True
            self._on_stale()

    def watch_deletions(self) -> None:
        """Begin to listen for lanes that are made again; older records are no news."""
        self._membership.on_made_again = self._note_made_again

    def _note_made_again(self, queue: str) -> None:
        if queue in self.of:
            self.on_deleted()
            self._on_made_again()

    def _note_sources(self) -> None:
        suspects: list[Source] = [(queue, None) for queue in self.of]
        self.sources = [*suspects, *(one for lanes in self.of.values() for one in lanes)]

    def on_deleted(self) -> None:
        """Take note that one of their queues was deleted."""
        self._topology.on_deleted()
        self.stale = True

    async def find(self) -> None:
        """Declare the lanes that are new on the list or deleted, and add the new ones.

        Raises:
            Unavailable: The server cannot be reached; it is to be done again.
        """
        new = [
            (queue, level)
            for queue, lanes in self.of.items()
            for level in self._membership.levels(queue)
            if (queue, level) not in lanes and (queue, level) not in self._unusable
        ]
        self.stale = False
        try:
            known = [one for lanes in self.of.values() for one in lanes]
            unusable = await self._topology.ensure([*known, *new])
        except BaseException:
            self.stale = True
            raise
        for lane in new:
            error = unusable.get(lane)
            if error is None:
                self.of[lane[0]].append(lane)
                self.of[lane[0]].sort(reverse=True)
                continue
            self._unusable.add(lane)
            logger.warning(
                "Tasks of priority %d in the queue %s cannot be fetched: %s",
                *(lane[1], lane[0], error),
                extra={"event": "rabbitmq_unusable_priority", "queue": lane[0]},
            )
        self._note_sources()

    def plan(
        self, counts: Mapping[Source, int], order: Sequence[str], most: int
    ) -> dict[Source, int]:
        """Return how many messages to take from each source: task queues in order, then priorities.

        Args:
            counts: The number of messages that wait in each source.
            order: The task queues.
            most: The largest number to take.
        """
        plan: dict[Source, int] = {}
        for queue in order:
            for lane in self.of[queue]:
                count = min(most, counts[lane])
                if count:
                    plan[lane] = count
                    most -= count
        return plan

    def name(self, source: Source) -> str:
        """Return the name of a source at the server."""
        queue, priority = source
        if priority is None:
            return self._names.suspects(queue)
        return self._names.ready(queue, priority)

    def declare(self, source: Source) -> Declaration:
        """Return the declaration of a source."""
        queue, priority = source
        if priority is None:
            return self._names.declare_suspects(queue)
        return self._names.declare_ready(queue, priority)
