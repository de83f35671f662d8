"""Delayed tasks: their lateness, their cost while they wait, and many that are due at once.

The lateness is the time from the due time of a task until its function begins in an idle
``aiotaskq worker``, by the clock of the machine. The tasks are stored in advance, and are due at
random moments with pauses between them. The cost of waiting is that of an idle worker beside one
million tasks that are due in an hour, measured as in `idle`. The drains are measured as in
`drains`: tasks that all became due just before the worker started, compared with tasks without a
delay, and tasks with one priority, compared with tasks without one; each pair takes turns.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import Bench, Store, percentile, run
from benchmarks.measures.drains import drain
from benchmarks.measures.idle import COMMANDS, CORE, pids_of, watch

LATE = Target(50, most=True)  # milliseconds
DUE = Target(0.5)  # of the rate of ready ones
PRIORITY = Target(1.05, most=True)  # of the CPU time without one: no more, but for the noise
_PAUSES = (0.05, 0.15)  # seconds between moments at which something is due
_LEAD = 1.0  # seconds until the first
_HOUR = 3600.0
_SEED = 20


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield lateness, the cost of waiting, and rates."""
    yield from _lateness(bench)
    yield from _waiting(bench)
    yield from _due_at_once(bench)
    yield from _priorities(bench)


def _lateness(bench: Bench) -> Iterator[Figure]:
    count = bench.size(200, 10)
    for store in (bench.redis(), bench.sqlite()):
        with bench.worker(store):
            runs = [sorted(run(_late(store, count))) for _ in range(bench.runs(3))]
        what = f"{count} lone delayed tasks, {store.name}: late"
        middle = [percentile(late, 50) for late in runs]
        yield Figure(f"{what}, p50", "ms", middle, target=LATE)
        yield Figure(f"{what}, p99", "ms", [percentile(late, 99) for late in runs])


async def _late(store: Store, count: int) -> list[float]:
    """Return the lateness of each task, in milliseconds."""
    pauses = random.Random(_SEED)
    due = datetime.now(UTC) + timedelta(seconds=_LEAD)
    calls, moments = [], []
    for _ in range(count):
        due += timedelta(seconds=pauses.uniform(*_PAUSES))
        moments.append(due.timestamp())
        calls.append(tasks.tell_time.with_options(eta=due).s())
    async with store.app() as app:
        handles = await app.kiq_many(calls)
        begun = await asyncio.gather(*(handle.result(_HOUR) for handle in handles))
    return [(at - moment) * 1000 for at, moment in zip(begun, moments, strict=True)]


def _waiting(bench: Bench) -> Iterator[Figure]:
    store, many = bench.redis(), bench.size(1_000_000, 5_000)
    store.fill(tasks.noop.with_options(countdown=_HOUR).s(1), many)
    with bench.worker(store) as worker:
        time.sleep(bench.size(5.0, 0.5))
        pids = {store.name: pids_of(worker)}
        windows = watch(bench, pids, bench.size(10.0, 1.5), bench.runs(3))
    what = f"idle worker beside {many:,} delayed tasks"
    shares = [100 * window.cpu[store.name] / window.seconds for window in windows]
    yield Figure(f"{what}: CPU", "% of a core", shares, target=CORE)
    rates = [window.sent.total() / window.seconds for window in windows]
    yield Figure(f"{what}: commands to Redis", "1/s", rates, target=COMMANDS)


def _due_at_once(bench: Bench) -> Iterator[Figure]:
    many = bench.size(10_000, 500)
    for fresh in (bench.redis, bench.sqlite)[: bench.size(2, 1)]:
        name, ready, due = "", [], []
        for _ in range(bench.runs(5)):
            store = fresh()
            name = store.name
            store.fill(tasks.noop.s(1), many)
            # Filled, as the other one: so that both end with the last task, and look for no more.
            ready.append(drain(bench, store, tasks.noop.s(1), many, filled=True).rate)
            store = _filled_due_at_once(bench, fresh, many)
            due.append(drain(bench, store, tasks.noop.s(1), many, filled=True).rate)
        yield Figure(f"drain {many:,} ready, {name}", "tasks/s", ready)
        what = f"drain {many:,} that fell due at once, {name}"
        yield Figure(what, "tasks/s", due)
        ratios = [one / other for one, other in zip(due, ready, strict=True)]
        yield Figure(f"{what}: of the ready ones' rate", "ratio", ratios, target=DUE)


def _filled_due_at_once(bench: Bench, fresh: Callable[[], Store], count: int) -> Store:
    """Return a store with tasks that all were due at one moment, which has just passed."""
    lead = bench.size(5.0, 1.0)
    while True:
        store = fresh()
        due = datetime.now(UTC) + timedelta(seconds=lead)
        store.fill(tasks.noop.with_options(eta=due).s(1), count)
        left = due.timestamp() - time.time()
        if left > 0:
            time.sleep(left)
            return store
        lead *= 2  # storing took so long that some were never delayed


def _priorities(bench: Bench) -> Iterator[Figure]:
    many = bench.size(20_000, 500)
    plain, urgent = tasks.noop.s(1), tasks.noop.with_options(priority=5).s(1)
    for fresh in (bench.redis, bench.sqlite)[: bench.size(2, 1)]:
        name, without, one = "", [], []
        for _ in range(bench.runs(5)):
            store = fresh()
            name = store.name
            without.append(drain(bench, store, plain, many))
            one.append(drain(bench, fresh(), urgent, many))
        what = f"drain {many:,} of priority 5, {name}"
        rates = [each.rate for each in without]
        yield Figure(f"drain {many:,} without priorities, {name}", "tasks/s", rates)
        yield Figure(what, "tasks/s", [each.rate for each in one])
        costs = [
            (each.cpu + each.server_cpu) / (other.cpu + other.server_cpu)
            for each, other in zip(one, without, strict=True)
        ]
        yield Figure(f"{what}: CPU, of that without", "ratio", costs, target=PRIORITY)
