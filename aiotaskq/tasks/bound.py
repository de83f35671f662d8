"""``self.request`` in a task with ``bind=True``: the run it is in, in Celery's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiotaskq.context import TaskContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a bound task knows of its run. `current_task` tells the same in this project's words.

    Attributes:
        called_directly: Whether no worker runs the task: its function was just called. There is
            no id then, and nothing else of a run.
        id: The task's id, the same for all its attempts.
        task: The name that the task is registered under.
        retries: How often it was tried before.
        args: The positional arguments, converted, without the task itself.
        kwargs: The keyword arguments, converted.
        headers: What the sender and the middleware attached.
        hostname: The name of the worker.
        expires: After when it no longer starts, in UTC.
        delivery_info: The queue, as ``routing_key``, and the ``priority``.
        timelimit: Seconds after which the run is ended, and after which it is told to come to an
            end; each may be None.
        is_eager: False: tasks are never run in the sender.
    """

    called_directly: bool = True
    id: str | None = None
    task: str | None = None
    retries: int = 0
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = None
    headers: Mapping[str, str] | None = None
    hostname: str | None = None
    expires: datetime | None = None
    delivery_info: Mapping[str, Any] | None = None
    timelimit: tuple[float | None, float | None] = (None, None)
    is_eager: bool = field(default=False, init=False)

    @property
    def name(self) -> str | None:
        """The same as `task`."""
        return self.task

    @property
    def correlation_id(self) -> str | None:
        """The same as `id`."""
        return self.id


def request_of(
    context: TaskContext | None, timelimit: tuple[float | None, float | None]
) -> Request:
    """Return what a bound task is to know of a run, or of being called directly."""
    if context is None:
        return Request(timelimit=timelimit)
    expires = context.expires_at
    return Request(
        called_directly=False,
        id=context.id,
        task=context.name,
        retries=context.retries,
        args=context.args,
        kwargs=context.kwargs,
        headers=context.headers,
        hostname=context.worker,
        expires=None if expires is None else datetime.fromtimestamp(expires, UTC),
        delivery_info={"routing_key": context.queue, "priority": context.priority},
        timelimit=timelimit,
    )
