"""Drain the queue in a process of its own, and print how long it took as JSON.

``python -m benchmarks.drain [TASKS]``, with the broker in the environment. It ends when the queue
is empty, or when so many tasks were taken.
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
    """Return the most memory that this process has occupied, in KiB."""
    # What getrusage says includes the process that started this one, before its program was
    # replaced by this one.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        if found is not None:
            return float(found[1])
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / 1024 if sys.platform == "darwin" else peak


def tell(work: Coroutine[Any, Any, dict[str, float]]) -> None:
    """Do it as a worker does, on its event loop, and print what comes of it as JSON."""
    set_up_logging()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(runner.run(work), sys.stdout)


def set_up_logging() -> None:
    """Log warnings, but for those about the server: it is meant to keep nothing on disk."""
    logging.getLogger("aiotaskq").setLevel(logging.WARNING)
    logging.getLogger("aiotaskq.redis").setLevel(logging.ERROR)


if __name__ == "__main__":
    tell(drain(int(sys.argv[1]) if len(sys.argv) > 1 else None))
