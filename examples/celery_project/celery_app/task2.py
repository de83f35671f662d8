"""A coroutine function: the worker runs it on its event loop."""

from celery_app import app


@app.task
async def multiply(x: int, y: int) -> int:
    return x * y
