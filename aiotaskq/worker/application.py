"""What a worker needs of its application."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeAlias

from aiotaskq.codec import Codec
from aiotaskq.config import Config
from aiotaskq.context import State
from aiotaskq.events import Observers
from aiotaskq.middleware import Middleware
from aiotaskq.outbox import Outbox
from aiotaskq.protocols import Broker, ResultBackend
from aiotaskq.task import Task

Lifespan: TypeAlias = Callable[[State], AbstractAsyncContextManager[None]]


class Application(Protocol):
    """What `TaskQueue` is to a worker."""

    name: str
    conf: Config
    tasks: dict[str, Task[Any, Any]]
    middlewares: list[Middleware]
    observers: Observers
    lifespans: list[Lifespan]

    @property
    def codec(self) -> Codec:
        """How messages and results are written."""
        ...

    def import_tasks(self) -> None:
        """Import the modules that the settings name."""
        ...

    def drivers(self) -> tuple[Broker, ResultBackend | None]:
        """Return closed drivers for an event loop of the caller's."""
        ...

    def outbox(self) -> Outbox | None:
        """Return the closed outbox, if there is one."""
        ...
