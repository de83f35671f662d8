"""`application` with a task that has large results."""

from __future__ import annotations

from tests.faults.application import app, run

__all__ = ["app"]


@app.task
async def bulky(key: str, size: int) -> str:
    """Return that many letters."""
    with run(key):
        return "x" * size
