"""streaQ.

Settings: one worker process with 100 tasks at once and 100 prefetched (its default), uvloop on both
sides, pickled results (its default), silent tasks, because its command line logs each task at level
INFO. `enqueue_many` fills the queue. Results are pushed to waiting callers.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from streaq import Worker

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

queue = Worker(redis_url=protocol.redis_url(), concurrency=100, anyio_kwargs={"use_uvloop": True})
TASKS = {name: queue.task(name=name, silent=True)(run) for name, run in workloads.FUNCTIONS.items()}


class Producer:
    """Sends by awaiting the object that `enqueue` returns."""

    async def send(self, workload: str, value: Value) -> Any:
        return await TASKS[workload].enqueue(value)

    async def send_many(self, workload: str, values: list[Value]) -> None:
        await queue.enqueue_many([TASKS[workload].enqueue(value) for value in values])

    async def result(self, sent: Any) -> Any:
        return (await sent.result(30)).result


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    async with queue:
        yield Producer()


def worker() -> None:
    protocol.become("streaq", "run", "benchmarks.rivals.streaq.bench:queue")


if __name__ == "__main__":
    protocol.main(connect, worker, loop=uvloop.new_event_loop)
