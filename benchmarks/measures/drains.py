"""Drain: the rate at which one worker process empties a full queue, with stored results.

The queue is filled first, and the producer has ended. The worker runs in its own process
(`benchmarks.drain`), which measures itself: from the start of the worker, including its
connections, until the queue is empty and everything is stored and settled. The start of Python and
the imports do not count. The CPU time of the Redis server is that of its process from before the
start of the worker's process until after its end; while that process starts, the server is idle.

Runs with results in Redis and with results in PostgreSQL take turns, so that their ratio compares
runs at nearly the same time. Redis stores nothing on disk, PostgreSQL does not wait for the disk,
and SQLite has its default durability.
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
    """The result of one run.

    Attributes:
        count: The number of tasks that ran.
        seconds: The duration.
        cpu: CPU seconds of the worker process.
        server_cpu: CPU seconds of the Redis server, if there is one.
        memory: The peak memory of the worker process, in MB.
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
    """Yield the rates, CPU times and memory."""
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
    """Yield the figures of several drains of one kind."""
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
    """Let a worker process run some tasks of a full queue.

    Args:
        bench: The session, with the servers.
        store: An empty store.
        call: The call that fills it.
        count: The number of tasks to run.
        filled: Whether the store already has at least this number of tasks.
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
