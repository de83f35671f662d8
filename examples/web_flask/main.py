"""Flask sends tasks; a worker process runs them."""

from typing import Any

from flask import Flask, request

from aiotaskq import TaskQueue

app = TaskQueue("web")
web = Flask(__name__)


@app.task
def add(x: int, y: int) -> int:
    return x + y


@web.get("/test_send_task/")
def send_task() -> dict[str, str]:
    result = add.delay(int(request.args["x"]), int(request.args["y"]))
    return {"id": result.id}


@web.get("/test_task_result/<task_id>/")
def task_result(task_id: str) -> dict[str, Any]:
    task = app.AsyncResult(task_id)
    result = task.result  # None until the task ends; the exception if it failed
    return {"status": task.status, "result": str(result) if task.failed() else result}
