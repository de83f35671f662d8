"""`application` with a task that writes a row in the transaction of its outcome."""

from __future__ import annotations

import asyncio

from aiotaskq import current_task
from tests.faults.application import app, run

__all__ = ["app"]


@app.task
async def pay(key: str, seconds: float) -> str:
    """Write the row first, so that most of the killed runs have written it."""
    with run(key):
        connection = await current_task().transaction()
        await connection.execute("INSERT INTO rows (key) VALUES ($1)", key)
        await asyncio.sleep(seconds)
        return key
