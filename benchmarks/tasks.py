"""The application that is measured. Its broker and backend come from the environment."""

from __future__ import annotations

import time

from aiotaskq import TaskQueue

app = TaskQueue("benchmarks")


@app.task
async def noop(x: int) -> int:
    return x


@app.task
def noop_in_thread(x: int) -> int:
    return x


@app.task
async def spin(seconds: float) -> None:
    """Keep the interpreter busy, as 200 microseconds of a user's Python would."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
