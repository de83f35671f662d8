"""The waiting room: executions that were accepted while no thread or process was free for them.

They are held for a moment only, so that threads with short functions always find the next one. An
execution that does not start soon is handed back to its queue, where another worker may take it,
and where a task of a higher priority comes before it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from aiotaskq.tasks.option_table import Executor
from aiotaskq.worker.execution import Execution

_Entry: TypeAlias = tuple[int, int, float, Execution]  # the order of starting, and since when


class WaitingRoom:
    """Executions that wait for a slot of an executor, by priority, then in their order.

    Args:
        clock: Seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self._heaps: dict[Executor, list[_Entry]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def has(self, executor: Executor) -> bool:
        """Return whether any execution waits for an executor."""
        return bool(self._heaps.get(executor))

    def add(self, execution: Execution) -> None:
        """Add an execution, which comes after those of its priority."""
        entry = (-execution.delivery.priority, next(self._numbers), self._clock(), execution)
        heappush(self._heaps.setdefault(execution.options.executor, []), entry)

    def next(self, executor: Executor) -> Execution:
        """Remove and return the execution that is to start first; there has to be one."""
        return heappop(self._heaps[executor])[-1]

    def remove(self, ids: Container[str]) -> list[Execution]:
        """Remove and return the executions with these ids."""
        gone: list[Execution] = []
        for executor, heap in self._heaps.items():
            out = [entry[-1] for entry in heap if entry[-1].delivery.id in ids]
            if out:
                gone += out
                self._heaps[executor] = [one for one in heap if one[-1].delivery.id not in ids]
                heapify(self._heaps[executor])
        return gone

    def empty(self, executor: Executor | None = None) -> list[Execution]:
        """Remove and return all executions, or those for one executor, in the order of arrival."""
        executors: list[Executor] = list(self._heaps) if executor is None else [executor]
        entries = [entry for name in executors for entry in self._heaps.pop(name, ())]
        return [entry[-1] for entry in sorted(entries, key=lambda entry: entry[1])]

    def since(self) -> dict[Executor, float]:
        """Return the time at which the oldest execution for each executor was added."""
        return {
            executor: min(entry[2] for entry in heap)
            for executor, heap in self._heaps.items()
            if heap
        }
