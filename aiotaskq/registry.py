"""The registry of an application: its tasks, middleware, observers and lifespans."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    Unpack,
    overload,
)

from aiotaskq.config import Config
from aiotaskq.context import Lifespan, State
from aiotaskq.errors import ConfigError, DuplicateTask
from aiotaskq.events import Event, Observer, Observers
from aiotaskq.middleware import Middleware
from aiotaskq.recurrence import Entry
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.effective import EffectiveOptions
from aiotaskq.tasks.option_table import check_name
from aiotaskq.tasks.options import TaskKeywords, task_options
from aiotaskq.tasks.redefinition import is_redefinition, source
from aiotaskq.tasks.task import CoroutineTask, FunctionTask, Task

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Event)

_MOST_NAMES = 1000  # names up to which the options of unregistered tasks are kept

Hook: TypeAlias = Callable[[State], Awaitable[None]]


class TaskDecorator(Protocol):
    """The decorator that ``@app.task(...)`` returns."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a coroutine function is a plain one too; the first match counts
        self, fn: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CoroutineTask[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> FunctionTask[P, R]: ...


class BoundTaskDecorator(Protocol):
    """The decorator of ``@app.task(bind=True, ...)``: callers leave the first argument out."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # as for TaskDecorator
        self, fn: Callable[Concatenate[Task[..., Any], P], Coroutine[Any, Any, R]], /
    ) -> CoroutineTask[P, R]: ...
    @overload
    def __call__(
        self, fn: Callable[Concatenate[Task[..., Any], P], R], /
    ) -> FunctionTask[P, R]: ...


class TaskRegistry(ABC):
    """The part of a `TaskQueue` that is filled by its decorators."""

    conf: Config

    def __init__(self, name: str, middlewares: Iterable[Middleware]) -> None:
        self.name = name
        self.tasks: dict[str, Task[Any, Any]] = {}
        self.middlewares: list[Middleware] = list(middlewares)
        self.observers = Observers()
        self.lifespans: list[Lifespan] = []
        self._effective: dict[str, tuple[object, EffectiveOptions]] = {}

    @property
    @abstractmethod
    def _application(self) -> Application:
        """The application that the tasks belong to: the `TaskQueue` that this is a part of."""

    @overload
    def task(  # type: ignore[overload-overlap]  # as for TaskDecorator
        self, fn: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CoroutineTask[P, R]: ...
    @overload
    def task(self, fn: Callable[P, R], /) -> FunctionTask[P, R]: ...
    @overload
    def task(
        self, *, bind: Literal[True], **options: Unpack[TaskKeywords]
    ) -> BoundTaskDecorator: ...
    @overload
    def task(
        self, *, bind: Literal[False] = False, **options: Unpack[TaskKeywords]
    ) -> TaskDecorator: ...

    def task(self, *fn: Callable[..., Any], **options: Any) -> Any:
        """Register a function as a task.

        Args:
            *fn: A coroutine function, which runs on the worker's event loop, or a plain function.
            **options: The options that follow.
            name: The name that the task is registered under; by default ``module.function``.
            bind: Whether the function gets its task as the first argument, ``self``, which callers
                leave out: for ``self.request`` and ``self.retry()``.
            queue: The queue. By default the route of the task's name in `task_routes`, else
                `task_default_queue`.
            priority: 0 to 9 within the queue, 9 runs first. By default `task_default_priority`.
            timeout: Seconds that one run may take. A coroutine is cancelled then, a process of the
                pool ended, and in a thread `TimeLimitExceeded` is raised. By default
                `task_time_limit`.
            time_limit: Celery's name of `timeout`.
            soft_timeout: Seconds after which `SoftTimeLimitExceeded` is raised inside a run, so
                that it can come to an end by itself. By default `task_soft_time_limit`.
            soft_time_limit: Celery's name of `soft_timeout`.
            retry: When the task runs again after a failure. By default `task_default_retry`.
            executor: Where a plain function runs: ``"thread"`` or ``"process"``. By default
                `task_default_executor`. Coroutine functions run on the event loop.
            ignore_result: Whether no result is kept. By default `task_ignore_result`.
            track_started: Whether the status says STARTED while the task runs. By default
                `task_track_started`.
            schedule: The times at which a scheduler sends the task by itself: a `Schedule`, or the
                `when` of one, such as ``crontab(hour=3, minute=0)``.
            autoretry_for: The exceptions after which the task runs again. This option and the seven
                that follow are Celery's, and take the place of `retry`.
            dont_autoretry_for: Exceptions after which the task does not run again, even where
                `autoretry_for` names a base class of theirs.
            max_retries: The most further attempts, 3 by default; None: without limit. It also holds
                for ``self.retry()``.
            default_retry_delay: Seconds before another attempt, 180 by default. It also holds for
                ``self.retry()``.
            retry_backoff: Seconds before the first retry (True: 1), doubled for each further one,
                in place of a constant delay.
            retry_backoff_max: The longest delay in seconds when `retry_backoff` is given, 600 by
                default.
            retry_jitter: Whether a delay of `retry_backoff` is shortened by a random part, as it is
                by default.
            retry_kwargs: ``max_retries`` and ``countdown``, the delay, in one mapping.
            acks_late: May be True: a task is settled only after it has run.
            reject_on_worker_lost: May be True: a task whose worker died runs again.

        Raises:
            DuplicateTask: The name is taken.
            ConfigError: An option is wrong, or the function cannot run where it is asked to.
        """
        register = partial(self._register, **options)
        return register(*fn) if fn else register

    def _register(
        self, fn: Callable[..., Any], *, name: str | None = None, **given: Any
    ) -> Task[..., Any]:
        fn = _plain_callable(fn)
        options = task_options(fn, given)
        if name is None:
            if not hasattr(fn, "__qualname__"):
                raise ConfigError(f"{fn!r} has no name of its own: give one, app.task(name=...)")
            name = f"{self._module_of(fn)}.{fn.__qualname__}"
        name = check_name("a task's name", name)
        kind = CoroutineTask if options.executor == "loop" else FunctionTask
        task: Task[..., Any] = kind(fn, app=self._application, name=name, options=options)
        known = self.tasks.get(name)
        if known is not None and not is_redefinition(known.fn, fn):
            raise DuplicateTask(
                f"a task named {name} is registered already, for {source(known.fn)}; give"
                f" {source(fn)} another one: @app.task(name=...)"
            )
        self.tasks[name] = task
        self._effective.pop(name, None)  # of an earlier state of a module that was reloaded
        return task

    def effective_options(self, name: str) -> EffectiveOptions:
        """Return the options of a task where a call gives none: its own, else the settings."""
        revision = self.conf.revision
        kept = self._effective.get(name)
        if kept is not None and kept[0] is revision:
            return kept[1]
        task = self.tasks.get(name)
        options = EffectiveOptions.of(name, task, self.conf)
        # Programs send tasks by name that they do not register; and anybody can send other names.
        if task is not None or len(self._effective) < _MOST_NAMES:
            self._effective[name] = revision, options
        return options

    def declared_schedules(self) -> dict[str, Entry]:
        """Return the schedules of the code and of the setting `beat_schedule`, by id.

        The schedule of a task, given where the task is defined, has the name of the task as its id.
        """
        declared = dict(self.conf.beat_schedule)
        for name, task in self.tasks.items():
            if task.options.schedule is not None:
                if name in declared:
                    raise ConfigError(
                        f"beat_schedule has a {name!r}, and the task of this name has a schedule of"
                        " its own: rename the one in beat_schedule"
                    )
                declared[name] = Entry(name, task.options.schedule)
        return declared

    def _module_of(self, fn: Callable[..., Any]) -> str:
        """Return the name of a function's module in a worker that imports it."""
        # `__mp_main__` is the main module in a process that multiprocessing has spawned.
        if fn.__module__ not in ("__main__", "__mp_main__"):
            return fn.__module__
        main = getattr(inspect.unwrap(fn), "__globals__", {})
        spec, file = main.get("__spec__"), main.get("__file__")
        if spec is not None:
            return str(spec.name)
        return Path(file).stem if file else self.name

    def add_middleware(self, middleware: Middleware) -> None:
        """Add a middleware around each send and each run, inside the others."""
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
        """Register an async generator that runs around the life of a worker, and yields once.

        Tasks find the attributes that it sets on `state` in ``current_task().state``. Several
        lifespans begin in the order of their registration, and end in the reverse order.

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


def _plain_callable(fn: Any) -> Any:
    """Return the callable that a task may have for its function.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(fn, staticmethod):
        return fn.__func__
    if isinstance(fn, classmethod):
        raise ConfigError(
            f"{fn.__func__.__qualname__} is a class method, which has no class here yet; register"
            " it below the class: app.task(name=...)(TheClass.method)"
        )
    if isinstance(fn, Task):
        raise ConfigError(f"{fn.name} is a task already")
    return fn
