"""Latency: the time from `kiq` to the result of one task, with an idle worker in another process.

The tasks are sent one at a time, so the worker always waits. The first tenth does not count: it
includes connecting and filling caches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import Bench, Store, percentile, run

REDIS = Target(1, most=True)  # milliseconds
REDIS_TAIL = Target(5, most=True)  # p99 to p50
SQLITE = Target(15, most=True)


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield the median, the 99th percentile, and their ratio."""
    runs = bench.runs(5)
    for store, count, target, tail_target in (
        (bench.redis(), bench.size(2_000, 100), REDIS, REDIS_TAIL),
        (bench.sqlite(), bench.size(500, 50), SQLITE, None),
    ):
        with bench.worker(store):
            taken = [sorted(run(_round_trips(store, count))) for _ in range(runs)]
        middle = [percentile(each, 50) for each in taken]
        tail = [percentile(each, 99) for each in taken]
        ratios = [p99 / p50 for p50, p99 in zip(middle, tail, strict=True)]
        what = f"round trip, {store.name}"
        yield Figure(f"{what}: p50", "ms", middle, target=target)
        yield Figure(f"{what}: p99", "ms", tail)
        yield Figure(f"{what}: p99 to p50", "ratio", ratios, target=tail_target)


async def _round_trips(store: Store, count: int) -> list[float]:
    async with store.app() as app:
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            await (await app.send(tasks.noop.name, (1,))).result(timeout=30)
            taken.append((time.perf_counter() - started) * 1000)
        return taken[count // 10 :]
