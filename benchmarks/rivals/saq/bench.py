"""SAQ on Redis.

Settings: one worker process with 100 jobs at once, uvloop on both sides (by policy: its command
line makes the loop), the hiredis parser, and 100 operations of Redis at once (`max_concurrent_ops`,
20 by default). It has no call that stores many jobs at once. Waiting callers are notified by
PUBSUB.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from inspect import iscoroutinefunction
from typing import Any

import uvloop
from saq import Queue

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value


def _with_context(run: Callable[..., Any]) -> Callable[..., Any]:
    """Accept the context that SAQ passes to each function."""

    async def in_loop(_context: object, *, value: Value) -> Any:
        result: Awaitable[Any] = run(value)
        return await result

    def in_thread(_context: object, *, value: Value) -> Any:
        return run(value)

    return in_loop if iscoroutinefunction(run) else in_thread


def _queue() -> Any:
    return Queue.from_url(protocol.redis_url(), max_concurrent_ops=100)


def settings() -> dict[str, Any]:
    """The settings for its command line."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return {
        "queue": _queue(),
        "functions": [(name, _with_context(run)) for name, run in workloads.FUNCTIONS.items()],
        "concurrency": 100,
    }


class Producer:
    """Sends with `enqueue`."""

    def __init__(self) -> None:
        self.queue = _queue()

    async def send(self, workload: str, value: Value) -> Any:
        return await self.queue.enqueue(workload, value=value)

    async def send_many(self, workload: str, values: list[Value]) -> None:
        raise NotImplementedError

    async def result(self, sent: Any) -> Any:
        await sent.refresh(until_complete=30)
        return sent.result


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    producer = Producer()
    await producer.queue.connect()
    try:
        yield producer
    finally:
        await producer.queue.disconnect()


def worker() -> None:
    protocol.become("saq", "benchmarks.rivals.saq.bench.settings", "--quiet")


if __name__ == "__main__":
    protocol.main(connect, worker, loop=uvloop.new_event_loop)
