"""A database pool for tasks: opened before the first task, closed after the last one."""

import os
from collections.abc import AsyncIterator

import asyncpg

from aiotaskq import State, TaskQueue, current_task

DATABASE = os.environ.get("DATABASE_URL", "postgresql://postgres:postgres@localhost/postgres")

app = TaskQueue("lifespan")


@app.lifespan
async def database(state: State) -> AsyncIterator[None]:
    async with asyncpg.create_pool(DATABASE) as state.pool:
        yield


@app.task
async def server_version() -> str:
    version: str = await current_task().state.pool.fetchval("SHOW server_version")
    return version
