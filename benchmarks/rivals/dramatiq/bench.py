"""dramatiq with Redis as broker and result backend.

Settings: one process with 8 threads (its default), and 100 threads for the workload `sleep`. Its
coroutines use a thread each as well, so plain functions are the fastest. Sending is synchronous, so
concurrent callers are threads. It has no call that stores many tasks at once. Callers that wait for
a result block in Redis.
"""

# Its library is only in its own virtual environment, where no type checker looks.
# mypy: disable-error-code="import-not-found, untyped-decorator, no-any-return"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.rivals import protocol, workloads
from benchmarks.rivals.workloads import Value

_SERVER = protocol.redis_url()

broker = RedisBroker(url=f"{_SERVER}/0")
broker.add_middleware(Results(backend=RedisBackend(url=f"{_SERVER}/1"), store_results=True))
dramatiq.set_broker(broker)
ACTORS = {
    name: dramatiq.actor(run, actor_name=name) for name, run in workloads.PLAIN_FUNCTIONS.items()
}


class Producer:
    """Sends with `send`."""

    def send(self, workload: str, value: Value) -> Any:
        return ACTORS[workload].send(value)

    def result(self, sent: Any) -> Any:
        return sent.get_result(block=True, timeout=30_000)


def worker() -> None:
    threads = "100" if protocol.workload_of_worker() == "sleep" else "8"
    protocol.become(
        *("dramatiq", "benchmarks.rivals.dramatiq.bench:broker"),
        *("--processes", "1", "--threads", threads),
    )


if __name__ == "__main__":
    protocol.plain_main(Producer(), worker)
