"""Tasks that run in processes of the pool, which import them from here."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from aiotaskq import Retry, SoftTimeLimitExceeded, TaskQueue, current_task

app = TaskQueue("process_tasks", broker="memory://")


@app.task(executor="process")
def whoami() -> int:
    return os.getpid()


@app.task(executor="process")
def double(data: str) -> str:
    return data + data


@app.task(executor="process")
def about_me(x: int, *, y: list[int]) -> list[object]:
    context = current_task()
    return [context.id, context.attempt, list(context.args), context.kwargs, context.worker]


@app.task(executor="process")
def die(how: int) -> None:
    os.kill(os.getpid(), how)


@app.task(executor="process")
def leave(status: int) -> None:
    os._exit(status)


@app.task(executor="process")
def exit_politely() -> None:
    sys.exit(3)


@app.task(executor="process")
def fail(text: str) -> None:
    raise ValueError(text)


@app.task(executor="process")
def odd() -> object:
    return object()


@app.task(executor="process")
def sleep(seconds: float, started: str) -> int:
    Path(started).write_text(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


@app.task(executor="process", retry=Retry(max_attempts=2, delay=0))
def die_once(marker: str) -> int:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return current_task().attempt


@app.task(executor="process")
def told_or(seconds: float) -> str:
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded as told:
        return str(told)
    return "in time"


@app.task
def anywhere() -> int:
    return os.getpid()


def _unbound() -> int:
    return 1


unbound = app.task(executor="process", name="unbound")(_unbound)
