"""aiotaskq, measured as its rivals are.

Settings: `kiq_many` to fill, the worker's own command line with its defaults (100 tasks at once,
one process). `BENCH_BROKER` chooses between Redis, tasks in one database and results in another,
and PostgreSQL, both in the same one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from aiotaskq import TaskHandle, TaskQueue
from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

if os.environ["BENCH_BROKER"] == "postgres":
    app = TaskQueue("rivals", broker=protocol.postgres_url())
else:
    app = TaskQueue(
        "rivals", broker=f"{protocol.redis_url()}/0", backend=f"{protocol.redis_url()}/1"
    )
TASKS = {name: app.task(name=name)(run) for name, run in workloads.FUNCTIONS.items()}


class Producer:
    """Sends with `kiq`."""

    async def send(self, workload: str, value: Value) -> TaskHandle[Any]:
        return await TASKS[workload].kiq(value)

    async def send_many(self, workload: str, values: list[Value]) -> None:
        await app.kiq_many([TASKS[workload].s(value) for value in values])

    async def result(self, sent: TaskHandle[Any]) -> Any:
        return await sent.result(timeout=30)


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    async with app:
        yield Producer()


def prepare() -> None:
    """Make the tables, so that they can be counted in."""

    async def open_all() -> None:
        async with app:
            await app.broker()
            await app.backend()

    asyncio.run(open_all())


def worker() -> None:
    protocol.become("aiotaskq", "worker", "benchmarks.rivals.aiotaskq.bench:app", "-l", "warning")


if __name__ == "__main__":
    protocol.main(connect, worker, prepare=prepare, loop=uvloop.new_event_loop)
