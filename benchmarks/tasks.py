"""The application that the benchmarks measure; the environment sets its broker and backend."""

from __future__ import annotations

import asyncio
import time

from aiotaskq import TaskQueue

app = TaskQueue("benchmarks")


@app.task
async def noop(x: int) -> int:
    return x


@app.task
async def tell_time() -> float:
    """Return the Unix time at which the task started."""
    return time.time()


@app.task
def noop_in_thread(x: int) -> int:
    return x


@app.task
async def spin(rounds: int) -> None:
    """Do a fixed amount of work in Python."""
    for _ in range(rounds):
        pass


class Sleepers:
    """The sleeping tasks of this process.

    Attributes:
        started: The number of tasks that have begun to sleep.
        woken_at: The times at which tasks woke, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.started = 0
        self.woken_at: list[float] = []

    @property
    def asleep(self) -> int:
        return self.started - len(self.woken_at)


sleepers = Sleepers()


@app.task
async def sleep(seconds: float) -> None:
    sleepers.started += 1
    await asyncio.sleep(seconds)
    sleepers.woken_at.append(time.perf_counter())
