"""aiotaskq, measured in the same way as the other libraries.

Settings: `kiq_many` fills the queue; the worker is `aiotaskq worker` with its defaults (100 tasks
at once, one process). `BENCH_BROKER` chooses the broker: Redis, with tasks and results in two
databases; PostgreSQL, with both in one database; or RabbitMQ, with results in Redis or over
RabbitMQ (`rpc`).
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

_BROKER = os.environ["BENCH_BROKER"]


def _servers() -> tuple[str, str | None]:
    """Return the broker's URL and the backend's."""
    match _BROKER:
        case "postgres":
            return protocol.postgres_url(), None
        case "rabbitmq":
            return protocol.rabbitmq_url(), f"{protocol.redis_url()}/1"
        case "rpc":
            return protocol.rabbitmq_url(), "rpc://"
        case _:
            return f"{protocol.redis_url()}/0", f"{protocol.redis_url()}/1"


_broker, _backend = _servers()
app = TaskQueue("rivals", broker=_broker, backend=_backend)
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
    """Create the tables, because the benchmark counts their rows."""

    async def open_all() -> None:
        async with app:
            await app.broker()
            await app.backend()

    asyncio.run(open_all())


def worker() -> None:
    protocol.become("aiotaskq", "worker", "benchmarks.rivals.aiotaskq.bench:app", "-l", "warning")


if __name__ == "__main__":
    # A sender that closes properly deletes the queue of its results.
    abrupt = _BROKER == "rpc"
    protocol.main(connect, worker, prepare=prepare, loop=uvloop.new_event_loop, abrupt=abrupt)
