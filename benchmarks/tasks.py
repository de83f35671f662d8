"""The application that is measured. Its broker and backend come from the environment."""

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
    """Return the Unix time at which it started."""
    return time.time()


@app.task
def noop_in_thread(x: int) -> int:
    return x


@app.task
async def spin(rounds: int) -> None:
    """Do some work in Python, the same however busy the machine is."""
    for _ in range(rounds):
        pass


class Sleepers:
    """What is known in this process of those that sleep.

    Attributes:
        started: How many have fallen asleep ever.
        woken_at: When each woke, by `time.perf_counter`.
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
