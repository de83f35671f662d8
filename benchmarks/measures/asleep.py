"""Ten thousand sleeping tasks in one worker process: their rate, and the memory of each.

Each task sleeps for one second, and there are thirty tasks for each slot. So the ideal rate is the
number of slots per second. The measurement begins when as many tasks have woken as there are slots,
and ends with the last task. So the time for filling the slots does not count. A second figure
includes it.

At first all tasks begin to sleep together and wake together, and the work of all of them is added
to the second. After several rounds the work is spread over the second. A third figure is for the
first ten rounds.

The memory is that of the process with all slots filled, minus its memory when the worker was ready,
divided by the number of slots: message, coroutine and timer.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import Bench

SHARE = Target(95)  # percent of the ideal
MEMORY = Target(15, most=True)  # kB a task
_TURNS = 30  # tasks for each slot


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield shares of the ideal rate, and kB per task."""
    slots, seconds = bench.size(10_000, 200), bench.size(1.0, 0.1)
    taken = [_run(bench, slots, seconds) for _ in range(bench.runs(3))]
    what = f"{slots:,} tasks asleep at once"
    shares = [100 * one["steady_share"] for one in taken]
    yield Figure(f"{what}: rate", "% of ideal", shares, target=SHARE)
    shares = [100 * one["whole_share"] for one in taken]
    yield Figure(f"{what}: rate, filling the slots included", "% of ideal", shares)
    shares = [100 * one["early_share"] for one in taken]
    yield Figure(f"{what}: rate of the first ten turns", "% of ideal", shares)
    memory = [one["bytes_each"] / 1000 for one in taken]
    most = min(one["most_asleep"] for one in taken)
    note = "" if most >= slots else f"at most {most:,.0f} were asleep at once"
    yield Figure(f"{what}: memory", "kB/task", memory, target=MEMORY, note=note)


def _run(bench: Bench, slots: int, seconds: float) -> dict[str, float]:
    store = bench.redis()
    store.fill(tasks.sleep.s(seconds), slots * _TURNS)
    return store.ask("benchmarks.measures.sleeper", str(slots), str(seconds))
