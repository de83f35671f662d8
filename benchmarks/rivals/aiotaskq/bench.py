"""aiotaskq, measured as its rivals are.

Settings: `kiq_many` to fill, the worker's own command line with its defaults (100 tasks at once,
one process), tasks in one database of Redis and results in another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from aiotaskq import TaskHandle, TaskQueue
from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

_SERVER = protocol.redis_url()

app = TaskQueue("rivals", broker=f"{_SERVER}/0", backend=f"{_SERVER}/1")
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


def worker() -> None:
    protocol.become("aiotaskq", "worker", "benchmarks.rivals.aiotaskq.bench:app", "-l", "warning")


if __name__ == "__main__":
    protocol.main(connect, worker, loop=uvloop.new_event_loop)
