"""arq.

Settings: one worker process with 100 jobs at once, uvloop on both sides (by policy), the hiredis
parser. It polls: a worker reads the queue, starts as many jobs as it has room for, and sleeps for
`poll_delay`. The default of half a second would limit it to 200 jobs per second; here it is 5 ms,
and 1 ms for callers that wait for a result. It does not run plain functions: they run in an
executor, as its documentation suggests. It has no call that stores many jobs at once.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from inspect import iscoroutinefunction
from typing import Any

import uvloop
from arq import create_pool, func
from arq.connections import RedisSettings

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

_THREADS = ThreadPoolExecutor()


def _with_context(run: Callable[..., Any]) -> Callable[..., Any]:
    """Accept the context that arq passes to each function."""

    async def in_loop(_context: object, value: Value) -> Any:
        return await run(value)

    async def in_thread(_context: object, value: Value) -> Any:
        return await asyncio.get_running_loop().run_in_executor(_THREADS, run, value)

    return in_loop if iscoroutinefunction(run) else in_thread


class WorkerSettings:
    """The settings for its command line."""

    redis_settings = RedisSettings.from_dsn(protocol.redis_url())
    functions = [  # noqa: RUF012 - arq reads it so
        func(_with_context(run), name=name) for name, run in workloads.FUNCTIONS.items()
    ]
    max_jobs = 100
    poll_delay = 0.005
    log_results = False


LOGGING = {"version": 1, "disable_existing_loggers": False, "root": {"level": "WARNING"}}


class Producer:
    """Sends with `enqueue_job`."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    async def send(self, workload: str, value: Value) -> Any:
        return await self.pool.enqueue_job(workload, value)

    async def send_many(self, workload: str, values: list[Value]) -> None:
        raise NotImplementedError

    async def result(self, sent: Any) -> Any:
        return await sent.result(timeout=30, poll_delay=0.001)


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    pool = await create_pool(WorkerSettings.redis_settings)
    try:
        yield Producer(pool)
    finally:
        await pool.aclose()


def worker() -> None:
    protocol.become(
        *("arq", "benchmarks.rivals.arq.bench.WorkerSettings"),
        *("--custom-log-dict", "benchmarks.rivals.arq.bench.LOGGING"),
    )


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # its command line makes the loop

if __name__ == "__main__":
    protocol.main(connect, worker, loop=uvloop.new_event_loop)
