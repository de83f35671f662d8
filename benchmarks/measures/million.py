"""A million queued tasks: the memory that they use in Redis, and their effect on the rate.

The memory of a task is the server's `used_memory` with all tasks queued, minus its value before,
divided by the number of tasks. The rate is measured as in `benchmarks.measures.drains` for 100,000
tasks: the first ones of the million, compared with a queue that has only 100,000. The two take
turns on one server; the tasks taken from the long queue are put back before the next turn.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import Bench
from benchmarks.measures.drains import drain

MEMORY = Target(300, most=True)  # bytes a task
RATE = Target(0.9)  # of the rate with a short queue
_SHORT = 2  # the database of the short queue; the long one is in 0


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield bytes per task, and both rates."""
    many, taken = bench.size(1_000_000, 20_000), bench.size(100_000, 2_000)
    noop = tasks.noop.s(1)
    store = bench.redis()
    before = bench.redis_info("memory")["used_memory"]
    store.fill(noop, many)
    used = bench.redis_info("memory")["used_memory"] - before
    yield Figure(f"{many:,} queued tasks: memory", "bytes/task", [used / many], target=MEMORY)
    full, short = [], []
    for _ in range(bench.runs(3)):
        short.append(drain(bench, bench.redis(_SHORT), noop, taken))
        full.append(drain(bench, store, noop, taken, filled=True))
        bench.redis_server.flush(1)  # its results
        store.fill(noop, taken)
    what = f"drain {taken:,} of"
    yield Figure(f"{what} {taken:,} queued", "tasks/s", [one.rate for one in short])
    yield Figure(f"{what} {many:,} queued", "tasks/s", [one.rate for one in full])
    ratios = [one.rate / other.rate for one, other in zip(full, short, strict=True)]
    yield Figure(f"{what} {many:,} queued: of the short queue's", "ratio", ratios, target=RATE)
