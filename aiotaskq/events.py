"""What happened, for those who only listen: logs, metrics, tests.

An observer is a function of one event. It cannot change anything, and one that raises is
logged and otherwise ignored. Where nobody listens to a kind of event, none is made.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import msgspec

from aiotaskq.contract.message import Message
from aiotaskq.errors import ConfigError

logger = logging.getLogger("aiotaskq.events")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """The base of all events."""


class TaskEvent(Event, frozen=True, kw_only=True):
    """Something that happened to a task, whose message is at hand."""

    message: Message


class Sent(TaskEvent, frozen=True, kw_only=True):
    """The broker has stored it. Heard in the process that sent it."""


class Received(TaskEvent, frozen=True, kw_only=True):
    """A worker took it from its queue."""


class Started(TaskEvent, frozen=True, kw_only=True):
    """Its function is about to be called."""


class Succeeded(TaskEvent, frozen=True, kw_only=True):
    """It returned."""

    value: Any
    execution_time: float  # seconds


class Failed(TaskEvent, frozen=True, kw_only=True):
    """It raised, could not be called, or its value could not be encoded, and will not run again."""

    error: BaseException
    traceback: str  # as it is stored: shortened where it is very long
    execution_time: float  # seconds


class Retried(TaskEvent, frozen=True, kw_only=True):
    """It raised, and will run again."""

    error: BaseException
    delay: float  # seconds


class Snoozed(TaskEvent, frozen=True, kw_only=True):
    """It asked to be put off, and will run again without this attempt being counted."""

    delay: float  # seconds


class Stuck(TaskEvent, frozen=True, kw_only=True):
    """It was cancelled and did not end: its slot was freed, and what it still does is ignored."""


class Revoked(TaskEvent, frozen=True, kw_only=True):
    """It was cancelled while it ran."""


class Released(TaskEvent, frozen=True, kw_only=True):
    """It was handed back unfinished, for another worker to run."""


class Buried(Event, frozen=True, kw_only=True):
    """It went to the dead letters."""

    task_id: str
    queue: str
    reason: str


class Refused(Event, frozen=True, kw_only=True):
    """An outcome came too late: the task had been taken from this worker, or had ended."""

    task_id: str


class LoopBlocked(Event, frozen=True, kw_only=True):
    """Something kept a worker's event loop from running. Told from another thread, while it does.

    Once for each time it is blocked.
    """

    worker: str
    seconds: float  # so far
    task: str  # the name and id of the task that runs there, or empty
    stack: str  # what the thread of the event loop is at


class HealthChanged(Event, frozen=True, kw_only=True):
    """A worker became healthy, or ceased to be."""

    worker: str
    problems: tuple[str, ...]  # none: it is healthy


class WorkerReady(Event, frozen=True, kw_only=True):
    """The worker takes tasks."""

    worker: str


class WorkerStopped(Event, frozen=True, kw_only=True):
    """The worker has let go of everything."""

    worker: str


E = TypeVar("E", bound=Event)
Observer: TypeAlias = Callable[[E], None]


class Observers:
    """Who listens to what."""

    def __init__(self) -> None:
        self._by_kind: dict[type[Event], list[Callable[[Any], None]]] = {}

    def add(self, kind: type[E], observer: Observer[E]) -> None:
        """Call `observer` with every event of exactly this kind.

        Raises:
            ConfigError: It is a coroutine function, which nobody would await.
        """
        if inspect.iscoroutinefunction(observer):
            raise ConfigError(f"an observer of {kind.__name__} must be a plain function")
        # A new list each time: an event may be on its way through the old one.
        self._by_kind[kind] = [*self._by_kind.get(kind, ()), observer]

    def remove(self, kind: type[E], observer: Observer[E]) -> None:
        """Undo one `add`."""
        left = list(self._by_kind[kind])
        left.remove(observer)
        self._by_kind[kind] = left

    def heard(self, kind: type[Event]) -> bool:
        """Whether anybody listens: ask before making the event."""
        return bool(self._by_kind.get(kind))

    def emit(self, event: Event) -> None:
        """Tell all who listen. Never raises."""
        for observer in self._by_kind.get(type(event), ()):
            try:
                observer(event)
            except Exception:
                logger.exception("an observer of %s failed", type(event).__name__)
