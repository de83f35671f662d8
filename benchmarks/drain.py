"""Empty a queue in a separate process, and print the duration and the cost as JSON.

``python -m benchmarks.drain [TASKS]``, with the broker in the environment. It ends when the queue
is empty, or when TASKS tasks were taken.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop

from aiotaskq.worker import Worker
from benchmarks.tasks import app


async def drain(most: int | None) -> dict[str, float]:
    worker = Worker(app, burst=True, max_tasks=most)
    cpu, wall = time.process_time(), time.perf_counter()
    await worker.run()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "memory_kib": peak_memory(),
    }


def peak_memory() -> float:
    """Return the peak memory of this process, in KiB."""
    # getrusage also counts the memory of the parent process, before this program replaced it.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        if found is not None:
            return float(found[1])
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / 1024 if sys.platform == "darwin" else peak


def tell(work: Coroutine[Any, Any, dict[str, float]]) -> None:
    """Run a coroutine on the event loop of workers, and print its result as JSON."""
    set_up_logging()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(runner.run(work), sys.stdout)


def set_up_logging() -> None:
    """Log warnings, except those about the Redis server: it stores nothing on disk on purpose."""
    logging.getLogger("aiotaskq").setLevel(logging.WARNING)
    logging.getLogger("aiotaskq.redis").setLevel(logging.ERROR)


if __name__ == "__main__":
    tell(drain(int(sys.argv[1]) if len(sys.argv) > 1 else None))
