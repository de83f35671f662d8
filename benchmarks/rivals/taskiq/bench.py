"""taskiq with taskiq-redis, and with taskiq-aio-pika.

Settings: one worker process with 100 tasks at once and 100 prefetched, a connection for each of
them (50 by default), arguments not parsed with pydantic (`--no-parse`), uvloop (its worker uses it
if it is installed), messages encoded with orjson instead of json, pickled results (its default).
The producer uses uvloop, too, and looks for a result every millisecond: results are not pushed, and
this is the lowest latency that it can have. `BENCH_BROKER` chooses the broker: streams, which
acknowledge after a run; lists, which delete a task when it is delivered; or RabbitMQ, with quorum
queues (its default) and 100 prefetched messages (10 by default). It has no call that sends many
tasks.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from taskiq import AsyncBroker
from taskiq.serializers import ORJSONSerializer
from taskiq_aio_pika import AioPikaBroker
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

_SERVER = protocol.redis_url()


def _broker() -> AsyncBroker:
    match os.environ["BENCH_BROKER"]:
        case "rabbitmq":
            return AioPikaBroker(protocol.rabbitmq_url(), qos=100)
        case "list":
            return ListQueueBroker(f"{_SERVER}/0", max_connection_pool_size=200)
        case _:
            return RedisStreamBroker(f"{_SERVER}/0", max_connection_pool_size=200)


broker = (
    _broker()
    .with_result_backend(RedisAsyncResultBackend(f"{_SERVER}/1", max_connection_pool_size=200))
    .with_serializer(ORJSONSerializer())
)
TASKS = {
    name: broker.register_task(run, task_name=name) for name, run in workloads.FUNCTIONS.items()
}


class Producer:
    """Sends with `kiq`."""

    async def send(self, workload: str, value: Value) -> Any:
        return await TASKS[workload].kiq(value)

    async def send_many(self, workload: str, values: list[Value]) -> None:
        raise NotImplementedError

    async def result(self, sent: Any) -> Any:
        return (await sent.wait_result(check_interval=0.001, timeout=30)).return_value


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    await broker.startup()
    try:
        yield Producer()
    finally:
        await broker.shutdown()


def worker() -> None:
    protocol.become(
        *("taskiq", "worker", "benchmarks.rivals.taskiq.bench:broker"),
        *("--workers", "1", "--max-async-tasks", "100", "--max-prefetch", "100"),
        *("--log-level", "WARNING", "--no-parse"),
    )


if __name__ == "__main__":
    protocol.main(connect, worker, loop=uvloop.new_event_loop)
