"""`BoundTask`: ``self`` in a task with ``bind=True``, with Celery's names."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, NoReturn
from zoneinfo import ZoneInfo

from aiotaskq.context import TaskContext, find_task
from aiotaskq.errors import ConfigError, MaxRetriesExceededError, RetryLater
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.tasks.effective import EffectiveOptions
from aiotaskq.tasks.option_table import CELERY_DELAY, CELERY_RETRIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The run of a bound task, as Celery names its parts; `current_task` has this project's names.

    Attributes:
        called_directly: Whether the function was just called, and no worker runs the task. Then
            there is no id, and nothing else of a run.
        id: The task's id, the same for all its attempts.
        task: The name under which the task is registered.
        retries: The number of earlier attempts.
        args: The positional arguments, converted, without the task itself.
        kwargs: The keyword arguments, converted.
        headers: The headers that the sender and the middleware attached.
        hostname: The name of the worker.
        expires: The time after which the task no longer starts, in UTC.
        delivery_info: The queue, as ``routing_key``, and the ``priority``.
        timelimit: The hard and the soft limit of the run in seconds; each may be None.
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
    """Return the request of a run, or of a direct call where there is no context."""
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


class BoundTask(TaskDefinition):
    """The part of a `Task` that is used inside a run of it."""

    MaxRetriesExceededError: ClassVar[type[MaxRetriesExceededError]] = MaxRetriesExceededError

    _app: Application

    @property
    def request(self) -> Request:
        """The run in which this is called."""
        context = self._context()
        options = self._options_in(context)
        return request_of(context, (options.timeout, options.soft_timeout))

    @property
    def max_retries(self) -> int | None:
        """The most further attempts of a run; None: without limit."""
        retries, _ = self._retries()
        return None if retries == math.inf else int(retries)

    @property
    def default_retry_delay(self) -> float | None:
        """Seconds before another attempt; None: as the `Retry` of the task says."""
        return self._retries()[1]

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
    ) -> RetryLater:
        """Ask for another attempt of the run in which this is called, with the same arguments.

        The task runs again after this run, whatever its function returns or raises by then; only
        another verdict (`Reject`, `Snooze`, `RetryLater`) that it raises counts instead.

        Example:
            ::

                @app.task(bind=True, max_retries=5)
                def fetch(self, url: str) -> str:
                    try:
                        return download(url)
                    except OSError as error:
                        raise self.retry(exc=error, countdown=60)

        Args:
            args: Not supported: an attempt has the arguments of its task.
            kwargs: Likewise.
            exc: The failure. It is raised instead if no attempts are left.
            throw: Whether to raise the request. Otherwise it is returned, and the function goes on.
            eta: The time of the next attempt; a naive one is taken in the application's `timezone`.
            countdown: Seconds until the next attempt. By default `default_retry_delay`, else the
                delay of the task's `Retry`; a task with neither waits for three minutes.
            max_retries: The most further attempts after the first. By default the option of the
                task, else its `Retry`; a task with neither has three.

        Raises:
            RetryLater: The request; the worker understands it.
            MaxRetriesExceededError: No attempts are left, and `exc` is not given.
            RuntimeError: No worker runs this task here, and `exc` is not given.
        """
        if args is not None or kwargs is not None:
            raise ConfigError(
                "self.retry() cannot change the arguments: an attempt has those of its task. Send"
                " another task with the new ones, and return"
            )
        if countdown is not None and eta is not None:
            raise ConfigError("countdown and eta both say when to run again: give one of them")
        context = self._context()
        if context is None:
            _raise(exc or RuntimeError(f"no worker runs {self.name} here, so it cannot be retried"))
        usual, delay = self._retries(context)
        retries = usual if max_retries is None else max_retries
        if context.retries >= retries:
            spent = f"{self.name}[{context.id}] has had its {context.attempt} attempts"
            _raise(exc or MaxRetriesExceededError(spent))
        if eta is not None:
            if eta.tzinfo is None:
                eta = eta.replace(tzinfo=ZoneInfo(self._app.conf.timezone))
            delay = max(0.0, eta.timestamp() - time.time())
        elif countdown is not None:
            delay = max(0.0, countdown)  # a deadline may have passed
        later = RetryLater(delay, _reason(exc), max_attempts=retries + 1)
        later.__cause__ = exc or sys.exception()
        context.verdict = later  # so that it holds even if the function hides the exception
        if throw:
            raise later
        return later

    def _context(self) -> TaskContext | None:
        """Return the context of a run of this task; None in a task that just calls its function."""
        context = find_task()
        return context if context is not None and context.name == self.name else None

    def _options_in(self, context: TaskContext | None) -> EffectiveOptions:
        """Return the options that hold in a run, or in a direct call of the function."""
        options = self._app.effective_options(self.name)
        return options if context is None else options.for_run(context)

    def _retries(self, context: TaskContext | None = None) -> tuple[float, float | None]:
        """Return the most further attempts, and the seconds before one where that is given.

        Where neither the call nor the task nor the settings have a retry, Celery's defaults hold.
        """
        options = self._options_in(context)
        if options.retry is None:
            return CELERY_RETRIES, CELERY_DELAY
        return options.retry.max_attempts - 1, options.default_retry_delay


def _raise(error: BaseException) -> NoReturn:
    """Raise an error, with the exception that is handled now as its cause."""
    handled = sys.exception()
    if handled is None or handled is error:
        raise error
    raise error from handled


def _reason(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"
