"""The options of a task and of a call: what there is, what it may be, Celery's other names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias, TypedDict, cast

import msgspec

from aiotaskq.config.celery import CELERY_ONLY
from aiotaskq.config.names import nearest
from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import Schedule, When
from aiotaskq.retry import Retry

Executor: TypeAlias = Literal["loop", "thread", "process"]
ScheduleTimes: TypeAlias = When | float | timedelta | datetime | str
Exceptions: TypeAlias = tuple[type[BaseException], ...] | list[type[BaseException]]


class CallOptions(TypedDict, total=False):
    """What one call may ask for beyond the task's own arguments."""

    countdown: float
    """Seconds before it may start."""
    eta: datetime
    """When it may start; a naive one is taken in the application's `timezone`."""
    expires: float | timedelta | datetime
    """Seconds from now, or a time, after which it no longer starts."""
    queue: str
    priority: int
    """0 to 9, 9 first."""
    task_id: str
    """An id of your own: a second task of the same id within a day is not stored."""
    timeout: float
    """Seconds that one run may take."""
    soft_timeout: float
    """Seconds after which a run is told to come to an end."""
    retry: Retry
    headers: Mapping[str, str]
    connection: object
    """Of yours, to PostgreSQL, with a transaction open on it (asyncpg's, or an `AsyncSession` or
    `AsyncConnection` of SQLAlchemy): the task is sent if and only if that commits."""


class TaskKeywords(TypedDict, total=False):
    """What ``@app.task(...)`` takes: see `TaskQueue.task`."""

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
    """How a task runs, as given where it is defined."""

    executor: Executor = "loop"
    bind: bool = False  # whether the task itself is its function's first argument
    queue: str | None = None
    priority: int | None = None
    timeout: float | None = None  # seconds
    soft_timeout: float | None = None  # seconds
    retry: Retry | None = None  # None: as the application says
    default_retry_delay: float | None = None  # seconds, of self.retry(); None: as `retry` says
    ignore_result: bool | None = None  # None: as the application says
    track_started: bool | None = None  # likewise
    schedule: Schedule | None = None  # None: it runs when it is called


# --- of a call ----------------------------------------------------------------------------------


def check_options(options: CallOptions) -> CallOptions:
    """Return the options that are not None, or raise a `ConfigError` that names the wrong one."""
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _OPTIONS:
            raise unknown_option(name, _OPTIONS)
        fits, wants = _OPTIONS[name]
        if value is not None:
            if not fits(value):
                raise ConfigError(f"{name} is {value!r}; it must be {wants}")
            given[name] = value
    if "countdown" in given and "eta" in given:
        raise ConfigError("countdown and eta both say when to start: give one of them")
    check_limits(given.get("soft_timeout"), given.get("timeout"))
    return cast("CallOptions", given)


def check_limits(soft_timeout: float | None, timeout: float | None) -> None:
    """Raise a `ConfigError` if a task would be told to come to an end only after it was ended."""
    if soft_timeout is not None and timeout is not None and soft_timeout >= timeout:
        raise ConfigError(
            f"soft_timeout is {soft_timeout:g} and timeout {timeout:g}; soft_timeout must be less,"
            " so that the task has the time between them to come to an end"
        )


def check_soft(name: str, soft_timeout: float | None, executor: Executor) -> None:
    """Raise a `ConfigError` if nothing can be raised inside a task while it runs."""
    if soft_timeout is not None and executor == "thread":
        raise ConfigError(
            f"soft_timeout cannot interrupt {name}, a plain function in a thread; choose"
            ' executor="process", or write `async def`'
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_length(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for item in value.items() for text in item
    )


_NAME = "1 to 200 printable characters"

_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "connection": (lambda value: not isinstance(value, str), "a connection, and no URL"),
    "countdown": (_is_number, "a number of seconds"),
    "eta": (lambda value: isinstance(value, datetime), "a datetime"),
    "expires": (
        lambda value: _is_number(value) or isinstance(value, datetime | timedelta),
        "a number of seconds, a timedelta or a datetime",
    ),
    "headers": (_are_texts, "a mapping of texts to texts"),
    "priority": (lambda value: type(value) is int and 0 <= value <= 9, "0 to 9, and 9 runs first"),
    "queue": (lambda value: _is_name(value) and "," not in value, f"{_NAME}, without commas"),
    "retry": (lambda value: isinstance(value, Retry), "a Retry"),
    "soft_timeout": (_is_length, "seconds, more than 0"),
    "task_id": (lambda value: _is_name(str(value)), _NAME),
    "timeout": (_is_length, "seconds, more than 0"),
}


def unknown_option(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an option that does not exist, with the nearest that does."""
    known = sorted(known)
    near = nearest(name, known)
    meant = f", did you mean {near}" if near else ""
    return ConfigError(f"there is no option {name}{meant}? There are: {', '.join(known)}")


def check_args(args: Iterable[Any]) -> tuple[Any, ...]:
    """Return positional arguments as a tuple.

    Raises:
        TypeError: They are a text, or no sequence: ``("x")`` is not ``("x",)``.
    """
    if not isinstance(args, list | tuple):
        raise TypeError(f"args is {args!r}; it must be a list or a tuple")
    return tuple(args)


def check_name(what: str, value: str) -> str:
    """Return an id or name that is fit for every driver, or raise a `ConfigError`."""
    if not _is_name(value):
        raise ConfigError(f"{what} is {value!r}; it must be {_NAME}")
    return value


# --- of a task ----------------------------------------------------------------------------------

_SAME = {"time_limit": "timeout", "soft_time_limit": "soft_timeout"}
"""Celery's names of what is called otherwise here."""

_DONE_ANYWAY = {
    "acks_late": CELERY_ONLY["task_acks_late"],
    "reject_on_worker_lost": CELERY_ONLY["task_reject_on_worker_lost"],
}
"""Celery's options that may ask for what is so anyway."""


def task_options(fn: Callable[..., Any], given: Mapping[str, Any]) -> TaskOptions:
    """Return the options of a task.

    Args:
        fn: Its function.
        given: What ``@app.task(...)`` was given, without the name; Celery's names among it.

    Raises:
        ConfigError: An option does not exist, or has a wrong value, or the function cannot run
            where it is asked to.
    """
    known = TaskKeywords.__annotations__.keys() | {"bind"}
    for option in given.keys() - known:
        raise unknown_option(option, known - _DONE_ANYWAY.keys() - _SAME.keys())
    options = _in_our_words({name: value for name, value in given.items() if value is not None})
    if _RETRY_OPTIONS & given.keys():
        if options.get("retry") is not None:
            raise ConfigError(
                "retry and Celery's options of retries"
                f" ({', '.join(sorted(_RETRY_OPTIONS & given.keys()))}) say the same: give one"
            )
        options["retry"] = _celery_retry(given)
        options["default_retry_delay"] = _celery_delay(given)
    checked = check_options({name: options.get(name) for name in _OF_BOTH})  # type: ignore[arg-type]  # a part of CallOptions
    options["executor"] = choose_executor(fn, options.get("executor"))
    schedule = options.get("schedule")
    if schedule is not None and not isinstance(schedule, Schedule):
        options["schedule"] = Schedule(schedule)
    check_soft(fn.__qualname__, checked.get("soft_timeout"), options["executor"])
    return TaskOptions(**options)


_OF_BOTH = ("queue", "priority", "timeout", "soft_timeout", "retry")


def _in_our_words(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not about retries, by the names that they have here."""
    options: dict[str, Any] = {}
    for spelled, value in given.items():
        if spelled in _DONE_ANYWAY:
            _DONE_ANYWAY[spelled].check(spelled, value)
            continue
        name = _SAME.get(spelled, spelled)
        if name in options:
            raise ConfigError(f"{name} is given twice, also by Celery's name of it: give one")
        if name not in _RETRY_OPTIONS:
            options[name] = value
    if type(options.get("bind", False)) is not bool:
        raise ConfigError(f"bind is {options['bind']!r}; it may be True or False")
    return options


def choose_executor(fn: Callable[..., Any], executor: str | None) -> Executor:
    """Return where a function runs.

    Raises:
        ConfigError: It cannot run there.
    """
    if not (inspect.isroutine(fn) and hasattr(fn, "__module__")):
        raise ConfigError(f"{fn!r} is no function; options are keywords: @app.task(name=...)")
    name = getattr(fn, "__qualname__", repr(fn))
    if inspect.iscoroutinefunction(fn):
        if executor not in (None, "loop"):
            raise ConfigError(
                f"{name} is a coroutine function, which runs on the event loop: leave executor out"
            )
        return "loop"
    if inspect.isasyncgenfunction(fn) or inspect.isgeneratorfunction(fn):
        raise ConfigError(f"{name} is a generator; a task returns one value")
    if executor is None or executor == "thread":
        return "thread"
    if executor == "process":
        if "<locals>" in name or name == "<lambda>":
            raise ConfigError(
                f"{name} runs in another process, which finds it by its name: define it at the"
                " top level of a module"
            )
        return "process"
    if executor == "loop":
        raise ConfigError(
            f"{name} is a plain function and would block the event loop: write"
            ' `async def`, or choose executor="thread" or "process"'
        )
    raise ConfigError(f'executor is {executor!r}; it may be "thread" or "process"')


# --- retries as Celery says them ----------------------------------------------------------------

CELERY_RETRIES = 3
CELERY_DELAY = 180.0  # seconds
_RETRY_OPTIONS = frozenset(
    {
        "autoretry_for",
        "default_retry_delay",
        "dont_autoretry_for",
        "max_retries",
        "retry_backoff",
        "retry_backoff_max",
        "retry_jitter",
        "retry_kwargs",
    }
)


def _celery_retry(given: Mapping[str, Any]) -> Retry:
    """Return the `Retry` that Celery's options describe.

    Without `autoretry_for` it is one that no exception asks for by itself, and ``self.retry()``
    finds its numbers there.
    """
    extra = _retry_kwargs(given)
    retries = extra.get("max_retries", given.get("max_retries", CELERY_RETRIES))
    if retries is not None and (type(retries) is not int or retries < 0):
        raise ConfigError(f"max_retries is {retries!r}; it must be a whole number, 0 or more")
    backoff = _seconds("retry_backoff", given.get("retry_backoff") or 0)
    jitter = given.get("retry_jitter", True)
    if type(jitter) is not bool:
        raise ConfigError(f"retry_jitter is {jitter!r}; it may be True or False")
    grows: dict[str, Any]
    if backoff:
        grows = {
            "delay": max(1.0, backoff),  # Celery takes less for 1 as well
            "backoff": "exponential",
            "max_delay": _seconds("retry_backoff_max", given.get("retry_backoff_max", 600)),
            "jitter": "full" if jitter else False,
        }
    else:  # only what grows is bounded, and random, in Celery
        delay = _seconds("countdown", extra.get("countdown", _celery_delay(given)))
        grows = {"delay": delay, "backoff": "constant", "max_delay": delay, "jitter": False}
    return Retry(
        max_attempts=math.inf if retries is None else retries + 1,
        on=_exceptions("autoretry_for", given),
        never_on=_exceptions("dont_autoretry_for", given),
        **grows,
    )


def _celery_delay(given: Mapping[str, Any]) -> float:
    return _seconds("default_retry_delay", given.get("default_retry_delay", CELERY_DELAY))


def _retry_kwargs(given: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = given.get("retry_kwargs") or {}
    if not isinstance(extra, Mapping) or extra.keys() - {"max_retries", "countdown"}:
        raise ConfigError(
            f"retry_kwargs is {extra!r}; it may hold max_retries and countdown, nothing else"
        )
    return extra


def _seconds(name: str, value: Any) -> float:
    if not _is_number(value) or value < 0:
        raise ConfigError(f"{name} is {value!r}; it must be a number of seconds, 0 or more")
    return float(value)


def _exceptions(name: str, given: Mapping[str, Any]) -> tuple[type[BaseException], ...]:
    kinds = given.get(name) or ()
    if not isinstance(kinds, tuple | list) or not all(
        isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
    ):
        raise ConfigError(f"{name} is {kinds!r}; it must be a tuple of exception types")
    return tuple(kinds)
