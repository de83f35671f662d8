"""PgQueuer on PostgreSQL.

Settings: one worker process, 100 jobs fetched at a time (10 by default), uvloop and asyncpg; jobs
are stored as arrays. The number of jobs at once is not limited, which is the default and saves a
count. The exception is the workload `sleep`, which would only measure this: there it is 100, as for
the others, and 50 are fetched at a time. It stores no results. It does not run plain functions:
they run in threads here (`asyncio.to_thread`). The worker is started with `run` and not with `pgq
run`, which does not start with the version of typer that it installs.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from inspect import iscoroutinefunction
from typing import Any

import asyncpg
import pgqueuer
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.queries import Queries

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value


def _with_job(run: Callable[..., Any]) -> Callable[..., Any]:
    """Take the job that PgQueuer gives to each function: its argument is JSON in bytes."""

    async def in_loop(job: Any) -> None:
        await run(json.loads(job.payload))

    async def in_thread(job: Any) -> None:
        await asyncio.to_thread(run, json.loads(job.payload))

    return in_loop if iscoroutinefunction(run) else in_thread


@asynccontextmanager
async def queue() -> AsyncIterator[PgQueuer]:
    connection = await asyncpg.connect(protocol.postgres_url())
    try:
        made = PgQueuer.from_asyncpg_connection(connection)
        for name, run in workloads.FUNCTIONS.items():
            made.entrypoint(name)(_with_job(run))
        yield made
    finally:
        await connection.close()


class Producer:
    """Sends with `enqueue`."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def send(self, workload: str, value: Value) -> Any:
        return await self.queries.enqueue(workload, json.dumps(value).encode())

    async def send_many(self, workload: str, values: list[Value]) -> None:
        bodies = [json.dumps(value).encode() for value in values]
        await self.queries.enqueue([workload] * len(bodies), bodies, [0] * len(bodies))

    async def result(self, sent: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    async with asyncpg.create_pool(protocol.postgres_url(), max_size=20) as pool:
        yield Producer(Queries(AsyncpgPoolDriver(pool)))


def prepare() -> None:
    async def install() -> None:
        async with connect() as producer:
            await producer.queries.install()

    asyncio.run(install())


def worker() -> None:
    if protocol.workload_of_worker() == "sleep":
        uvloop.run(pgqueuer.run(queue, batch_size=50, max_concurrent_tasks=100))
    else:
        uvloop.run(pgqueuer.run(queue, batch_size=100))


if __name__ == "__main__":
    protocol.main(connect, worker, prepare=prepare, loop=uvloop.new_event_loop)
