"""Parts that the benchmarks share: their size, the servers, and empty stores on the servers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import redis
import uvloop

from aiotaskq import TaskQueue
from aiotaskq.tasks.call import Call
from tests.faults.fleet import Program
from tests.servers import PostgresServer, RedisServer, Watchdog

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
APP = "benchmarks.tasks:app"
BATCH = 1000  # tasks in a call of kiq_many
_PATIENCE = 60.0  # seconds: what takes longer has failed


@dataclass(frozen=True)
class Store:
    """The broker and the result backend of a run."""

    name: str
    broker: str
    backend: str

    @property
    def settings(self) -> dict[str, str]:
        """The environment variables that configure a process for this store."""
        return {"AIOTASKQ_BROKER_URL": self.broker, "AIOTASKQ_RESULT_BACKEND": self.backend}

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that uses this store and has no other settings."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith("AIOTASKQ_")}
        return {**kept, **self.settings}

    def ask(self, module: str, *arguments: str) -> dict[str, float]:
        """Run a module of the benchmarks as a process on this store; return its JSON."""
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        told: dict[str, float] = json.loads(done.stdout)
        return told

    def app(self) -> TaskQueue:
        """Return a producer that knows the tasks by name."""
        return TaskQueue("benchmarks", broker=self.broker, backend=self.backend)

    def fill(self, call: Call[Any], count: int) -> None:
        """Store a call many times, and open the result backend."""
        run(self._fill(call, count))

    async def _fill(self, call: Call[Any], count: int) -> None:
        async with self.app() as app:
            await app.backend()
            for start in range(0, count, BATCH):
                await app.kiq_many([call] * min(BATCH, count - start))


class Bench:
    """One session of benchmarks: the number of tasks and runs, and the servers.

    A server starts when it is first needed, and ends with the session.

    Args:
        folder: The folder for SQLite files and logs.
        quick: Few tasks and one run, to see whether the benchmarks work.
        runs: The number of runs for each figure; None: the default of the benchmark.
        tasks: The number of tasks of the soak; None: the default.
    """

    def __init__(
        self,
        folder: Path,
        *,
        quick: bool = False,
        runs: int | None = None,
        tasks: int | None = None,
    ) -> None:
        self.folder = folder
        self.quick = quick
        self.tasks = tasks
        self._runs = runs
        self._numbers = itertools.count(1)
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.close()

    # How much

    def size(self, full: T, quick: T) -> T:
        """Return a number: the first one, or the second one in a quick session."""
        return quick if self.quick else full

    def runs(self, usual: int) -> int:
        """Return the number of runs for a figure."""
        return self._runs or self.size(usual, 1)

    # On what

    @cached_property
    def _watchdog(self) -> Watchdog:
        watchdog = Watchdog()
        self._closing.callback(watchdog.close)
        return watchdog

    @cached_property
    def redis_server(self) -> RedisServer:
        """A Redis server that stores nothing on disk."""
        server = RedisServer(self._watchdog, durable=False)
        self._closing.callback(server.close)
        server.start()
        return server

    @cached_property
    def postgres_server(self) -> PostgresServer:
        """A PostgreSQL server."""
        server = PostgresServer(self._watchdog)
        self._closing.callback(server.close)
        server.start()
        return server

    @cached_property
    def redis_client(self) -> redis.Redis:
        """A client of database 1 of the Redis server, which has the results."""
        client = redis.Redis.from_url(self.redis_server.url(1))
        self._closing.callback(client.close)
        return client

    def redis_info(self, section: str) -> Mapping[str, Any]:
        """Return a section of `INFO` of the Redis server."""
        told: Mapping[str, Any] = self.redis_client.info(section)
        return told

    def count_results(self) -> int:
        """Return the number of results in the store that `redis` returns."""
        return int(self.redis_client.dbsize())

    def redis(self, database: int = 0) -> Store:
        """Return an empty store in Redis: tasks in this database, results in the next one."""
        for each in (database, database + 1):
            self.redis_server.flush(each)
        url = self.redis_server.url
        return Store("Redis", url(database), url(database + 1))

    def mixed(self) -> Store:
        """Return an empty store: tasks in Redis, results in PostgreSQL."""
        broker = self.redis(4).broker
        self.postgres_server.sql("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        return Store("Redis, results in PostgreSQL", broker, self.postgres_server.url())

    def postgres(self) -> Store:
        """Return an empty store: tasks and results in one PostgreSQL database."""
        self.postgres_server.sql("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        url = self.postgres_server.url()
        return Store("PostgreSQL", url, url)

    def sqlite(self) -> Store:
        """Return an empty store in an SQLite file."""
        url = f"sqlite:///{self.folder}/queue-{next(self._numbers)}.db"
        return Store("SQLite", url, url)

    def versions(self) -> dict[str, str]:
        """Return the versions of libraries and servers, by name."""
        found = {name: version(name) for name in ("msgspec", "uvloop", "redis", "asyncpg")}
        found["SQLite"] = sqlite3.sqlite_version
        if "redis_server" in self.__dict__:
            found["redis-server"] = str(self.redis_info("server")["redis_version"])
        if "postgres_server" in self.__dict__:
            (found["PostgreSQL"],) = self.postgres_server.sql("SHOW server_version")
        return found

    # By whom

    @contextmanager
    def worker(
        self, store: Store, *options: str, processes: int = 1, ready: bool = True, **more: str
    ) -> Iterator[Program]:
        """Run `aiotaskq worker`, as a user would, until the block ends.

        Args:
            store: The store that it uses.
            options: More options of the command line.
            processes: The number of its processes.
            ready: Whether to wait until all of them take tasks.
            more: More environment variables.
        """
        command = ("aiotaskq", "worker", APP, "-l", "warning", "-w", str(processes), *options)
        program = Program(
            f"worker-{next(self._numbers)}",
            command,
            folder=self.folder,
            more={**store.settings, **more},
        )
        self._watchdog.add(program.pid)
        try:
            if ready:
                run(_wait_for_workers(store, program, processes))
            yield program
            program.family()  # what it has started is known then, if it leaves anything behind
            program.signal(signal.SIGTERM)
            run(program.wait())
        finally:
            program.close()
            self._watchdog.discard(program.pid)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the same event loop as workers use."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def _wait_for_workers(store: Store, program: Program, processes: int) -> None:
    async with store.app() as app:
        await wait_until(
            lambda: _has_workers(app, program, processes), f"{processes} worker processes"
        )


async def _has_workers(app: TaskQueue, program: Program, processes: int) -> bool:
    if not program.running:
        raise RuntimeError(f"the worker ended:\n{program.output[-2000:]}")
    return len(await app.workers()) >= processes


async def wait_until(
    condition: Callable[[], Awaitable[bool]], what: str, *, every: float = 0.02
) -> None:
    """Wait until a condition is true.

    Raises:
        TimeoutError: It is not true within a minute.
    """
    end = time.monotonic() + _PATIENCE
    while not await condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {_PATIENCE:g} s for {what}")
        await asyncio.sleep(every)


def cpu_seconds(*pids: int) -> float:
    """Return the CPU time that these running processes have used, in user code and in the kernel.

    On Linux it is read from the kernel's clock of each process: psutil has a resolution of 10 ms.
    """
    if sys.platform == "linux":
        return sum(time.clock_gettime(~pid << 3 | _SCHEDULED) for pid in pids)
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


_SCHEDULED = 2  # CPUCLOCK_SCHED: clock_getcpuclockid(3) makes such a number of a pid


def resident(*pids: int) -> int:
    """Return the resident memory of these processes, in bytes; shared pages count for each."""
    return sum(int(psutil.Process(pid).memory_info().rss) for pid in pids)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that this percentage of the values does not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
