"""Options of a task and of a call, as typed keywords and as checked data.

The options, their values and their meanings are defined in `aiotaskq.tasks.option_table`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, TypeAlias, TypedDict, cast

import msgspec

from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import Schedule, When
from aiotaskq.retry import Retry
from aiotaskq.tasks.celery_options import translate
from aiotaskq.tasks.option_table import (
    CELERY_NAMES,
    OPTIONS,
    Executor,
    Scope,
    options_of,
    unknown_option,
)

ScheduleTimes: TypeAlias = When | float | timedelta | datetime | str
Exceptions: TypeAlias = tuple[type[BaseException], ...] | list[type[BaseException]]


class CallOptions(TypedDict, total=False):
    """The options of one call, beyond the task's own arguments."""

    countdown: float
    """Seconds before the task may start."""
    eta: datetime
    """The time before which it does not start; a naive one is taken in the app's `timezone`."""
    expires: float | timedelta | datetime
    """Seconds from now, or a time, after which it no longer starts."""
    queue: str
    priority: int
    """0 to 9, 9 runs first."""
    task_id: str
    """An id of your own: a second task of the same id within a day is not stored."""
    timeout: float
    """Seconds that one run may take."""
    soft_timeout: float
    """Seconds after which `SoftTimeLimitExceeded` is raised inside a run."""
    retry: Retry
    headers: Mapping[str, str]
    connection: object
    """A connection of yours to PostgreSQL with a transaction open on it (asyncpg's, or an
    `AsyncSession` or `AsyncConnection` of SQLAlchemy): the task is sent if and only if that
    commits."""


class TaskKeywords(TypedDict, total=False):
    """The keywords of ``@app.task(...)``; see `TaskQueue.task`."""

    name: str | None
    queue: str | None
    priority: int | None
    timeout: float | None
    soft_timeout: float | None
    retry: Retry | None
    executor: Executor | None
    ignore_result: bool | None
    track_started: bool | None
    schedule: Schedule | ScheduleTimes | None
    # As in Celery
    time_limit: float | None
    soft_time_limit: float | None
    autoretry_for: Exceptions
    dont_autoretry_for: Exceptions
    max_retries: int | None
    default_retry_delay: float
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    retry_kwargs: Mapping[str, Any]
    acks_late: Literal[True]
    reject_on_worker_lost: Literal[True]


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options given where a task is defined, checked; None: not given."""

    executor: Executor | None = "loop"  # None: a plain function that has none of its own
    bind: bool = False
    queue: str | None = None
    priority: int | None = None
    timeout: float | None = None  # seconds
    soft_timeout: float | None = None  # seconds
    retry: Retry | None = None
    default_retry_delay: float | None = None  # seconds, of self.retry(); None: as `retry` says
    ignore_result: bool | None = None
    track_started: bool | None = None
    schedule: Schedule | None = None


_OF_A_CALL = options_of(Scope.CALL)
_OF_A_TASK = options_of(Scope.TASK)


def check_call_options(options: CallOptions) -> CallOptions:
    """Return the options of a call that are not None, each in the form in which it is used.

    Raises:
        ConfigError: One does not exist, has a wrong value, or contradicts another one.
    """
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _OF_A_CALL:
            raise unknown_option(name, _OF_A_CALL)
        if value is not None:
            checked[name] = OPTIONS[name].check(value)
    if "countdown" in checked and "eta" in checked:
        raise ConfigError("countdown and eta both say when to start: give one of them")
    check_limits(checked.get("soft_timeout"), checked.get("timeout"))
    return cast("CallOptions", checked)


def task_options(fn: Callable[..., Any], given: Mapping[str, Any]) -> TaskOptions:
    """Return the options of a task.

    Args:
        fn: Its function.
        given: The keywords of ``@app.task(...)`` without `name`; Celery's names among them.

    Raises:
        ConfigError: An option does not exist, or has a wrong value, or the function cannot run
            where it is asked to.
    """
    for option in given:
        if option not in _OF_A_TASK and option not in CELERY_NAMES:
            raise unknown_option(option, _OF_A_TASK)
    options = translate(given)
    check_limits(options.get("soft_timeout"), options.get("timeout"))
    options["executor"] = choose_executor(fn, options.get("executor"))
    return TaskOptions(**options)


def check_limits(soft_timeout: float | None, timeout: float | None) -> None:
    """Raise a `ConfigError` if the soft limit of a run is not before its hard limit."""
    if soft_timeout is not None and timeout is not None and soft_timeout >= timeout:
        raise ConfigError(
            f"soft_timeout is {soft_timeout:g} and timeout {timeout:g}; soft_timeout must be less,"
            " so that the task has the time between them to come to an end"
        )


def check_args(args: Iterable[Any]) -> tuple[Any, ...]:
    """Return positional arguments as a tuple.

    Raises:
        TypeError: They are a text, or no sequence: ``("x")`` is not ``("x",)``.
    """
    if not isinstance(args, list | tuple):
        raise TypeError(f"args is {args!r}; it must be a list or a tuple")
    return tuple(args)


def choose_executor(fn: Callable[..., Any], executor: Executor | None) -> Executor | None:
    """Return where a function runs; None: it is plain, and `task_default_executor` holds.

    Raises:
        ConfigError: It cannot run there.
    """
    given: Any = fn  # of any type, as a user gave it
    if not callable(given) or isinstance(given, type):
        raise ConfigError(f"{fn!r} is no function; options are keywords: @app.task(name=...)")
    name = getattr(fn, "__qualname__", repr(fn))
    # An object may have a call that is a coroutine function.
    called = fn if inspect.isroutine(fn) or isinstance(fn, partial) else type(fn).__call__
    if inspect.iscoroutinefunction(called):
        if executor not in (None, "loop"):
            raise ConfigError(
                f"{name} is a coroutine function, which runs on the event loop: leave executor out"
            )
        return "loop"
    if inspect.isasyncgenfunction(called) or inspect.isgeneratorfunction(called):
        raise ConfigError(f"{name} is a generator; a task returns one value")
    if executor is None or executor == "thread":
        return executor
    if executor == "loop":
        raise ConfigError(
            f"{name} is a plain function and would block the event loop: write"
            ' `async def`, or choose executor="thread" or "process"'
        )
    check_process(fn)
    return "process"


def check_process(fn: Callable[..., Any]) -> None:
    """Raise a `ConfigError` if a plain function cannot run in another process."""
    name = getattr(fn, "__qualname__", repr(fn))
    if "<locals>" in name or name == "<lambda>" or not inspect.isfunction(fn):
        raise ConfigError(
            f"{name} runs in another process, which finds it by its name: define it at"
            ' the top level of a module, or give it executor="thread"'
        )
