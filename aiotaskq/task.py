"""Tasks as the caller sees them: registered functions, calls, and the options of a call."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import datetime, timedelta
from typing import (
    Any,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)

import msgspec

from aiotaskq import bridge
from aiotaskq.arguments import Arguments
from aiotaskq.errors import ConfigError
from aiotaskq.handle import AsyncResult, TaskHandle
from aiotaskq.retry import NEVER, Retry

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)  # so that calls of several types fit one list

Executor: TypeAlias = Literal["loop", "thread", "process"]


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
    retry: Retry
    headers: Mapping[str, str]


class Call(msgspec.Struct, Generic[R_co], frozen=True):
    """A task with its arguments, checked and not yet sent: what `task.s(...)` returns."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: CallOptions


class Sender(Protocol):
    """What a task asks of its application."""

    async def send_call(self, call: Call[R]) -> TaskHandle[R]:
        """Store one call at the broker."""
        ...

    def async_result(self, task_id: str) -> AsyncResult[Any]:
        """Return the sync grip on a sent task."""
        ...


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a task runs, as given where it is defined."""

    executor: Executor = "loop"
    queue: str | None = None
    priority: int | None = None
    timeout: float | None = None  # seconds
    retry: Retry = NEVER
    ignore_result: bool | None = None  # None: as the application says
    track_started: bool | None = None  # likewise


class _Callable(Generic[P, R]):
    """The ways to call a task, with the options it is called with."""

    def __init__(
        self, sender: Sender, name: str, arguments: Arguments, options: CallOptions
    ) -> None:
        self._sender = sender
        self._name = name
        self._arguments = arguments
        self._options = options

    async def kiq(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Send the task; on return it is stored.

        Raises:
            TypeError: The call does not fit the task's signature.
            EncodeError: An argument has no form in the serializer, or all are too large.
            BrokerUnavailable: The broker could not be reached for `broker_publish_timeout`.
            Unsupported: The broker cannot do what an option asks.
        """
        return await self._sender.send_call(self._call(args, kwargs))

    def s(self, /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Return the call without sending it, for `app.kiq_many`.

        Raises:
            TypeError: The call does not fit the task's signature.
        """
        return self._call(args, kwargs)

    def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send the task from plain code; on return it is stored. From any thread.

        Raises:
            RuntimeError: An event loop runs in this thread: use ``await task.kiq()``.
            TypeError, EncodeError, BrokerUnavailable, Unsupported: As `kiq` does.
        """
        return self._send_and_wait(self._call(args, kwargs))

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], options: CallOptions | None = None
    ) -> Call[R]:
        self._arguments.check(args, kwargs)
        return Call(self._name, args, kwargs, self._options if options is None else options)

    def _send_and_wait(self, call: Call[R]) -> AsyncResult[R]:
        handle = bridge.run(self._sender.send_call(call), instead="`await task.kiq()`")
        return self._sender.async_result(handle.id)


class ConfiguredTask(_Callable[P, R]):
    """A task with options for its next calls: what `task.with_options(...)` returns."""


class Task(_Callable[P, R]):
    """A registered function.

    Attributes:
        name: What it is registered under, ``module.function`` by default.
        fn: The function itself.
        arguments: Its parameters.
        options: How it runs.
    """

    def __init__(
        self, fn: Callable[P, Any], *, sender: Sender, name: str, options: TaskOptions
    ) -> None:
        arguments = Arguments(fn)
        super().__init__(sender, name, arguments, {})
        self.name = name
        self.fn = fn
        self.arguments = arguments
        self.options = options
        self.__name__ = getattr(fn, "__name__", name)
        self.__qualname__ = getattr(fn, "__qualname__", name)
        self.__module__ = fn.__module__
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def with_options(self, **options: Unpack[CallOptions]) -> ConfiguredTask[P, R]:
        """Return the task with options for its calls; the task itself stays as it is.

        Example:
            ``await add.with_options(countdown=10, queue="slow").kiq(2, 8)``
        """
        return ConfiguredTask(self._sender, self.name, self.arguments, check_options(options))

    def apply_async(
        self,
        args: tuple[Any, ...] | list[Any] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncResult[R]:
        """Send the task from plain code with options, in the shape that Celery users know."""
        return self._send_and_wait(
            self._call(check_args(args), dict(kwargs or {}), check_options(options))
        )

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class CoroutineTask(Task[P, R]):
    """A task whose function is a coroutine function; it runs on the worker's event loop."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run the function here and now; sends nothing."""
        return self.fn(*args, **kwargs)  # type: ignore[no-any-return]  # a coroutine of R: see TaskQueue.task


class FunctionTask(Task[P, R]):
    """A task whose function is a plain one; it runs in a thread or in a process."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here and now; sends nothing."""
        return self.fn(*args, **kwargs)  # type: ignore[no-any-return]  # R: see TaskQueue.task


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
    return cast("CallOptions", given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for item in value.items() for text in item
    )


_NAME = "1 to 200 printable characters"

_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
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
    "task_id": (lambda value: _is_name(str(value)), _NAME),
    "timeout": (lambda value: _is_number(value) and value > 0, "seconds, more than 0"),
}


def unknown_option(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an option that does not exist, with the nearest that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f", did you mean {near[0]}" if near else ""
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
