"""Procrastinate on PostgreSQL.

Settings: one worker process with 100 jobs at once and 20 connections, uvloop on both sides (by
policy), `batch_defer_async` to fill the queue. It stores no results: the row of a job stays, with
its status. Plain functions run in threads.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from procrastinate import App, PsycopgConnector

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

app = App(connector=PsycopgConnector(conninfo=protocol.postgres_url(), min_size=4, max_size=20))
TASKS = {name: app.task(run, name=name) for name, run in workloads.FUNCTIONS.items()}


class Producer:
    """Sends with `defer_async`."""

    async def send(self, workload: str, value: Value) -> Any:
        return await TASKS[workload].defer_async(value=value)

    async def send_many(self, workload: str, values: list[Value]) -> None:
        await TASKS[workload].batch_defer_async(*({"value": value} for value in values))

    async def result(self, sent: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    async with app.open_async():
        yield Producer()


def prepare() -> None:
    async def install() -> None:
        async with connect():
            await app.schema_manager.apply_schema_async()

    asyncio.run(install())


def worker() -> None:
    protocol.become(
        *("procrastinate", "--app", "benchmarks.rivals.procrastinate.bench.app"),
        *("--log-level", "warning", "worker", "--concurrency", "100"),
    )


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # its command line makes the loop

if __name__ == "__main__":
    protocol.main(connect, worker, prepare=prepare, loop=uvloop.new_event_loop)
