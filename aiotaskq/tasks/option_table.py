"""The table of options: every option of a task and of a call, with its values and its meaning.

This is the one place where an option is defined. Checking, the names that Celery has for some of
them, and the table in the documentation are made from it. The typed keywords (`TaskKeywords`,
`CallOptions`), the fields of `TaskOptions` and `EffectiveOptions` and the help of the command line
are written out for type checkers and readers, and tested against it.

An option of a call goes before the same option of the task, and that before the setting: see
`aiotaskq.tasks.effective`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

from aiotaskq.config import value_types
from aiotaskq.config.celery import CELERY_ONLY
from aiotaskq.config.names import nearest
from aiotaskq.config.value_types import InvalidValue, ValueType
from aiotaskq.errors import ConfigError
from aiotaskq.recurrence import Schedule

Executor: TypeAlias = Literal["loop", "thread", "process"]

CELERY_RETRIES = 3
"""Retries of a task with one of Celery's options of retries and without `max_retries`."""

CELERY_DELAY = 180.0
"""Seconds before a retry of such a task without `default_retry_delay`."""


class Scope(StrEnum):
    """A place where an option is given."""

    TASK = "task"  # @app.task(...)
    CALL = "call"  # with_options(...), apply_async(...), send(...), and a schedule's options


class Option(NamedTuple):
    """One option.

    Attributes:
        name: Its name.
        scopes: Where it may be given.
        value_type: The values that it takes.
        meaning: One or two sentences for the documentation.
        setting: The setting that holds where neither the call nor the task has the option.
        celery: Celery's name of the same option.
        part_of: The option that this one, an option of Celery, is translated into.
    """

    name: str
    scopes: frozenset[Scope]
    value_type: ValueType[Any, Any]
    meaning: str
    setting: str | None = None
    celery: str | None = None
    part_of: str | None = None

    def check(self, value: Any) -> Any:
        """Return a value in the form in which it is used.

        Args:
            value: Anything but None, which means that the option is not given.

        Raises:
            ConfigError: The option does not take this value.
        """
        try:
            return self.value_type.check(value)
        except InvalidValue as error:
            problem = error.reason or f"it must be {self.value_type.wants}"
            raise ConfigError(f"{self.name} is {_shown(value)}; {problem}") from None
        except ConfigError:
            raise
        except Exception as error:  # a value of the user's, whose own methods may raise anything
            problem = f"it must be {self.value_type.wants}"
            raise ConfigError(f"{self.name} is {_shown(value)}; {problem}") from error


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # as in `Option.check`
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


# --- kinds of values that only options have -----------------------------------------------------

_NAME = "1 to 200 printable characters"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _name() -> ValueType[str, str]:
    def check(value: Any) -> str:
        if _is_name(value):
            return str(value)
        raise InvalidValue

    return ValueType(_NAME, check)


def _queue() -> ValueType[str, str]:
    def check(value: Any) -> str:
        if _is_name(value) and "," not in value:
            return str(value)
        raise InvalidValue

    return ValueType(f"{_NAME}, without commas", check)


def _task_id() -> ValueType[str | int | UUID, str | int | UUID]:
    def check(value: Any) -> str | int | UUID:
        if isinstance(value, str | int | UUID) and type(value) is not bool and _is_name(str(value)):
            return value
        raise InvalidValue

    return ValueType(f"text of {_NAME}, a whole number or a UUID", check)


def _seconds(*, zero: bool = False) -> ValueType[float, float]:
    def check(value: Any) -> float:
        if _is_number(value) and (value > 0 or (zero and value == 0)):
            return value  # type: ignore[no-any-return]  # a number, as seen
        raise InvalidValue

    return ValueType(f"seconds, {'0 or more' if zero else 'more than 0'}", check)


def _countdown() -> ValueType[float, float]:
    def check(value: Any) -> float:
        if _is_number(value):
            return value  # type: ignore[no-any-return]  # a number, as seen
        raise InvalidValue

    return ValueType("a number of seconds", check)


def _eta() -> ValueType[datetime, datetime]:
    def check(value: Any) -> datetime:
        if isinstance(value, datetime):
            return value
        raise InvalidValue

    return ValueType("a datetime", check)


def _expires() -> ValueType[float | timedelta | datetime, float | timedelta | datetime]:
    def check(value: Any) -> float | timedelta | datetime:
        if _is_number(value) or isinstance(value, datetime | timedelta):
            return value  # type: ignore[no-any-return]  # one of them, as seen
        raise InvalidValue

    return ValueType("a number of seconds, a timedelta or a datetime", check)


def _headers() -> ValueType[Mapping[str, str], Mapping[str, str]]:
    def check(value: Any) -> Mapping[str, str]:
        if isinstance(value, Mapping) and all(
            isinstance(text, str) for item in value.items() for text in item
        ):
            return value
        raise InvalidValue

    return ValueType("a mapping of texts to texts", check)


def _connection() -> ValueType[object, object]:
    def check(value: Any) -> object:
        if isinstance(value, str | bytes | int | float):
            raise InvalidValue
        return value

    return ValueType("a connection, and no URL", check)


def _executor() -> ValueType[Executor, Executor]:
    def check(value: Any) -> Executor:
        if value in ("loop", "thread", "process"):
            return value  # type: ignore[no-any-return]  # one of them, as seen
        raise InvalidValue('it may be "thread" or "process"')

    return ValueType('"thread" or "process"', check)


def _schedule() -> ValueType[Schedule, Any]:
    def check(value: Any) -> Schedule:
        try:
            return value if isinstance(value, Schedule) else Schedule(value)
        except ConfigError as error:
            raise InvalidValue(str(error)) from None

    return ValueType("a Schedule, or a time such as crontab(hour=3, minute=0) or every(60)", check)


def _exceptions() -> ValueType[tuple[type[BaseException], ...], Any]:
    def check(value: Any) -> tuple[type[BaseException], ...]:
        if isinstance(value, tuple | list) and all(
            isinstance(kind, type) and issubclass(kind, BaseException) for kind in value
        ):
            return tuple(value)
        raise InvalidValue

    return ValueType("a tuple of exception types", check)


def _retry_backoff() -> ValueType[float, bool | float]:
    def check(value: Any) -> float:
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            return float(value)  # True is one second, as in Celery
        raise InvalidValue

    return ValueType("True, False or a number of seconds, 0 or more", check)


def _retry_kwargs() -> ValueType[Mapping[str, Any], Mapping[str, Any]]:
    parts: dict[str, ValueType[Any, Any]] = {
        "max_retries": value_types.optional(value_types.whole(0)),
        "countdown": _seconds(zero=True),
    }

    def check(value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping) or value.keys() - parts.keys():
            raise InvalidValue("it may hold max_retries and countdown, nothing else")
        for name, part in value.items():
            try:
                parts[name].check(part)
            except InvalidValue:
                raise InvalidValue(f"{name} in it must be {parts[name].wants}") from None
        return value

    return ValueType("a mapping with max_retries and countdown", check)


def _done_anyway(name: str, setting: str) -> ValueType[Any, Any]:
    def check(value: Any) -> Any:
        CELERY_ONLY[setting].check(name, value)
        return value

    return ValueType("True", check)


# --- the table ----------------------------------------------------------------------------------

_TASK, _CALL = frozenset({Scope.TASK}), frozenset({Scope.CALL})
_BOTH = _TASK | _CALL

_TABLE = (
    Option(
        "name",
        _TASK,
        _name(),
        "The name that the task is registered under; by default ``module.function``.",
    ),
    Option(
        "bind",
        _TASK,
        value_types.flag(),
        "Whether the function gets its task as the first argument,"
        " ``self``, which callers leave out: for ``self.request`` and ``self.retry()``.",
    ),
    Option(
        "queue",
        _BOTH,
        _queue(),
        "The queue. By default the route of the task's name in"
        " `task_routes`, else `task_default_queue`.",
        setting="task_default_queue",
    ),
    Option(
        "priority",
        _BOTH,
        value_types.whole(0, 9),
        "0 to 9 within the queue, 9 runs first. By default `task_default_priority`.",
        setting="task_default_priority",
    ),
    Option(
        "timeout",
        _BOTH,
        _seconds(),
        "Seconds that one run may take. A coroutine is"
        " cancelled then, a process of the pool ended, and in a thread `TimeLimitExceeded` is"
        " raised. By default `task_time_limit`.",
        setting="task_time_limit",
        celery="time_limit",
    ),
    Option(
        "soft_timeout",
        _BOTH,
        _seconds(),
        "Seconds after which `SoftTimeLimitExceeded` is"
        " raised inside a run, so that it can come to an end by itself. By default"
        " `task_soft_time_limit`.",
        setting="task_soft_time_limit",
        celery="soft_time_limit",
    ),
    Option(
        "retry",
        _BOTH,
        value_types.retry(),
        "When the task runs again after a failure. By default `task_default_retry`.",
        setting="task_default_retry",
    ),
    Option(
        "executor",
        _TASK,
        _executor(),
        'Where a plain function runs: ``"thread"`` or ``"process"``. By default'
        " `task_default_executor`. Coroutine functions run on the event loop.",
        setting="task_default_executor",
    ),
    Option(
        "ignore_result",
        _TASK,
        value_types.flag(),
        "Whether no result is kept. By default `task_ignore_result`.",
        setting="task_ignore_result",
    ),
    Option(
        "track_started",
        _TASK,
        value_types.flag(),
        "Whether the status says STARTED while the task runs. By default `task_track_started`.",
        setting="task_track_started",
    ),
    Option(
        "schedule",
        _TASK,
        _schedule(),
        "The times at which a scheduler sends the task by itself: a `Schedule`, or the `when`"
        " of one, such as ``crontab(hour=3, minute=0)``.",
    ),
    Option(
        "countdown",
        _CALL,
        _countdown(),
        "Seconds before the task may start.",
    ),
    Option(
        "eta",
        _CALL,
        _eta(),
        "The time before which the task does not start; a naive one is taken"
        " in the application's `timezone`.",
    ),
    Option(
        "expires",
        _CALL,
        _expires(),
        "Seconds from now, or a time, after which the task no longer starts.",
    ),
    Option(
        "task_id",
        _CALL,
        _task_id(),
        "An id of your own. A second task of the same id is not stored within a day.",
    ),
    Option(
        "headers",
        _CALL,
        _headers(),
        "Texts for middleware and for the task, by name.",
    ),
    Option(
        "connection",
        _CALL,
        _connection(),
        "A connection of yours to PostgreSQL with a"
        " transaction open on it (asyncpg's, or an `AsyncSession` or `AsyncConnection` of"
        " SQLAlchemy). The task is sent if and only if that transaction commits.",
    ),
    Option(
        "autoretry_for",
        _TASK,
        _exceptions(),
        "The exceptions after which the task runs again. This option and the seven that"
        " follow are Celery's, and take the place of `retry`.",
        part_of="retry",
    ),
    Option(
        "dont_autoretry_for",
        _TASK,
        _exceptions(),
        "Exceptions after which the task does not run again, even where `autoretry_for` names"
        " a base class of theirs.",
        part_of="retry",
    ),
    Option(
        "max_retries",
        _TASK,
        value_types.whole(0),
        f"The most further attempts, {CELERY_RETRIES} by default; None: without limit. It also"
        " holds for ``self.retry()``.",
        part_of="retry",
    ),
    Option(
        "default_retry_delay",
        _TASK,
        _seconds(zero=True),
        "Seconds before another attempt,"
        f" {CELERY_DELAY:g} by default. It also holds for ``self.retry()``.",
        part_of="retry",
    ),
    Option(
        "retry_backoff",
        _TASK,
        _retry_backoff(),
        "Seconds before the first retry (True: 1), doubled for each further one, in place of"
        " a constant delay.",
        part_of="retry",
    ),
    Option(
        "retry_backoff_max",
        _TASK,
        _seconds(zero=True),
        "The longest delay in seconds when `retry_backoff` is given, 600 by default.",
        part_of="retry",
    ),
    Option(
        "retry_jitter",
        _TASK,
        value_types.flag(),
        "Whether a delay of `retry_backoff` is shortened by a random part, as it is by default.",
        part_of="retry",
    ),
    Option(
        "retry_kwargs",
        _TASK,
        _retry_kwargs(),
        "``max_retries`` and ``countdown``, the delay, in one mapping.",
        part_of="retry",
    ),
    Option(
        "acks_late",
        _TASK,
        _done_anyway("acks_late", "task_acks_late"),
        "May be True: a task is settled only after it has run.",
    ),
    Option(
        "reject_on_worker_lost",
        _TASK,
        _done_anyway("reject_on_worker_lost", "task_reject_on_worker_lost"),
        "May be True: a task whose worker died runs again.",
    ),
)

OPTIONS: Mapping[str, Option] = {option.name: option for option in _TABLE}
"""Every option, by its name."""

CELERY_NAMES: Mapping[str, str] = {
    option.celery: option.name for option in _TABLE if option.celery is not None
}
"""Options by the name that Celery has for them."""


def options_of(scope: Scope) -> frozenset[str]:
    """Return the names of the options that may be given there, without Celery's names."""
    return frozenset(name for name, option in OPTIONS.items() if scope in option.scopes)


def unknown_option(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an option that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = nearest(name, known)
    meant = f", did you mean {near}?" if near else "."
    return ConfigError(f"there is no option {name}{meant} There are: {', '.join(known)}")


def check_name(label: str, value: str) -> str:
    """Return an id or a name that every driver can store, or raise a `ConfigError`."""
    if not _is_name(value):
        raise ConfigError(f"{label} is {_shown(value)}; it must be {_NAME}")
    return value
