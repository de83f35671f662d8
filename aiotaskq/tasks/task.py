"""Tasks as the caller sees them: registered functions and calls, and a bound task's own view."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import datetime
from types import MethodType
from typing import Any, ClassVar, Generic, NoReturn, ParamSpec, TypeVar, Unpack
from zoneinfo import ZoneInfo

from aiotaskq import bridge
from aiotaskq.context import TaskContext, find_task
from aiotaskq.errors import ConfigError, MaxRetriesExceededError, RetryLater
from aiotaskq.retry import for_call, retry_of
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.arguments import Arguments
from aiotaskq.tasks.bound import Request, request_of
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.tasks.handle import AsyncResult, TaskHandle
from aiotaskq.tasks.options import (
    CELERY_DELAY,
    CELERY_RETRIES,
    CallOptions,
    TaskOptions,
    check_args,
    check_limits,
    check_options,
    check_soft,
)

P = ParamSpec("P")
R = TypeVar("R")


class _Callable(Generic[P, R]):
    """The ways to call a task, with the options it is called with."""

    def __init__(
        self, app: Application, name: str, arguments: Arguments, options: CallOptions
    ) -> None:
        self._app = app
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
        return await self._send(self._call(args, kwargs))

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
        if "connection" in call.options:
            raise ConfigError(
                "connection= belongs to an event loop of yours: send with `await task.kiq()`"
            )
        handle = bridge.run(self._send(call), instead="`await task.kiq()`")
        return AsyncResult(handle.id, self._app)

    async def _send(self, call: Call[R]) -> TaskHandle[R]:
        (task_id,) = await self._app.publish_calls([call])
        return TaskHandle(task_id, self._app)


class ConfiguredTask(_Callable[P, R]):
    """A task with options for its next calls: what `task.with_options(...)` returns."""


class Task(_Callable[P, R], TaskDefinition):
    """A registered function."""

    MaxRetriesExceededError: ClassVar[type[MaxRetriesExceededError]] = MaxRetriesExceededError

    def __init__(
        self, fn: Callable[..., Any], *, app: Application, name: str, options: TaskOptions
    ) -> None:
        self.name = name  # first of all, so that errors can show the task
        self.call: Callable[..., Any] = MethodType(fn, self) if options.bind else fn
        arguments = Arguments(self.call)
        super().__init__(app, name, arguments, {})
        self.fn = fn
        self.arguments = arguments
        self.options = options
        self.__name__ = getattr(fn, "__name__", name)
        self.__qualname__ = getattr(fn, "__qualname__", name)
        self.__module__ = fn.__module__
        self.__doc__ = fn.__doc__
        self.__wrapped__ = self.call

    def with_options(self, **options: Unpack[CallOptions]) -> ConfiguredTask[P, R]:
        """Return the task with options for its calls; the task itself stays as it is.

        Example:
            ``await add.with_options(countdown=10, queue="slow").kiq(2, 8)``
        """
        return ConfiguredTask(self._app, self.name, self.arguments, self.check_options(options))

    def apply_async(
        self,
        args: tuple[Any, ...] | list[Any] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncResult[R]:
        """Send the task from plain code with options, in the shape that Celery users know."""
        return self._send_and_wait(
            self._call(check_args(args), dict(kwargs or {}), self.check_options(options))
        )

    def check_options(self, options: CallOptions) -> CallOptions:
        """Return the options for a call of this task that are not None.

        Raises:
            ConfigError: One is wrong, or makes no sense for this task.
        """
        checked = check_options(options)
        if "soft_timeout" in checked:
            check_soft(self.name, checked["soft_timeout"], self.options.executor)
            check_limits(checked["soft_timeout"], checked.get("timeout", self.options.timeout))
        return checked

    # What a bound task finds in `self`, in Celery's words

    @property
    def request(self) -> Request:
        """The run that this is called in."""
        context = self._context()
        return request_of(context, self._limits(context))

    @property
    def max_retries(self) -> int | None:
        """How often a run may be tried again; None: without limit."""
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
        """Ask for another attempt of the run that this is called in, with the same arguments.

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
            exc: What it failed with: raised instead, if there are no attempts left.
            throw: Raise the request. Otherwise it is returned, and the task has to raise it.
            eta: When to run again; a naive one is taken in the application's `timezone`.
            countdown: Seconds until then. By default `default_retry_delay`, else as the task's
                `Retry` says; a task with neither waits for three minutes.
            max_retries: How often a run may be tried again, the first time not counted. By default
                as the task's option or its `Retry` says; a task with neither has three.

        Raises:
            RetryLater: What the worker understands.
            MaxRetriesExceededError: No attempts are left, and `exc` was not given.
            RuntimeError: No worker runs this task here, and `exc` was not given.
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
        if throw:
            raise later
        return later

    def _context(self) -> TaskContext | None:
        """Return the context of this task's run, and not that of one which called its function."""
        context = find_task()
        return context if context is not None and context.name == self.name else None

    def _limits(self, context: TaskContext | None) -> tuple[float | None, float | None]:
        conf, options = self._app.conf, self.options
        hard = conf.task_time_limit if options.timeout is None else options.timeout
        soft = conf.task_soft_time_limit if options.soft_timeout is None else options.soft_timeout
        if context is not None:
            hard = hard if context.timeout is None else context.timeout
            soft = soft if context.soft_timeout is None else context.soft_timeout
        return hard, None if options.executor == "thread" else soft

    def _retries(self, context: TaskContext | None = None) -> tuple[float, float | None]:
        """Return how often a run may be tried again, and after how many seconds, if that is said.

        What a call asked for goes before what the task says, and that before the application's
        default. Where nothing is said, it is as in Celery.
        """
        own = retry_of(self.options.retry, self._app.conf.task_default_retry)
        if context is not None and context.retry is not None:
            return for_call(context.retry, own).max_attempts - 1, None
        if self.options.retry is None and self._app.conf.task_default_retry is None:
            return CELERY_RETRIES, CELERY_DELAY
        return own.max_attempts - 1, self.options.default_retry_delay

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class CoroutineTask(Task[P, R]):
    """A task whose function is a coroutine function; it runs on the worker's event loop."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run the function here and now; sends nothing."""
        return self.call(*args, **kwargs)  # type: ignore[no-any-return]  # a coroutine of R: see TaskQueue.task


class FunctionTask(Task[P, R]):
    """A task whose function is a plain one; it runs in a thread or in a process."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here and now; sends nothing."""
        return self.call(*args, **kwargs)  # type: ignore[no-any-return]  # R: see TaskQueue.task


def _raise(error: BaseException) -> NoReturn:
    """Raise an error with what is handled now as its cause, unless that is it."""
    handled = sys.exception()
    if handled is None or handled is error:
        raise error
    raise error from handled


def _reason(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"
