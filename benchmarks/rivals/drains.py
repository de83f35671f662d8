"""Rate at which a worker empties a full queue, measured from outside and in the same way for all.

Each task increments a counter in shared memory when it ends (`workloads`). The measurement begins
when the first ended task is seen and ends with the last one, so neither filling the queue nor the
start counts. Afterwards the store must have no unfinished task, and a result for each task.
"""

from __future__ import annotations

import mmap
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rivals import workloads
from benchmarks.rivals.contestants import Contestant, Failed
from benchmarks.rivals.processes import (
    Group,
    ask,
    cpu_seconds,
    peak_memory,
    wait_until,
    worker_of,
)
from benchmarks.rivals.stores import Store
from tests.servers import Watchdog

FILL_TIMEOUT = 600.0  # seconds
STALL_TIMEOUT = 60.0  # without a task that ends
SETTLE_TIMEOUT = 30.0  # between the last task and the last result
LOOK = 0.002  # seconds between looks at the counter


@dataclass(frozen=True)
class Drain:
    """The figures of one drain.

    Attributes:
        tasks: The number of tasks that ended during the measurement.
        seconds: The time from the first to the last of them.
        worker_cpu: CPU seconds of the worker's processes in that time.
        server_cpu: CPU seconds of the server.
        memory: Peak resident memory of the worker's processes, in bytes.
        settling: Seconds from the end of the last task until everything was stored.
        again: The number of additional runs of tasks.
    """

    tasks: int
    seconds: float
    worker_cpu: float
    server_cpu: float
    memory: int
    settling: float
    again: int

    @property
    def rate(self) -> float:
        return self.tasks / self.seconds


class _Counter:
    """The reader of the shared counter of ended tasks."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(workloads.COUNTER_BYTES))
        with file.open("r+b") as opened:
            shared = mmap.mmap(opened.fileno(), workloads.COUNTER_BYTES)
        self._slots = memoryview(shared).cast("Q")

    def read(self) -> int:
        return sum(self._slots[1:])


def measure(one: Contestant, store: Store, workload: str, count: int, watchdog: Watchdog) -> Drain:
    """Fill a queue, let a worker empty it, and check that it did.

    Raises:
        Failed: The contestant failed.
    """
    make_room(one, store, watchdog)
    ask(one, watchdog, FILL_TIMEOUT, "fill", workload, str(count), **store.variables())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "counter"
        counter = _Counter(file)
        variables = {**store.variables(), "BENCH_COUNTER": str(file)}
        with worker_of(one, workload, watchdog, **variables) as group:
            return _watch(one, store, counter, count, group)


def make_room(one: Contestant, store: Store, watchdog: Watchdog) -> None:
    """Empty the store, and let a contestant prepare it if it needs that."""
    store.empty()
    if one.prepare:
        ask(one, watchdog, FILL_TIMEOUT, "prepare", **store.variables())


def _watch(one: Contestant, store: Store, counter: _Counter, count: int, group: Group) -> Drain:
    _wait_for(counter, 1, group)
    tree, servers = group.tree(), store.processes()
    worker_cpu, server_cpu = cpu_seconds(tree), cpu_seconds(servers)
    started, first = time.perf_counter(), counter.read()
    _wait_for(counter, count, group)
    ended = time.perf_counter()
    tree, servers = group.tree(), store.processes()
    worker_cpu, server_cpu = cpu_seconds(tree) - worker_cpu, cpu_seconds(servers) - server_cpu
    _settle(one, store, count)
    settled = time.perf_counter()
    if first >= count:
        raise Failed(f"{count} tasks are too few to be measured")
    return Drain(
        tasks=count - first,
        seconds=ended - started,
        worker_cpu=worker_cpu,
        server_cpu=server_cpu,
        memory=peak_memory(tree),
        settling=settled - ended,
        again=counter.read() - count,
    )


def _wait_for(counter: _Counter, count: int, group: Group) -> None:
    seen, deadline = 0, time.monotonic() + STALL_TIMEOUT
    while (now := counter.read()) < count:
        if now > seen:
            seen, deadline = now, time.monotonic() + STALL_TIMEOUT
        if not group.running:
            raise Failed(f"the worker ended after {now} tasks:\n{group.errors}")
        if not wait_until(deadline, LOOK):
            raise Failed(f"nothing went on after {now} of {count} tasks:\n{group.errors}")


def _settle(one: Contestant, store: Store, count: int) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while True:
        left = store.left(one)
        stored = store.count(one.results) if one.results else count
        if left == 0 and stored >= count:
            return
        if not wait_until(deadline, 0.05):
            raise Failed(f"{left} of {count} tasks were left, {stored} results were stored")
