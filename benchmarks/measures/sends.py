"""Rate of sending from one process: `kiq` from 100 concurrent callers, and `kiq_many` of 1,000.

The measurement includes only the calls; the connection is opened before. No worker runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import BATCH, Bench, Store, run

CALLERS = 100
KIQ_MANY = Target(100_000)


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield tasks per second."""
    runs = bench.runs(5)
    for fresh, count, target in (
        (bench.redis, bench.size(50_000, 2_000), KIQ_MANY),
        (bench.sqlite, bench.size(10_000, 1_000), None),
    ):
        store = fresh()
        rates = [run(_kiq(fresh(), count)) for _ in range(runs)]
        yield Figure(f"kiq from {CALLERS} callers, {store.name}", "tasks/s", rates)
        rates = [run(_kiq_many(fresh(), count)) for _ in range(runs)]
        yield Figure(f"kiq_many of {BATCH:,}, {store.name}", "tasks/s", rates, target=target)


async def _kiq(store: Store, count: int) -> float:
    async with store.app() as app:

        async def caller() -> None:
            for _ in range(count // CALLERS):
                await app.send(tasks.noop.name, (1,))

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return count / (time.perf_counter() - started)


async def _kiq_many(store: Store, count: int) -> float:
    async with store.app() as app:
        template = tasks.noop.s(1)
        started = time.perf_counter()
        for _ in range(count // BATCH):
            await app.kiq_many([template] * BATCH)
        return count / (time.perf_counter() - started)
