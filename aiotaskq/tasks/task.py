"""Tasks: registered functions that can be called here, or sent to a worker."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from types import MethodType
from typing import Any, Generic, ParamSpec, TypeVar, Unpack

from aiotaskq import bridge
from aiotaskq.errors import ConfigError
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.arguments import Arguments
from aiotaskq.tasks.bound import BoundTask
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.handle import AsyncResult, TaskHandle
from aiotaskq.tasks.options import (
    CallOptions,
    TaskOptions,
    check_args,
    check_call_options,
    check_limits,
)

P = ParamSpec("P")
R = TypeVar("R")


class _Callable(Generic[P, R]):
    """The ways to send a task, with the options of its calls."""

    def __init__(
        self, app: Application, name: str, arguments: Arguments, options: CallOptions
    ) -> None:
        self._app = app
        self._name = name
        self._arguments = arguments
        self._options = options

    async def kiq(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Send the task; when this returns, it is stored.

        Raises:
            TypeError: The call does not fit the signature of the task.
            EncodeError: An argument has no form in the serializer, or all are too large.
            BrokerUnavailable: The broker could not be reached for `broker_publish_timeout`.
            Unsupported: The broker lacks a trait that an option needs.
        """
        return await self._send(self._call(args, kwargs))

    def s(self, /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Return the call without sending it, for `app.kiq_many`.

        Raises:
            TypeError: The call does not fit the signature of the task.
        """
        return self._call(args, kwargs)

    def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send the task from plain code, in any thread; when this returns, it is stored.

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
        return AsyncResult(handle.id, self._app, call.name)

    async def _send(self, call: Call[R]) -> TaskHandle[R]:
        (task_id,) = await self._app.publish_calls([call])
        return TaskHandle(task_id, self._app, call.name)


class ConfiguredTask(_Callable[P, R]):
    """A task with options for its calls; `task.with_options(...)` returns one."""


class Task(_Callable[P, R], BoundTask):
    """A registered function."""

    def __init__(
        self, fn: Callable[..., Any], *, app: Application, name: str, options: TaskOptions
    ) -> None:
        self.name = name  # first of all, so that errors can show the task
        self.call: Callable[..., Any] = MethodType(fn, self) if options.bind else fn
        arguments = Arguments(self.call, name)
        super().__init__(app, name, arguments, {})
        self.fn = fn
        self.arguments = arguments
        self.options = options
        self.__name__ = getattr(fn, "__name__", name)
        self.__qualname__ = getattr(fn, "__qualname__", name)
        self.__module__ = getattr(fn, "__module__", None) or type(fn).__module__
        self.__doc__ = fn.__doc__
        self.__wrapped__ = self.call

    def with_options(self, **options: Unpack[CallOptions]) -> ConfiguredTask[P, R]:
        """Return the task with options for its calls; the task itself is not changed.

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
        """Send the task from plain code with options, as in Celery."""
        return self._send_and_wait(
            self._call(check_args(args), dict(kwargs or {}), self.check_options(options))
        )

    def check_options(self, options: CallOptions) -> CallOptions:
        """Return the options for a call of this task that are not None.

        Raises:
            ConfigError: One is wrong, or makes no sense for this task.
        """
        checked = check_call_options(options)
        if "soft_timeout" in checked:
            check_limits(checked["soft_timeout"], checked.get("timeout", self.options.timeout))
        return checked

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class CoroutineTask(Task[P, R]):
    """A task whose function is a coroutine function; it runs on the worker's event loop."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function here, without sending anything."""
        return self.call(*args, **kwargs)  # type: ignore[no-any-return]  # a coroutine of R: see TaskQueue.task


class FunctionTask(Task[P, R]):
    """A task whose function is a plain one; it runs in a thread or in a process."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function here, without sending anything."""
        return self.call(*args, **kwargs)  # type: ignore[no-any-return]  # R: see TaskQueue.task
