"""FastAPI sends tasks and runs them: the worker runs in the server's event loop."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from aiotaskq import TaskQueue

app = TaskQueue("web")


@app.task
async def add(x: int, y: int) -> int:
    return x + y


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with app, app.worker():  # at exit, running tasks get time to finish
        yield


api = FastAPI(lifespan=lifespan)


@api.get("/test_send_task/")
async def send_task(x: int, y: int) -> dict[str, str]:
    handle = await add.kiq(x, y)
    return {"id": handle.id}


@api.get("/test_task_result/{task_id}/")
async def task_result(task_id: str) -> dict[str, Any]:
    handle = app.handle(task_id)
    status = await handle.status()
    if not status.final:
        return {"status": status, "result": None}
    outcome = await handle.wait()
    return {
        "status": status,
        "result": str(outcome.error) if outcome.is_err else outcome.return_value,
    }
