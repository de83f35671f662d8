"""Soak: ten million tasks in one worker, with results that expire after two seconds.

``python -m benchmarks soak --tasks N``. There are 20 rounds. In each round this process sends a
twentieth of the tasks, some thousands ahead of the worker at most. Then it waits until all tasks
have run and all results have expired, and reads the memory of the worker's processes and of the
Redis server. Nothing is stored at that moment, so memory that has grown is a leak. The first
quarter of the rounds is a warm-up; the growth is from the median of the second quarter to the
median of the last one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import BATCH, Bench, Store, resident, run, wait_until

TASKS = 10_000_000
NO_GROWTH = Target(3, most=True)  # percent: fragmentation of the allocators
_AHEAD = 20_000  # tasks that may wait
_LOOK_EVERY = 10  # batches


@dataclass(frozen=True)
class Look:
    """The memory at the end of a round, in bytes, and the rate of the round."""

    worker: int
    server: int
    rate: float


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield the rate, and the memory of the worker and of the server with its growth."""
    rounds, expiry = bench.size(20, 4), bench.size(2, 1)  # seconds
    count = (bench.tasks or bench.size(TASKS, 2_000)) // rounds
    store = bench.redis()
    looks = []
    with bench.worker(store, AIOTASKQ_RESULT_EXPIRES=str(expiry)) as program:
        for number in range(1, rounds + 1):
            rate = run(_round(bench, store, count))
            used = resident(*(process.pid for process in program.family()))
            looks.append(Look(used, int(bench.redis_info("memory")["used_memory"]), rate))
            print(f"{number * count:,} tasks: {_shown(looks[-1])}", flush=True)
    what = f"soak of {count * rounds:,} tasks"
    yield Figure(f"{what}: rate", "tasks/s", [look.rate for look in looks])
    memory = {
        "worker": [look.worker for look in looks],
        "Redis": [look.server for look in looks],
    }
    for who, taken in memory.items():
        yield Figure(f"{what}: memory of {who}", "MB", [each / 1e6 for each in taken])
        yield Figure(f"{what}: growth of {who}", "%", [growth(taken)], target=NO_GROWTH)


def growth(used: Sequence[float]) -> float:
    """Return the growth from the second quarter of the values to the last one, in percent."""
    quarter = len(used) // 4
    before = statistics.median(used[quarter : 2 * quarter])
    return 100 * (statistics.median(used[-quarter:]) / before - 1)


async def _round(bench: Bench, store: Store, count: int) -> float:
    """Run some tasks, wait until their results have expired, and return the tasks per second."""
    started = time.perf_counter()
    async with store.app() as app:

        async def waiting() -> int:
            depths = (await (await app.broker()).depth()).values()
            return sum(depth.ready + depth.held for depth in depths)

        async def not_far_behind() -> bool:
            return await waiting() < _AHEAD

        async def done() -> bool:
            return not await waiting()

        async def expired() -> bool:
            return not bench.count_results()

        call = tasks.noop.s(1)
        for number, start in enumerate(range(0, count, BATCH)):
            if number % _LOOK_EVERY == 0:
                await wait_until(not_far_behind, "the worker to come near", every=0.01)
            await app.kiq_many([call] * min(BATCH, count - start))
        await wait_until(done, "the last tasks", every=0.01)
        taken = time.perf_counter() - started
        await wait_until(expired, "the results to expire")
    return count / taken


def _shown(look: Look) -> str:
    return (
        f"{look.rate:,.0f} tasks/s, worker {look.worker / 1e6:.1f} MB,"
        f" Redis {look.server / 1e6:.2f} MB"
    )
