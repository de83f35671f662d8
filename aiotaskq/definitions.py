"""What an application is made of: tasks, middleware, observers, lifespans."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar, overload

from aiotaskq.context import State
from aiotaskq.errors import DuplicateTask
from aiotaskq.events import Event, Observer, Observers
from aiotaskq.handle import AsyncResult, TaskHandle
from aiotaskq.middleware import Middleware
from aiotaskq.retry import NEVER, Retry
from aiotaskq.task import (
    Call,
    CoroutineTask,
    Executor,
    FunctionTask,
    Task,
    TaskOptions,
    check_name,
    check_options,
    choose_executor,
    unknown_option,
)
from aiotaskq.worker import Lifespan

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Event)

Hook: TypeAlias = Callable[[State], Awaitable[None]]


class TaskDecorator(Protocol):
    """What ``@app.task(...)`` returns."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a coroutine function is a plain one too; the first match counts
        self, fn: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CoroutineTask[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> FunctionTask[P, R]: ...


class Definitions(ABC):
    """The part of a `TaskQueue` that its decorators fill."""

    def __init__(self, name: str, middlewares: Iterable[Middleware]) -> None:
        self.name = name
        self.tasks: dict[str, Task[Any, Any]] = {}
        self.middlewares: list[Middleware] = list(middlewares)
        self.observers = Observers()
        self.lifespans: list[Lifespan] = []

    @abstractmethod
    async def send_call(self, call: Call[R]) -> TaskHandle[R]:
        """Send what ``task.s(...)`` returned; on return it is stored."""

    @abstractmethod
    def async_result(self, task_id: str) -> AsyncResult[Any]:
        """Return the grip on a task that was sent elsewhere, for plain code."""

    @overload
    def task(  # type: ignore[overload-overlap]  # as for TaskDecorator
        self, fn: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CoroutineTask[P, R]: ...
    @overload
    def task(self, fn: Callable[P, R], /) -> FunctionTask[P, R]: ...
    @overload
    def task(
        self,
        *,
        name: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        timeout: float | None = None,
        retry: Retry = NEVER,
        executor: Executor | None = None,
        ignore_result: bool | None = None,
        track_started: bool | None = None,
    ) -> TaskDecorator: ...

    def task(self, *fn: Callable[..., Any], **options: Any) -> Any:
        """Register a function as a task.

        Args:
            *fn: A coroutine function, which will run on the worker's event loop, or a plain one.
            **options: Those that follow.
            name: By default ``module.function``.
            queue: By default the route in `task_routes`, else `task_default_queue`.
            priority: 0 to 9, 9 first.
            timeout: Seconds that one run may take; a coroutine is cancelled then. By default
                `task_time_limit`.
            retry: When it runs again after a failure; by default never.
            executor: Of a plain function: ``"thread"``, the default, or ``"process"``.
            ignore_result: Keep no result; by default `task_ignore_result`.
            track_started: Let its status say STARTED while it runs; by default
                `task_track_started`.

        Raises:
            DuplicateTask: The name is taken.
            ConfigError: The function cannot run where it is asked to.
        """
        register = partial(self._register, **options)
        return register(*fn) if fn else register

    def _register(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        executor: str | None = None,
        **options: Any,
    ) -> Task[..., Any]:
        for option in options.keys() - TaskOptions.__struct_fields__:
            raise unknown_option(option, ("name", *TaskOptions.__struct_fields__))
        check_options({k: options.get(k) for k in ("queue", "priority", "timeout", "retry")})  # type: ignore[arg-type]  # a part of CallOptions
        chosen = choose_executor(fn, executor)
        name = check_name(
            "a task's name",
            f"{self._module_of(fn)}.{fn.__qualname__}" if name is None else name,
        )
        kind = CoroutineTask if chosen == "loop" else FunctionTask
        task: Task[..., Any] = kind(
            fn, sender=self, name=name, options=TaskOptions(executor=chosen, **options)
        )
        known = self.tasks.get(name)
        if known is not None and not _same_source(known.fn, fn):
            raise DuplicateTask(
                f"a task named {name} is registered already, for {_source(known.fn)}; give"
                f" {_source(fn)} another one: @app.task(name=...)"
            )
        self.tasks[name] = task
        return task

    def _module_of(self, fn: Callable[..., Any]) -> str:
        """Return the module's name as a worker that imports it will know it."""
        # Multiprocessing calls the main module by the latter in the processes it starts.
        if fn.__module__ not in ("__main__", "__mp_main__"):
            return fn.__module__
        main = getattr(inspect.unwrap(fn), "__globals__", {})
        spec, file = main.get("__spec__"), main.get("__file__")
        if spec is not None:
            return str(spec.name)
        return Path(file).stem if file else self.name

    def add_middleware(self, middleware: Middleware) -> None:
        """Put one more middleware around each send and each run, innermost."""
        self.middlewares.append(middleware)

    def on(self, kind: type[E]) -> Callable[[Observer[E]], Observer[E]]:
        """Register an observer of one kind of event.

        Example:
            ::

                @app.on(events.Failed)
                def count(event: events.Failed) -> None:
                    failures.labels(event.message.task).inc()
        """

        def register(observer: Observer[E]) -> Observer[E]:
            self.observers.add(kind, observer)
            return observer

        return register

    def lifespan(
        self, function: Callable[[State], AsyncIterator[None]]
    ) -> Callable[[State], AsyncIterator[None]]:
        """Register what a worker does around its life: an async generator that yields once.

        What it puts on `state` is there for the tasks as ``current_task().state``. Several
        run in the order of their registration, and end in the reverse order.

        Example:
            ::

                @app.lifespan
                async def database(state: State) -> AsyncIterator[None]:
                    async with asyncpg.create_pool(DSN) as state.pool:
                        yield
        """
        self.lifespans.append(asynccontextmanager(function))
        return function

    def on_startup(self, hook: Hook) -> Hook:
        """Register a coroutine function that each worker awaits before it takes tasks."""

        @asynccontextmanager
        async def life(state: State) -> AsyncIterator[None]:
            await hook(state)
            yield

        self.lifespans.append(life)
        return hook

    def on_shutdown(self, hook: Hook) -> Hook:
        """Register a coroutine function that each worker awaits after its last task."""

        @asynccontextmanager
        async def life(state: State) -> AsyncIterator[None]:
            try:
                yield
            finally:
                await hook(state)

        self.lifespans.append(life)
        return hook


def _source(fn: Callable[..., Any]) -> str:
    code = getattr(fn, "__code__", None)
    return fn.__qualname__ if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _same_source(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether both are the same lines of a file, as after reloading a module."""
    if "<locals>" in one.__qualname__:
        return one is other  # another call of the function around it may have made another one
    return _source(one) == _source(other) and one.__qualname__ == other.__qualname__
