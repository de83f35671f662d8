"""Two worker processes compared with one, with tasks of 200 µs of Python each.

The queue is filled, and the producer has ended, before ``aiotaskq worker -w N`` starts. Ended tasks
are counted from outside: each stores one result, and every 20 ms the Redis server is asked for the
number of keys in their database, which is very cheap. The measurement begins when a result is first
seen and ends when the last one is seen, so the start of the processes does not count; nor do the
results that were seen first. Runs with one process and with two take turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import Bench

TWO = Target(1.6)  # times the rate of one
_TASK = 200e-6  # seconds
_LOOK = 0.02  # seconds
_PATIENCE = 300.0  # seconds for the whole


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield the rates of one and of two, and their ratio."""
    count = bench.size(50_000, 2_000)
    rounds = calibrate(_TASK)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(bench.runs(3)):
        for processes, taken in rates.items():
            taken.append(_rate(bench, processes, rounds, count))
    for processes, taken in rates.items():
        what = f"{count:,} tasks of 200 µs, {processes} worker process{'es' * (processes > 1)}"
        yield Figure(what, "tasks/s", taken)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    yield Figure("two worker processes against one", "ratio", ratios, target=TWO)


def calibrate(seconds: float) -> int:
    """Return the number of rounds of `tasks.spin` that take this long on this machine when idle."""
    trial = 100_000
    best = min(_spin(trial) for _ in range(10))
    return max(1, round(trial * seconds / best))


def _spin(rounds: int) -> float:
    started = time.perf_counter()
    for _ in range(rounds):
        pass
    return time.perf_counter() - started


def _rate(bench: Bench, processes: int, rounds: int, count: int) -> float:
    store = bench.redis()
    store.fill(tasks.spin.s(rounds), count)
    with bench.worker(store, processes=processes, ready=False):
        return _watch(bench, count)


def _watch(bench: Bench, count: int) -> float:
    """Return the tasks per second between the first result that is seen and the last one."""
    end = time.monotonic() + _PATIENCE
    first: tuple[float, int] | None = None
    while time.monotonic() < end:
        done = bench.count_results()
        now = time.perf_counter()
        if done and first is None:
            first = now, done
        if first is not None and done >= count:
            since, already = first
            return (done - already) / (now - since)
        time.sleep(_LOOK)
    raise TimeoutError(f"{bench.count_results():,} of {count:,} tasks in {_PATIENCE:g} s")
