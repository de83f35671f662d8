"""How fast one worker process takes tasks from a full queue, results stored.

The queue is filled first, and its producer has ended. The worker runs in a process of its own
(`benchmarks.drain`), which measures itself: the clock runs from the start of the worker, its
connections included, until the queue is empty and everything is stored and settled; the start of
Python and the imports are left out. The CPU time of the Redis server is that of its process from
before the start of the worker's process until after its end: while that one starts, the server has
nothing to do.

Runs on Redis with results there and with results in PostgreSQL take turns, so that their ratio is
that of neighbours in time. Redis keeps nothing on disk, PostgreSQL does not wait for the disk;
SQLite is as durable as it is by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aiotaskq.tasks.call import Call
from benchmarks import tasks
from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import Bench, Store, cpu_seconds

WORKER_CPU = Target(20, most=True)  # microseconds a task
THREADS = Target(10_000)
SQLITE = Target(5_000)
POSTGRES = Target(0.5)  # of the rate with results in Redis
ALL_POSTGRES = Target(20_000)


@dataclass(frozen=True)
class Drained:
    """What came of one run.

    Attributes:
        count: Tasks that were run.
        seconds: By the clock.
        cpu: Seconds of the worker process.
        server_cpu: Seconds of the Redis server, where there is one.
        memory: The most that the worker process occupied, in MB.
    """

    count: int
    seconds: float
    cpu: float
    server_cpu: float
    memory: float

    @property
    def rate(self) -> float:
        return self.count / self.seconds


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield the rates, and what they cost."""
    many, some = bench.size(100_000, 2_000), bench.size(20_000, 1_000)
    runs = bench.runs(5)
    noop, in_thread = tasks.noop.s(1), tasks.noop_in_thread.s(1)
    plain, mixed = [], []
    for _ in range(runs):
        plain.append(drain(bench, bench.redis(), noop, many))
        mixed.append(drain(bench, bench.mixed(), noop, many))
    what = f"drain {many:,} noop, Redis"
    yield from figures(what, plain, cpu_target=WORKER_CPU, server=True)
    what += ", results in PostgreSQL"
    yield from figures(what, mixed, server=True)
    shares = [beside.rate / one.rate for one, beside in zip(plain, mixed, strict=True)]
    yield Figure(f"{what}: of the rate in Redis", "ratio", shares, target=POSTGRES)
    stored = [drain(bench, bench.postgres(), noop, many) for _ in range(runs)]
    yield from figures(f"drain {many:,} noop, PostgreSQL", stored, ALL_POSTGRES)
    threaded = [drain(bench, bench.redis(), in_thread, some) for _ in range(runs)]
    yield from figures(f"drain {some:,} noop_in_thread, Redis", threaded, THREADS, server=True)
    few = some // 2
    embedded = [drain(bench, bench.sqlite(), noop, few) for _ in range(runs)]
    yield from figures(f"drain {few:,} noop, SQLite", embedded, SQLITE)


def figures(
    what: str,
    runs: Sequence[Drained],
    target: Target | None = None,
    *,
    cpu_target: Target | None = None,
    server: bool = False,
) -> Iterator[Figure]:
    """Yield what drains of one kind came to."""
    yield Figure(what, "tasks/s", [one.rate for one in runs], target=target)
    cpu = [one.cpu / one.count * 1e6 for one in runs]
    yield Figure(f"{what}: worker CPU", "µs/task", cpu, target=cpu_target)
    if server:
        cpu = [one.server_cpu / one.count * 1e6 for one in runs]
        yield Figure(f"{what}: Redis CPU", "µs/task", cpu)
    yield Figure(f"{what}: peak memory", "MB", [one.memory for one in runs])


def drain(
    bench: Bench, store: Store, call: Call[Any], count: int, *, filled: bool = False
) -> Drained:
    """Have a worker process run so many tasks of a full queue.

    Args:
        bench: Where the servers are.
        store: An empty one.
        call: What fills it.
        count: How many tasks are run.
        filled: The store holds as many tasks already, or more.
    """
    if not filled:
        store.fill(call, count)
    server = [bench.redis_server.pid] if store.broker.startswith("redis") else []
    before = cpu_seconds(*server)
    told = store.ask("benchmarks.drain", *([str(count)] if filled else []))
    return Drained(
        count,
        seconds=told["seconds"],
        cpu=told["cpu_seconds"],
        server_cpu=cpu_seconds(*server) - before,
        memory=told["memory_kib"] * 1024 / 1e6,
    )
