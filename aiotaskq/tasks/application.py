"""`Application`: the one Protocol that describes `TaskQueue` to the parts below it.

Tasks and handles, the client, the scheduler and the worker know their application by this
Protocol alone, so that none of them imports `TaskQueue`, which puts them all together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from aiotaskq.config import Config
from aiotaskq.context import Lifespan
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.encoding.codec import Codec
from aiotaskq.events import Observers
from aiotaskq.middleware import Middleware
from aiotaskq.recurrence import Entry
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.tasks.effective import EffectiveOptions
from aiotaskq.tasks.result import TaskResult


class Application(Protocol):
    """An application, as its parts see it."""

    # Definitions

    name: str
    conf: Config
    middlewares: list[Middleware]
    observers: Observers
    lifespans: list[Lifespan]

    @property
    def tasks(self) -> Mapping[str, TaskDefinition]:
        """The registered tasks, by name."""
        ...

    def effective_options(self, name: str) -> EffectiveOptions:
        """Return the options of a task where a call gives none."""
        ...

    def import_tasks(self) -> None:
        """Import the modules that the settings name."""
        ...

    def declared_schedules(self) -> Mapping[str, Entry]:
        """Return the schedules of the code and the settings, by id."""
        ...

    # Drivers

    @property
    def codec(self) -> Codec:
        """The codec of messages and results."""
        ...

    @property
    def keeps_results(self) -> bool:
        """Return whether there is a result backend."""
        ...

    def drivers(self) -> tuple[Broker, ResultBackend | None]:
        """Return new closed drivers, for one event loop."""
        ...

    def outbox_broker(self) -> Broker | None:
        """Return the closed broker that stores the outbox; None if there is no outbox."""
        ...

    def schedule_broker(self) -> Broker | None:
        """Return the closed broker that stores the schedules; None: the broker itself does."""
        ...

    async def schedule_store(self) -> ScheduleStore:
        """Return the store of the schedules, open on the running loop."""
        ...

    async def broker(self) -> Broker:
        """Return the broker, open on the running loop."""
        ...

    async def backend(self) -> ResultBackend | None:
        """Return the result backend, open on the running loop; None if there is none."""
        ...

    # Calls and their results

    async def publish_calls(self, calls: Iterable[Call[Any]]) -> list[str]:
        """Store calls at the broker; return the ids of their tasks."""
        ...

    async def wait_outcome(self, task_id: str) -> Outcome:
        """Return the final outcome of a task, as soon as there is one."""
        ...

    async def load_outcome(self, task_id: str) -> Outcome | None:
        """Return the outcome that a task has now, final or not."""
        ...

    async def cancel(self, task_id: str, *, running: bool = True) -> None:
        """Revoke a task; one that already runs only if `running` is true."""
        ...

    async def forget(self, task_id: str) -> bool:
        """Delete the outcome of a task; False if there was none."""
        ...

    def read(self, outcome: Outcome) -> TaskResult[Any]:
        """Return an outcome with its value or error decoded."""
        ...
