"""Celery with Redis as broker and result backend, or with RabbitMQ as the broker.

Settings: `BENCH_PROCESSES` prefork processes; tasks acknowledged after they ran (`acks_late`), so
that it has the same guarantee as the others; 128 tasks prefetched by each process (its
documentation: 64 or 128 for short tasks); results in JSON; no gossip, mingle and remote control.
The workload `sleep` runs in its thread pool with 100 threads. Sending is synchronous, so concurrent
callers are threads. It has no call that stores many tasks at once.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

_SERVER = protocol.redis_url()
_BROKER = f"{_SERVER}/0" if os.environ["BENCH_BROKER"] == "redis" else protocol.rabbitmq_url()

app = Celery("rivals", broker=_BROKER, backend=f"{_SERVER}/1")
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=128,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    broker_pool_limit=protocol.CALLERS,
)
TASKS = {name: app.task(run, name=name) for name, run in workloads.PLAIN_FUNCTIONS.items()}


class Producer:
    """Sends with `delay`."""

    def send(self, workload: str, value: Value) -> Any:
        return TASKS[workload].delay(value)

    def result(self, sent: Any) -> Any:
        return sent.get(timeout=30)


def worker() -> None:
    pool = ("prefork", os.environ["BENCH_PROCESSES"])
    if protocol.workload_of_worker() == "sleep":
        pool = ("threads", "100")
    protocol.become(
        *("celery", "-A", "benchmarks.rivals.celery.bench:app", "worker"),
        *("--loglevel", "WARNING", "--pool", pool[0], "--concurrency", pool[1]),
        *("--without-gossip", "--without-mingle"),
    )


if __name__ == "__main__":
    protocol.plain_main(Producer(), worker)
