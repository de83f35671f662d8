"""Tasks that ask for another attempt in a process of the pool, which imports them from here."""

from __future__ import annotations

from typing import Any

from aiotaskq import Reject, RetryLater, Snooze, Task, TaskQueue, current_task

app = TaskQueue("retry_tasks", broker="memory://")


@app.task(bind=True, executor="process", max_retries=1)
def twice(self: Task[..., Any], x: int) -> list[object]:
    """Fail once; return facts of the second run."""
    request = self.request
    if request.retries == 0:
        try:
            raise ValueError(f"not with {x}")
        except ValueError as error:
            raise self.retry(exc=error, countdown=0) from None
    assert request.args is not None
    return [request.id, request.retries, request.hostname, *request.args]


def ask(self: Task[..., Any], how: str) -> int:
    """Ask for another attempt in the first run, without raising the request."""
    if self.request.retries == 0:
        if how == "hidden":
            try:
                self.retry(countdown=0)
            except RetryLater:
                return -1
        self.retry(countdown=0, throw=False)
        if how == "followed by an error":
            raise ValueError("after it")
        return -1
    return self.request.retries + 1


@app.task(bind=True, executor="process")
def asks(self: Task[..., Any], how: str) -> int:
    """Ask as `ask` does."""
    return ask(self, how)


@app.task(bind=True, executor="process", max_retries=1)
def never(self: Task[..., Any]) -> None:
    """Fail at each attempt."""
    raise self.retry(exc=KeyError("gone"), countdown=0)


@app.task(executor="process")
def later() -> int:
    """Ask for another attempt with `RetryLater`."""
    if current_task().attempt < 3:
        raise RetryLater(0, "not yet")
    return current_task().attempt


@app.task(executor="process")
def reject() -> None:
    """Ask for no further attempt, with `Reject`."""
    raise Reject("no such customer")


@app.task(executor="process")
def snooze(marker: str) -> int:
    """Ask to run later until the file exists."""
    from pathlib import Path

    if not Path(marker).exists():
        Path(marker).touch()
        raise Snooze(0)
    return current_task().attempt
