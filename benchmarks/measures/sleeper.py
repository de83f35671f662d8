"""Run a queue of sleeping tasks in a separate process, and print the measurements as JSON.

``python -m benchmarks.measures.sleeper SLOTS SECONDS``, with the broker in the environment, and a
queue of tasks that sleep for SECONDS. See `benchmarks.measures.asleep`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiotaskq.cli.worker_process import GC_THRESHOLD
from aiotaskq.events import WorkerReady
from benchmarks.drain import tell
from benchmarks.measures.bench import resident
from benchmarks.tasks import app, sleepers

_LOOK = 0.01  # seconds
_EARLY = 10  # turns at the beginning


@dataclass
class Peak:
    """The largest number of sleeping tasks, and the memory of the process then, in bytes."""

    asleep: int = 0
    memory: int = 0


async def work(slots: int, seconds: float) -> dict[str, float]:
    ready: list[tuple[float, int]] = []
    app.observers.add(
        WorkerReady, lambda _: ready.append((time.perf_counter(), resident(os.getpid())))
    )
    peak = Peak()
    watching = asyncio.create_task(_watch(peak, slots))
    await app.worker(concurrency=slots, burst=True).run()
    watching.cancel()
    since, memory = ready[0]
    woken = sleepers.woken_at
    return {
        "steady_share": steady_share(woken, slots, seconds),
        "early_share": steady_share(woken[: _EARLY * slots], slots, seconds),
        "whole_share": len(woken) * seconds / slots / (woken[-1] - since),
        "bytes_each": (peak.memory - memory) / peak.asleep,
        "most_asleep": peak.asleep,
    }


async def _watch(peak: Peak, slots: int) -> None:
    while peak.asleep < slots:
        if sleepers.asleep > peak.asleep:
            peak.asleep, peak.memory = sleepers.asleep, resident(os.getpid())
        await asyncio.sleep(_LOOK)


def steady_share(woken: Sequence[float], slots: int, seconds: float) -> float:
    """Return the rate of tasks as a share of the ideal, after each slot has had one task.

    It is at most 1: of `slots` tasks that wake one after another, at least one began to sleep after
    the first of them had woken.

    Args:
        woken: The times at which tasks woke, in order; at least twice the number of slots.
        slots: The number of tasks that may sleep at once.
        seconds: The time for which each task sleeps.
    """
    taken = woken[-1] - woken[slots - 1]
    return (len(woken) - slots) * seconds / slots / taken


if __name__ == "__main__":
    gc.set_threshold(GC_THRESHOLD)  # as `aiotaskq worker` has it
    gc.freeze()
    tell(work(slots=int(sys.argv[1]), seconds=float(sys.argv[2])))
