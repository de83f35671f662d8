"""The log lines of tasks in a worker, written by observers of its events."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiotaskq import events
from aiotaskq.errors import TaskFailed
from aiotaskq.events import Observer, Observers
from aiotaskq.readable import as_traceback, get_logger

logger = get_logger("aiotaskq.task")

_SHOWN = 200  # characters of a value

_lock = threading.Lock()
_users: dict[Observers, int] = {}  # the number of running workers of each application
_chosen: dict[Observers, tuple[tuple[type[events.Event], Observer[Any]], ...]] = {}


def _received(event: events.Received) -> None:
    logger.info("Task %s received", event.message)


def _succeeded(event: events.Succeeded) -> None:
    logger.info(
        "Task %s succeeded in %.6fs: %s",
        event.message,
        event.execution_time,
        _short(event.value),
    )


def _failed(event: events.Failed) -> None:
    if not logger.isEnabledFor(logging.ERROR):
        return
    file, line, function, _ = logger.findCaller()
    error = event.error
    record = logger.makeRecord(
        logger.name,
        logging.ERROR,
        file,
        line,
        "Task %s raised after %.6fs: %s",
        (event.message, event.execution_time, _error(error)),
        # For handlers that group and show exceptions, such as those of error trackers.
        (_kind(error), error, error.__traceback__),
        function,
        {"task_name": event.message.task, "task_id": event.message.id},
    )
    # What a formatter prints for the exception: its `__str__` may raise, or be very long.
    record.exc_text = as_traceback(event.traceback)
    logger.handle(record)


def _retried(event: events.Retried) -> None:
    logger.info(
        "Task %s failed at attempt %d, next in %.1fs: %s",
        event.message,
        event.message.attempt,
        event.delay,
        _short(event.error),
    )


def _revoked(event: events.Revoked) -> None:
    logger.info("Task %s revoked", event.message)


def _released(event: events.Released) -> None:
    logger.info("Task %s handed back unfinished", event.message)


def _error(error: BaseException) -> str:
    if isinstance(
        error, TaskFailed
    ):  # from a process: the exception that was raised there says more
        return f"{error.exc_type}({_short(error.exc_message)})"
    return _short(error)


def _kind(error: BaseException) -> type[BaseException]:
    """Return the type that the task has raised, also where another process has run it."""
    if isinstance(error, TaskFailed):
        return next((kind for kind in type(error).__bases__ if kind is not TaskFailed), TaskFailed)
    return type(error)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # the __repr__ of a user's value must not fail the log
        text = f"<{type(value).__name__} whose repr fails: {type(error).__name__}>"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


_AT_INFO: tuple[tuple[type[events.Event], Observer[Any]], ...] = (
    (events.Received, _received),
    (events.Succeeded, _succeeded),
    (events.Retried, _retried),
    (events.Revoked, _revoked),
    (events.Released, _released),
)
_AT_ERROR: tuple[tuple[type[events.Event], Observer[Any]], ...] = ((events.Failed, _failed),)


@contextmanager
def logged(observers: Observers) -> Iterator[None]:
    """Log the events of tasks inside the block.

    Events whose lines the level of the logger would drop are not observed, so that they cost
    nothing. Where several workers of one application run in a process, the first one logs for all.
    """
    chosen = _AT_ERROR + (_AT_INFO if logger.isEnabledFor(logging.INFO) else ())
    with _lock:
        _users[observers] = _users.get(observers, 0) + 1
        if _users[observers] == 1:
            _chosen[observers] = chosen
            for kind, observer in chosen:
                observers.add(kind, observer)
    try:
        yield
    finally:
        with _lock:
            _users[observers] -= 1
            if not _users[observers]:
                del _users[observers]
                for kind, observer in _chosen.pop(observers):
                    observers.remove(kind, observer)
