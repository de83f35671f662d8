"""`TaskQueue`: the application object, which puts all parts together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack
from weakref import WeakSet

from aiotaskq import bridge, forks, native
from aiotaskq.client.cancel import cancel_task
from aiotaskq.client.dead_letters import DeadLetters
from aiotaskq.client.outbox import QUEUE as OUTBOX
from aiotaskq.client.outbox import Outbox
from aiotaskq.client.schedule_store import create_schedule_broker
from aiotaskq.client.send import send_calls
from aiotaskq.client.session import Session
from aiotaskq.config import Config
from aiotaskq.contract.broker import Broker, Transactional
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.records import WorkerInfo, read_worker_info
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.drivers import EMBEDDED, create_backend, create_broker
from aiotaskq.drivers.common.url import shown_url
from aiotaskq.encoding.codec import Codec
from aiotaskq.errors import BatchRefused, ConfigError
from aiotaskq.middleware import Middleware
from aiotaskq.registry import TaskRegistry
from aiotaskq.scheduling.schedules import Schedules
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.handle import AsyncResult, TaskHandle
from aiotaskq.tasks.option_table import check_name
from aiotaskq.tasks.options import CallOptions, check_args, check_call_options
from aiotaskq.tasks.result import TaskResult, read_outcome

if TYPE_CHECKING:
    from aiotaskq.scheduling.scheduler import Scheduler
    from aiotaskq.worker import Worker

R = TypeVar("R")


class TaskQueue(TaskRegistry):
    """An application: its tasks, its broker, its result backend and its settings.

    It may be used from any number of event loops and threads. Each event loop gets connections of
    its own, made at the first use.

    Args:
        name: The name of the application; the names of tasks that are defined in an interactive
            session begin with it.
        broker: A URL or a driver. By default the setting `broker_url`, which the environment
            variable ``AIOTASKQ_BROKER_URL`` sets, else an SQLite file ``aiotaskq.db`` in the
            working folder.
        backend: A URL or a driver. By default the setting `result_backend`, which the environment
            variable ``AIOTASKQ_RESULT_BACKEND`` sets, else the broker's own store.
        middlewares: Middleware around each send and each run, the first one outermost.
        settings: Settings, by name; see `conf`.

    Example:
        ::

            app = TaskQueue("tasks", broker="redis://localhost:6379/0")

            @app.task
            async def add(x: int, y: int) -> int:
                return x + y
    """

    def __init__(
        self,
        name: str = "tasks",
        *,
        broker: str | Broker | None = None,
        backend: str | ResultBackend | None = None,
        middlewares: Iterable[Middleware] = (),
        **settings: Any,
    ) -> None:
        for what, given in (("broker", broker), ("backend", backend)):
            _check_driver(what, given)
        if "://" in name:
            raise ConfigError(
                "the first argument of TaskQueue is its name; a URL is given as broker=..."
            )
        super().__init__(name, middlewares)
        self.conf = Config()
        self.conf.update(settings)
        self._broker = broker
        self._backend = backend
        self._templates: tuple[Broker, ResultBackend | None] | None = None
        self._lock = native.make_lock()
        self._codec: Codec | None = None
        self._sessions: dict[asyncio.AbstractEventLoop, Session] = {}
        _apps.add(self)

    @property
    def _application(self) -> Self:
        return self

    # Configure

    def config_from_object(self, source: object, *, namespace: str | None = None) -> None:
        """Read settings from a module, a class or a mapping, or from one's dotted name.

        Args:
            source: Names may be Celery's lower-case ones or its old upper-case ones.
            namespace: Read only names that begin with it, as in ``CELERY_BROKER_URL``.

        Raises:
            ConfigError: A name is unknown, a value is wrong, or asks for an unsupported feature.
        """
        self.conf.load(source, namespace=namespace)

    def import_tasks(self) -> None:
        """Import the modules that the settings `imports` and `include` name.

        A worker does it when it starts, so that tasks in modules that nothing else imports are
        registered.

        Raises:
            ConfigError: There is no such module.
        """
        for name in (*self.conf.imports, *self.conf.include):
            try:
                import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise
                raise ConfigError(
                    f"the setting imports names {name}, and there is no such module"
                ) from error

    @property
    def codec(self) -> Codec:
        """The codec of messages and results, made from the settings at the first use."""
        if self._codec is None:
            for setting in ("task_serializer", "result_serializer"):
                if self.conf[setting] not in self.conf.accept_content:
                    raise ConfigError(
                        f"{setting} is {self.conf[setting]!r}, which accept_content does not name:"
                        f" what is written would be refused. accept_content ="
                        f" {[*self.conf.accept_content, self.conf[setting]]}"
                    )
            self._codec = Codec(
                task_serializer=self.conf.task_serializer,
                result_serializer=self.conf.result_serializer,
                accept=self.conf.accept_content,
                max_payload=self.conf.max_payload_size,
                max_result=self.conf.max_result_size,
            )
        return self._codec

    def drivers(self) -> tuple[Broker, ResultBackend | None]:
        """Return new closed drivers of this application, for one event loop.

        Raises:
            ConfigError: No driver serves a URL.
        """
        with self._lock:  # two brokers made from one memory:// would have nothing in common
            if self._templates is None:
                broker = self._choose_broker()
                if isinstance(broker, str):
                    broker = create_broker(broker, prefix=self.conf.prefix)
                self._templates = broker, self._create_backend(broker)
        broker, backend = self._templates
        return broker.clone(), backend and backend.clone()

    def outbox_broker(self) -> Broker | None:
        """Return the closed broker that stores the outbox, for one event loop; None without one."""
        url = self.conf.outbox_url
        if url is None:
            return None
        broker = create_broker(url, prefix=f"{self.conf.prefix}_{OUTBOX}")
        if not isinstance(broker, Transactional):
            raise ConfigError(f"outbox_url is {broker.url}; it must be a PostgreSQL database")
        return broker

    def schedule_broker(self) -> Broker | None:
        """Return the closed broker that stores the schedules; None: the broker itself does."""
        return create_schedule_broker(
            self.conf, self.drivers()[0], self._backend or self.conf.result_backend
        )

    @property
    def broker_url(self) -> str | None:
        """The URL of the broker with its password; None where the broker is a driver object."""
        broker = self._choose_broker()
        return broker if isinstance(broker, str) else None

    def _choose_broker(self) -> str | Broker:
        return self._broker or self.conf.broker_url or EMBEDDED

    @property
    def is_shared(self) -> bool:
        """Return whether other processes reach the broker."""
        return self.drivers()[0].traits.shared

    @property
    def keeps_results(self) -> bool:
        """Return whether there is a result backend."""
        return self.drivers()[1] is not None

    def _create_backend(self, broker: Broker) -> ResultBackend | None:
        backend = self._backend or self.conf.result_backend
        if backend is None:
            return broker.backend()
        if not isinstance(backend, str):
            return backend
        if backend.startswith("disabled"):
            return None
        if backend.startswith("rpc:"):
            backend = self._rpc_url()
        return create_backend(backend, prefix=self.conf.prefix)

    def _rpc_url(self) -> str:
        url = self.broker_url
        if url is None or not url.startswith(("amqp://", "amqps://")):
            raise ConfigError(
                "rpc:// sends results over the broker's RabbitMQ, and the broker is another: give"
                " the RabbitMQ that they are to go over, result_backend = 'amqp://...'"
            )
        return url

    # Send

    async def send_call(self, call: Call[R]) -> TaskHandle[R]:
        """Send a call, such as ``task.s(...)`` returns; when this returns, it is stored."""
        (handle,) = await self.kiq_many([call])
        return handle

    async def kiq_many(self, calls: Iterable[Call[R]]) -> list[TaskHandle[R]]:
        """Send many calls in one round trip; when this returns, all are stored.

        Where a middleware wraps the sending, the calls go through it one by one.

        Args:
            calls: Calls such as ``task.s(...)`` and ``task.with_options(...).s(...)`` return.

        Raises:
            EncodeError: An argument has no form in the serializer, or the arguments of a call are
                too large. No call is sent then, unless a middleware wraps the sending.
            Unsupported: The broker does not support an option of a call; no call is sent.
            BatchRefused: The broker refused some of the calls, which are not stored; all others
                are. `errors` has the reasons, and `answer` the handles of all, both by position.
            BrokerUnavailable: The broker could not be reached; some may be stored.
        """
        calls = list(calls)

        def handles(ids: Iterable[str]) -> list[TaskHandle[R]]:
            pairs = zip(ids, calls, strict=True)
            return [TaskHandle(task_id, self, call.name) for task_id, call in pairs]

        try:
            return handles(await self.publish_calls(calls))
        except BatchRefused as error:
            error.answer = handles(error.answer)
            raise

    async def publish_calls(self, calls: Iterable[Call[Any]]) -> list[str]:
        """Send many calls as `kiq_many` does, and return the ids of their tasks."""
        return await send_calls(self, await self._open_session(), calls)

    async def send(
        self,
        name: str,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> TaskHandle[Any]:
        """Send a task by its name, without importing it; when this returns, it is stored.

        Where the task is registered here, the arguments are checked against its signature.
        """
        return await self.send_call(self._call_by_name(name, args, kwargs, options))

    def send_task(
        self,
        name: str,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncResult[Any]:
        """Send a task by its name from plain code; when this returns, it is stored."""
        call = self._call_by_name(name, args, kwargs, options)
        handle = bridge.run(self.send_call(call), instead="`await app.send(...)`")
        return AsyncResult(handle.id, self, call.name)

    def _call_by_name(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any] | None, options: CallOptions
    ) -> Call[Any]:
        task = self.tasks.get(name)
        call: Call[Any] = Call(
            check_name("a task's name", name),
            check_args(args),
            dict(kwargs or {}),
            check_call_options(options) if task is None else task.check_options(options),
        )
        if task is not None:
            task.arguments.check(call.args, call.kwargs)
        return call

    # Results

    def handle(self, task_id: str) -> TaskHandle[Any]:
        """Return the handle of a task that was sent elsewhere, for async code."""
        return TaskHandle(task_id, self)

    def async_result(self, task_id: str) -> AsyncResult[Any]:
        """Return the handle of a task that was sent elsewhere, for plain code."""
        return AsyncResult(task_id, self)

    AsyncResult = async_result

    async def wait_outcome(self, task_id: str) -> Outcome:
        """Return the final outcome of a task, as soon as there is one."""
        return await self._session().wait(task_id)

    async def load_outcome(self, task_id: str) -> Outcome | None:
        """Return the outcome that a task has now, final or not; None: it has none."""
        backend = await self._session().results()
        return (await backend.load([task_id])).get(task_id)

    async def cancel(self, task_id: str, *, running: bool = True) -> None:
        """Revoke a task. One that waits, is delayed or is to be tried again never starts.

        A task that has ended is not changed.

        Args:
            task_id: The id of the task. An id that is not known yet is revoked as well.
            running: Whether a task that runs is cancelled. If not, it runs to its end.
        """
        await cancel_task(
            await self._open_session(), task_id, running=running, ttl=self.conf.result_expires
        )

    async def forget(self, task_id: str) -> bool:
        """Delete a result before it expires; False if there was none."""
        backend = await self._session().results()
        return await backend.forget([task_id]) > 0

    def read(self, outcome: Outcome) -> TaskResult[Any]:
        """Return an outcome decoded; its value has the annotated type if the task is known here."""
        return read_outcome(outcome, self.tasks.get(outcome.name or ""), self.codec)

    # Life

    def _session(self) -> Session:
        """Return the session of the running loop, which is made at the first use."""
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            # list(): another thread may add its own meanwhile.
            for other in [other for other in list(self._sessions) if other.is_closed()]:
                self._sessions.pop(other, None)  # another thread may have been faster
            broker, backend = self.drivers()
            store = self.outbox_broker()
            session = Session(
                broker,
                backend,
                None if store is None else Outbox(store),
                self.schedule_broker(),
                publish_timeout=self.conf.broker_publish_timeout,
            )
            self._sessions[loop] = session
        return session

    async def _open_session(self) -> Session:
        session = self._session()
        await session.open()
        return session

    async def broker(self) -> Broker:
        """Return the broker, open on the running loop, such as to count or purge queues."""
        return (await self._open_session()).broker

    async def schedule_store(self) -> ScheduleStore:
        """Return the store of the schedules, open on the running loop."""
        return await self._session().schedules()

    async def workers(self) -> list[WorkerInfo]:
        """Return the live workers, one for each process, as they describe themselves."""
        session = await self._open_session()
        found = [read_worker_info(one.about) for one in await session.broker.consumers()]
        # One that cannot be read is a worker of another version, or of another package.
        return [info for info in found if info is not None]

    async def backend(self) -> ResultBackend | None:
        """Return the result backend, open on the running loop; None if no results are kept."""
        session = self._session()
        return await session.results() if session.keeps_results else None

    @property
    def dead(self) -> DeadLetters:
        """The dead letters: ``await app.dead.list()``, and `retry` or `discard` them."""
        return DeadLetters(self)

    @property
    def schedules(self) -> Schedules:
        """The schedules: ``await app.schedules.list()``, and `add`, `pause` or `remove` them."""
        return Schedules(self)

    async def close(self) -> None:
        """Close the connections of the running loop; the next use makes new ones."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        """Connect to the broker now, and not at the first use."""
        await self._open_session()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def worker(
        self,
        *,
        concurrency: int | None = None,
        queues: Sequence[str] | Mapping[str, int] | None = None,
        name: str | None = None,
        threads: int | None = None,
        grace_period: float | None = None,
        burst: bool = False,
    ) -> Worker:
        """Return a worker to run in this event loop: ``async with app.worker(): ...``.

        It starts on entry, drains on exit, and touches no signal handler. Where the broker cannot
        be reached on entry, it goes on trying in the background.

        Args:
            concurrency: Tasks at once; by default `worker_concurrency`.
            queues: The queues in the order in which they are drained, each one empty before the
                next; or a weight for each, 1 or more, which is its share of the tasks while all
                queues are full. By default `task_default_queue`.
            name: The name of the worker; by default the host's name and the process id.
            threads: The most threads for plain functions; by default `worker_threads`.
            grace_period: Seconds that running tasks get to end on exit; by default
                `worker_grace_period`.
            burst: Whether to stop when the queues are empty.
        """
        from aiotaskq.worker import Worker  # a program that only sends does not load it

        return Worker(
            self,
            concurrency=concurrency,
            queues=queues,
            name=name,
            threads=threads,
            grace_period=grace_period,
            burst=burst,
        )

    def scheduler(self) -> Scheduler:
        """Return a scheduler to run in this event loop: ``async with app.scheduler(): ...``.

        Any number may run, beside workers or alone: each run is sent once.
        """
        from aiotaskq.scheduling.scheduler import Scheduler  # as for the worker

        return Scheduler(self)

    def __repr__(self) -> str:
        return f"<TaskQueue {self.name} with {len(self.tasks)} tasks>"


_apps: WeakSet[TaskQueue] = WeakSet()


def _renew_locks() -> None:
    """Give a forked child new locks: a thread that does not exist there may hold the old ones."""
    for app in _apps:
        app._lock = native.make_lock()


forks.register(in_child=_renew_locks)


def _check_driver(what: str, given: object) -> None:
    if given is None or (isinstance(given, str) and "://" in given) or hasattr(given, "clone"):
        return
    # Not the text itself: where two slashes are missing, no part of it is safe to show.
    shown = shown_url(given) if isinstance(given, str) else type(given).__name__
    raise ConfigError(
        f"{what} is {shown}; it must be a URL, such as redis://localhost:6379/0, or a driver"
    )
