"""Tasks that run in processes of the pool, which import them from here."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from aiotaskq import Retry, SoftTimeLimitExceeded, TaskQueue, current_task

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


@app.task(executor="process")
def spread(numbers: list[int]) -> list[int]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        spawned: list[int] = list(pool.map(abs, numbers))
    with multiprocessing.get_context("fork").Pool(2) as forked:
        again: list[int] = forked.map(abs, numbers)
    return spawned + again


@app.task(executor="process")
def interrupt() -> int:
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        program.stdout.readline()
        program.send_signal(signal.SIGINT)
        return program.wait()


@app.task(executor="process")
def blocked() -> list[int]:
    return [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]


language: ContextVar[str] = ContextVar("language", default="en")


@app.task(executor="process")
def speak(other: str) -> str:
    before = language.get()
    language.set(other)
    return before


@app.task
def speak_in_thread(other: str) -> str:
    before = language.get()
    language.set(other)
    return before


@app.task
async def speak_in_loop(other: str) -> str:
    before = language.get()
    language.set(other)
    return before


@app.task(executor="process")
def fork_and_exit(status: int) -> int:
    child = os.fork()
    if child == 0:
        sys.exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
