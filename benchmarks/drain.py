"""Drain the queue in a process of its own, and print how long it took as JSON.

``python -m benchmarks.drain``, with the broker in the environment.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
import time

import uvloop

from benchmarks.tasks import app


async def drain() -> dict[str, float]:
    worker = app.worker(burst=True)
    cpu, wall = time.process_time(), time.perf_counter()
    await worker.run()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "memory_kib": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
    }


if __name__ == "__main__":
    logging.getLogger("aiotaskq").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(runner.run(drain()), sys.stdout)
