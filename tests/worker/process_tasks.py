"""Tasks that run in processes of the pool, which import them from here."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from aiotaskq import Retry, TaskQueue, current_task

P = ParamSpec("P")
R = TypeVar("R")

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


def _unbound() -> int:
    return 1


unbound = app.task(executor="process", name="unbound")(_unbound)


def plainly(fn: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return fn(*args, **kwargs)

    return call


@app.task(executor="process")
@plainly
async def wrapped(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


@app.task(executor="process", retry=Retry(max_attempts=3, delay=0.01))
def odd_again(runs: str) -> object:
    with Path(runs).open("a") as file:
        file.write("x")
    return object()


@app.task(executor="process", ignore_result=True)
def odd_ignored() -> object:
    return object()
