"""Tasks in Redis, results in a table of PostgreSQL, which aiotaskq creates."""

import os

from aiotaskq import TaskQueue

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379")
POSTGRES = os.environ.get(
    "POSTGRES_URL", "db+postgresql+psycopg2://postgres:postgres@localhost:5432/postgres"
)

app = TaskQueue("tasks", broker=f"{REDIS}/0", backend=POSTGRES)


@app.task
async def add(x: int, y: int) -> int:
    return x + y
