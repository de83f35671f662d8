"""Measure aiotaskq on servers started here, and print a table.

``python -m benchmarks [--quick] [--json FILE]``

Each figure is the median of several runs, with the least and the greatest beside it. Absolute
numbers say as much of the machine as of the code: compare two versions on one machine, in one
sitting.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from rich.console import Console
from rich.table import Table

from aiotaskq import TaskQueue, __version__
from benchmarks import tasks
from tests.servers import PostgresServer, RedisServer, Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    measure: str
    unit: str
    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


@dataclass(frozen=True)
class Store:
    """Where tasks wait and results rest in a run."""

    name: str
    broker: str
    backend: str

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "AIOTASKQ_BROKER_URL": self.broker,
            "AIOTASKQ_RESULT_BACKEND": self.backend,
        }

    def app(self) -> TaskQueue:
        """Return a producer that knows the tasks by name."""
        return TaskQueue("benchmarks", broker=self.broker, backend=self.backend)


async def _fill(store: Store, task: str, count: int) -> None:
    async with store.app() as app:
        template = tasks.app.tasks[task].s(1)
        for start in range(0, count, 1000):
            await app.kiq_many([template] * min(1000, count - start))


def _drain(store: Store, task: str, count: int) -> dict[str, float]:
    _run(_fill(store, task, count))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.drain"],
        env=store.environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def drain(store: Store, task: str, count: int, runs: int) -> Iterator[Figure]:
    """Tasks a second that one worker process takes from a full queue, results stored."""
    taken = [_drain(store, task, count) for _ in range(runs)]
    what = f"drain {count:,} {task.rpartition('.')[2]}, {store.name}"
    yield Figure(what, "tasks/s", [count / run["seconds"] for run in taken])
    yield Figure(
        f"{what}: worker CPU", "µs/task", [run["cpu_seconds"] / count * 1e6 for run in taken]
    )


async def _concurrent_kiq(store: Store, count: int, callers: int) -> float:
    async with store.app() as app:

        async def caller() -> None:
            for _ in range(count // callers):
                await app.send(NOOP, (1,))

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        taken = time.perf_counter() - started
        await (await app.broker()).purge("default")
        return count / taken


async def _kiq_many(store: Store, count: int) -> float:
    async with store.app() as app:
        template = tasks.noop.s(1)
        started = time.perf_counter()
        for _ in range(count // 1000):
            await app.kiq_many([template] * 1000)
        taken = time.perf_counter() - started
        await (await app.broker()).purge("default")
        return count / taken


def enqueue(store: Store, count: int, runs: int) -> Iterator[Figure]:
    """Tasks a second that one process sends."""
    yield Figure(
        f"kiq from 100 callers, {store.name}",
        "tasks/s",
        [_run(_concurrent_kiq(store, count, 100)) for _ in range(runs)],
    )
    yield Figure(
        f"kiq_many of 1,000, {store.name}",
        "tasks/s",
        [_run(_kiq_many(store, count)) for _ in range(runs)],
    )


@contextmanager
def _worker(store: Store) -> Iterator[None]:
    """Run a worker from the command line, as a user would."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aiotaskq", "worker", "benchmarks.tasks:app", "-l", "error"],
        env=store.environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def _round_trips(store: Store, count: int) -> list[float]:
    async with store.app() as app:
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            await (await app.send(NOOP, (1,))).result(timeout=30)
            taken.append((time.perf_counter() - started) * 1000)
        return taken[count // 10 :]  # the first ones wait for the worker and open connections


def round_trip(store: Store, count: int, runs: int) -> Iterator[Figure]:
    """Milliseconds from `kiq` to the result, one at a time, worker in another process."""
    with _worker(store):
        taken = [sorted(_run(_round_trips(store, count))) for _ in range(runs)]
    yield Figure(f"round trip p50, {store.name}", "ms", [statistics.median(t) for t in taken])
    yield Figure(f"round trip p99, {store.name}", "ms", [t[len(t) * 99 // 100] for t in taken])


NOOP = tasks.noop.name
IN_THREAD = tasks.noop_in_thread.name


def measure(folder: Path, watchdog: Watchdog, *, quick: bool) -> Iterator[Figure]:
    """Start the servers and yield every figure."""
    many, some, few, runs = (5_000, 1_000, 100, 1) if quick else (50_000, 10_000, 500, 5)
    file = f"sqlite:///{folder}/queue.db"
    sqlite = Store("SQLite", file, file)
    redis_server = RedisServer(watchdog, durable=False)
    postgres_server = PostgresServer(watchdog)
    redis_server.start()
    postgres_server.start()
    try:
        redis = Store("Redis", redis_server.url(0), redis_server.url(1))
        mixed = Store("Redis, results in PostgreSQL", redis_server.url(2), postgres_server.url())
        yield from drain(redis, NOOP, many, runs)
        yield from drain(redis, IN_THREAD, some, runs)
        yield from drain(mixed, NOOP, many, runs)
        yield from drain(sqlite, NOOP, some, runs)
        yield from enqueue(redis, many, runs)
        yield from enqueue(sqlite, some, runs)
        yield from round_trip(redis, few, runs)
        yield from round_trip(sqlite, few, runs)
    finally:
        redis_server.close()
        postgres_server.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tasks, one run: does it work?")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    options = parser.parse_args()
    console = Console()
    table = Table(title=f"aiotaskq {__version__}, {os.cpu_count()} cores")
    table.add_column("measure")
    for column in ("median", "least", "greatest"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    figures = []
    watchdog = Watchdog()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for figure in measure(Path(folder), watchdog, quick=options.quick):
                figures.append(figure)
                console.print(f"{figure.measure}: {figure.median:,.2f} {figure.unit}")
    finally:
        watchdog.close()
    for figure in figures:
        numbers = (figure.median, min(figure.runs), max(figure.runs))
        table.add_row(figure.measure, *(f"{number:,.2f}" for number in numbers), figure.unit)
    console.print(table)
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.platform()}
        report = {"version": __version__, **machine, "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
