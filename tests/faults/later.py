"""The next release of `application`: it knows one more task."""

from __future__ import annotations

from tests.faults.application import app, run

__all__ = ["app"]


@app.task(name="tests.faults.later.novel")
async def novel(key: str) -> str:
    """Sleep: workers of the earlier release do not know this task."""
    with run(key):
        return key
