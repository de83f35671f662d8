"""Tasks and results in Redis, in two databases of one server."""

import os

from aiotaskq import TaskQueue

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379")

app = TaskQueue("tasks", broker=f"{REDIS}/0", backend=f"{REDIS}/1")


@app.task
async def add(x: int, y: int) -> int:
    return x + y
