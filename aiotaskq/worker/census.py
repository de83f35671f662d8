"""The census: which tasks other live workers know, taken while this one meets unknown tasks.

A task that no worker knows goes to the dead letters after `unknown_task_ttl`; one that another
worker serves and knows goes back to its queue for as long as that worker lives. So the answer has
to be fresh, and it is of no interest to a worker that knows all tasks it gets: the broker is asked
only for a while after a delivery whose task is unknown here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import read_worker_info

_TAKEN_FOR = 60.0  # seconds after an unknown task


class Census:
    """The tasks that other workers know.

    Args:
        broker: An open broker.
        consumer: The id of our own consumer, which does not count.
        clock: Seconds, for tests.
    """

    def __init__(
        self, broker: Broker, consumer: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._broker = broker
        self._consumer = consumer
        self._clock = clock
        self._until = 0.0
        # The queues and the tasks of each other worker.
        self._known: list[tuple[frozenset[str], frozenset[str]]] = []

    def note_unknown(self) -> None:
        """Note that a delivery came whose task is unknown here."""
        self._until = self._clock() + _TAKEN_FOR

    def knows(self, queue: str, task: str) -> bool:
        """Return whether another worker that serves a queue knows a task, as last seen."""
        return any(queue in queues and task in tasks for queues, tasks in self._known)

    async def take(self) -> None:
        """Ask the broker, if there is a reason to. Called about once a second.

        Raises:
            BrokerUnavailable: It cannot be reached now.
        """
        if self._clock() >= self._until:
            self._known = []
            return
        self._known = [
            (frozenset(other.queues), frozenset(info.tasks))
            for other in await self._broker.consumers()
            if other.id != self._consumer and (info := read_worker_info(other.about)) is not None
        ]
