"""Events of tasks and workers, and their observers: for logs, metrics and tests.

An observer is a function that is called with an event. It cannot change what happens. If it raises,
the exception is logged and otherwise ignored. An event without observers is not even created.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import msgspec

from aiotaskq.contract.message import Message
from aiotaskq.errors import ConfigError
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.events")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events."""


class TaskEvent(Event, frozen=True, kw_only=True):
    """Base of events of a task that have its message."""

    message: Message


class Sent(TaskEvent, frozen=True, kw_only=True):
    """The broker has stored the task. Emitted in the process that sent it."""


class Received(TaskEvent, frozen=True, kw_only=True):
    """A worker took the task from its queue."""


class Started(TaskEvent, frozen=True, kw_only=True):
    """The worker is about to call the function of the task."""


class Succeeded(TaskEvent, frozen=True, kw_only=True):
    """The task returned a value."""

    value: Any
    execution_time: float  # seconds


class Failed(TaskEvent, frozen=True, kw_only=True):
    """The task failed and will not run again.

    It raised, could not be called, or its value could not be encoded.
    """

    error: BaseException  # its traceback is dropped once the observers have been called
    traceback: str  # as it is stored; a very long one is shortened
    execution_time: float  # seconds


class Retried(TaskEvent, frozen=True, kw_only=True):
    """The task failed and will run again."""

    error: BaseException  # as for `Failed`
    delay: float  # seconds


class Snoozed(TaskEvent, frozen=True, kw_only=True):
    """The task raised `Snooze` and will run again; this attempt does not count."""

    delay: float  # seconds


class Stuck(TaskEvent, frozen=True, kw_only=True):
    """The task was cancelled and did not end: its slot was freed, and its result is ignored."""


class Revoked(TaskEvent, frozen=True, kw_only=True):
    """The task was cancelled while it ran, or it had expired before it started."""


class Released(TaskEvent, frozen=True, kw_only=True):
    """The task was stopped before its end and given back, for another worker to run."""


class Buried(Event, frozen=True, kw_only=True):
    """The task went to the dead letters."""

    task_id: str
    queue: str
    reason: str


class Refused(Event, frozen=True, kw_only=True):
    """A worker's result was refused: other workers had got the task, or it had ended already."""

    task_id: str


class LoopBlocked(Event, frozen=True, kw_only=True):
    """The event loop of a worker is blocked.

    Emitted once each time it is blocked, while it is blocked, from another thread.
    """

    worker: str
    seconds: float  # so far
    task: str  # the name and id of the task that blocks it; empty if it is no task
    stack: str  # the stack of the thread of the event loop


class HealthChanged(Event, frozen=True, kw_only=True):
    """A worker became healthy, or it is not healthy any more."""

    worker: str
    problems: tuple[str, ...]  # empty if it is healthy


class WorkerReady(Event, frozen=True, kw_only=True):
    """The worker has connected and takes tasks."""

    worker: str


class WorkerStopped(Event, frozen=True, kw_only=True):
    """The worker has ended and closed its connections."""

    worker: str


E = TypeVar("E", bound=Event)
Observer: TypeAlias = Callable[[E], None]


class Observers:
    """The observers of an application, by the type of event."""

    def __init__(self) -> None:
        self._by_kind: dict[type[Event], list[Callable[[Any], None]]] = {}

    def add(self, kind: type[E], observer: Observer[E]) -> None:
        """Call `observer` with every event of exactly this type.

        Raises:
            ConfigError: It is a coroutine function: nothing would await its coroutine.
        """
        if inspect.iscoroutinefunction(observer):
            raise ConfigError(f"an observer of {kind.__name__} must be a plain function")
        # A new list each time: `emit` may be iterating over the old one.
        self._by_kind[kind] = [*self._by_kind.get(kind, ()), observer]

    def remove(self, kind: type[E], observer: Observer[E]) -> None:
        """Undo one `add`."""
        left = list(self._by_kind[kind])
        left.remove(observer)
        self._by_kind[kind] = left

    def heard(self, kind: type[Event]) -> bool:
        """Return whether this type of event has observers; check it before you create the event."""
        return bool(self._by_kind.get(kind))

    def emit(self, event: Event) -> None:
        """Call all observers of the event's type. Never raises."""
        for observer in self._by_kind.get(type(event), ()):
            try:
                observer(event)
            except Exception:
                logger.exception("an observer of %s failed", type(event).__name__)
