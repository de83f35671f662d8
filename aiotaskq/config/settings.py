"""Table of all settings: name, type, default and meaning.

The table is the class `SettingsTable`. Each line is a descriptor, so type checkers know the type
of ``app.conf.result_expires`` and which values may be assigned to it. The table of settings in the
documentation is generated from the same lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Generic, Self, overload

from aiotaskq.config import value_types
from aiotaskq.config.value_types import InvalidValue, ReadT, ValueType, WriteT
from aiotaskq.errors import ConfigError

_MAY_BE_URL = re.compile(r":/|/:|@|pass", re.IGNORECASE)
"""Signs of a URL that was given to the wrong setting, with a password in it perhaps."""


class Setting(Generic[ReadT, WriteT]):
    """One setting: a descriptor of `SettingsTable`.

    Attributes:
        name: Its name, in lower case.
        value_type: The type of its value, with the check.
        default: Its value where none is set.
        meaning: What it does, in one line.
        ours: Whether only aiotaskq has the setting. Celery has no such setting then, and no old
            name for it.
        secret: Whether errors must not show its value.
    """

    __slots__ = ("default", "meaning", "name", "ours", "secret", "value_type")

    def __init__(
        self,
        value_type: ValueType[ReadT, WriteT],
        default: ReadT,
        meaning: str,
        *,
        ours: bool = False,
        secret: bool = False,
    ) -> None:
        self.name = ""
        self.value_type = value_type
        self.default = default
        self.meaning = meaning
        self.ours = ours
        self.secret = secret

    @property
    def wants(self) -> str:
        """A description of the values that it takes."""
        return self.value_type.wants

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"AIOTASKQ_{self.name.upper()}"

    def check(self, value: object, *, spelled: str | None = None) -> ReadT:
        """Return `value` in the form in which the setting is read.

        Args:
            value: A value of any type.
            spelled: The name that the user wrote, if it is another one.

        Raises:
            ConfigError: The setting does not take this value.
        """
        try:
            return self.value_type.check(value)
        except InvalidValue as error:
            label = spelled or self.name
            reason = f"wants {self.wants}"
            if error.reason and not _MAY_BE_URL.search(repr(value)):
                reason = error.reason
            raise ConfigError(f"{label}{self._shown(value)}: {reason}") from None

    def parse(self, text: str) -> ReadT:
        """Return the value that the text of the environment variable stands for.

        Raises:
            ConfigError: The setting does not take this text.
        """
        try:
            value = self.value_type.parse(text)
        except ValueError:
            shown = self._shown(text)
            raise ConfigError(f"{self.variable}{shown}: wants {self.wants}") from None
        return self.check(value, spelled=self.variable)

    def _shown(self, value: object) -> str:
        text = repr(value)
        if self.secret or _MAY_BE_URL.search(text):
            return ""
        return f" = {text}" if len(text) <= 100 else f" = {text[:97]}..."

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, holder: None, owner: type) -> Self: ...
    @overload
    def __get__(self, holder: SettingsTable, owner: type) -> ReadT: ...
    def __get__(self, holder: SettingsTable | None, owner: type) -> Self | ReadT:
        if holder is None:
            return self
        value: ReadT = holder._values.get(self.name, self.default)
        return value

    def __set__(self, holder: SettingsTable, value: WriteT) -> None:
        holder._assign({self.name: value})


_NO_EVENTS = "workers and senders publish no events in this version"

# The options of brokers and backends; and Celery's options that are refused, each with the reason.
DRIVER_OPTIONS: frozenset[str] = frozenset()
REFUSED_DRIVER_OPTIONS: Mapping[str, str] = {
    "visibility_timeout": "leases replace it: a task may run for any time, and the tasks of a dead "
    "worker come back after worker_lease seconds",
    "global_keyprefix": "use the setting prefix",
    "queue_name_prefix": "use the setting prefix",
    "unacked_restore_limit": "the tasks of dead workers are always taken back",
    "fanout_prefix": "nothing is broadcast over shared keys",
    "fanout_patterns": "nothing is broadcast over shared keys",
    "priority_steps": "priorities are 0 to 9",
    "sep": "the name of a queue does not contain the priority",
    "queue_order_strategy": "a worker drains its queues in the order in which they are given",
    "polling_interval": "waiting workers are notified; they do not poll",
    "confirm_publish": "sending always waits until the message is stored",
    "max_retries": "use broker_publish_timeout",
    "interval_start": "use broker_publish_timeout",
    "interval_step": "use broker_publish_timeout",
    "interval_max": "use broker_publish_timeout",
    "result_chord_ordered": "there are no chords in this version",
    "retry_policy": "storing a result is retried until it succeeds",
}


class SettingsTable:
    """All settings, as typed attributes: the base of `Config`, which users see."""

    __slots__ = ("_values",)

    _values: Mapping[str, Any]

    def _assign(self, settings: Mapping[str, object]) -> None:
        raise NotImplementedError

    # --- servers ---

    broker_url = Setting(
        value_types.optional(value_types.url()),
        None,
        "The broker, which stores messages. None: `sqlite:///aiotaskq.db`.",
        secret=True,
    )
    result_backend = Setting(
        value_types.optional(value_types.url(disabled=True)),
        None,
        'The store of results; "disabled://" keeps none. None: the store of the broker.',
        secret=True,
    )
    outbox_url = Setting(
        value_types.optional(value_types.url()),
        None,
        "The PostgreSQL database for tasks sent with connection=, if the broker is another system; "
        "workers pass them on to the broker.",
        secret=True,
        ours=True,
    )
    schedule_store = Setting(
        value_types.optional(value_types.url()),
        None,
        "The store of schedules: Redis, PostgreSQL or SQLite. None: the broker; for one that keeps "
        "none, such as RabbitMQ, the store of the results, else the embedded SQLite file.",
        secret=True,
        ours=True,
    )
    prefix = Setting(
        value_types.prefix(),
        "aiotaskq",
        "The beginning of the name of every key, table, exchange and queue.",
        ours=True,
    )
    broker_transport_options = Setting(
        value_types.options(DRIVER_OPTIONS, REFUSED_DRIVER_OPTIONS),
        value_types.EMPTY,
        "Options of the broker's driver. There are none yet.",
        secret=True,
    )
    result_backend_transport_options = Setting(
        value_types.options(DRIVER_OPTIONS, REFUSED_DRIVER_OPTIONS),
        value_types.EMPTY,
        "Options of the result backend's driver. There are none yet.",
        secret=True,
    )
    broker_connection_retry_on_startup = Setting(
        value_types.flag(),
        True,
        "Whether a worker that starts waits for servers that cannot be reached; if not, it ends.",
    )
    broker_publish_timeout = Setting(
        value_types.seconds(zero=True),
        5.0,
        "Seconds for which a sender retries while the broker cannot be reached.",
        ours=True,
    )

    # --- encoding ---

    task_serializer = Setting(value_types.serializer(), "json", "The encoding of messages.")
    result_serializer = Setting(value_types.serializer(), "json", "The encoding of results.")
    accept_content = Setting(
        value_types.accepted(),
        ("json", "msgpack"),
        "The encodings that a worker reads; messages in others go to the dead letters.",
    )
    max_payload_size = Setting(
        value_types.whole(1, of="of bytes"),
        1_048_576,
        "The largest message, sent or read, in bytes.",
        ours=True,
    )
    max_result_size = Setting(
        value_types.whole(1, of="of bytes"), 1_048_576, "The largest result, in bytes.", ours=True
    )

    # --- results ---

    result_expires = Setting(
        value_types.lifetime(), 86_400.0, "Seconds for which a result is kept; None: for ever."
    )
    result_extended = Setting(
        value_types.flag(), False, "Whether the arguments of a task are stored with its result."
    )

    # --- tasks ---

    task_default_queue = Setting(
        value_types.queue(), "default", "The queue of tasks that name none."
    )
    task_default_priority = Setting(
        value_types.priority(), 0, "The priority of tasks that have none; 9 runs first."
    )
    task_routes = Setting[Mapping[str, str], Mapping[str, str | Mapping[str, str]] | None](
        value_types.routes(),
        value_types.EMPTY,
        "Queues by the name of a task, or by a pattern of names.",
    )
    task_ignore_result = Setting(
        value_types.flag(),
        False,
        "Whether no result is kept, for tasks that do not set ignore_result.",
    )
    task_track_started = Setting(
        value_types.flag(),
        False,
        "Whether the status of a running task is STARTED; if not, it stays PENDING.",
    )
    task_time_limit = Setting(
        value_types.optional(value_types.seconds()),
        None,
        "Seconds that one run may take, for tasks without a timeout; None: no limit.",
    )
    task_soft_time_limit = Setting(
        value_types.optional(value_types.seconds()),
        None,
        "Seconds after which SoftTimeLimitExceeded is raised inside a run, for tasks without a "
        "soft_timeout; None: never.",
    )
    task_default_executor = Setting(
        value_types.plain_executor(),
        "thread",
        'Where plain functions run that do not set executor: "thread", or "process" as with '
        "Celery's prefork.",
        ours=True,
    )
    task_cancel_grace = Setting(
        value_types.seconds(zero=True),
        5.0,
        "Seconds that a cancelled or timed-out task gets to end. After them its slot is freed, and "
        "its result is ignored.",
        ours=True,
    )
    task_default_retry = Setting(
        value_types.optional(value_types.retry()),
        None,
        "The retry of tasks that have none; None: they run once.",
        ours=True,
    )
    task_always_eager = Setting(
        value_types.fixed_flag(
            False,
            "running tasks in the sender is not supported in this version; call the task as a "
            'function, or use the broker "memory://" with a worker in the same process',
        ),
        False,
        "Not supported yet.",
    )
    task_send_sent_event = Setting(
        value_types.fixed_flag(False, _NO_EVENTS), False, "Not supported yet."
    )
    unknown_task_ttl = Setting(
        value_types.seconds(zero=True),
        600.0,
        "Seconds for which a task that no worker knows is offered to the workers again, before it "
        "goes to the dead letters.",
        ours=True,
    )
    max_crashes = Setting(
        value_types.whole(1),
        3,
        "Number of workers that may die while running a task, before it goes to the dead letters.",
        ours=True,
    )
    dead_letter_max = Setting(
        value_types.whole(0),
        10_000,
        "The most dead letters that a queue keeps; the oldest are dropped.",
        ours=True,
    )
    dead_letter_expires = Setting(
        value_types.lifetime(),
        30 * 86_400.0,
        "Seconds for which a dead letter is kept; None: for ever.",
        ours=True,
    )

    # --- modules and time ---

    imports = Setting(value_types.modules(), (), "Modules that a worker imports when it starts.")
    include = Setting(
        value_types.modules(), (), "More modules that a worker imports when it starts."
    )
    timezone = Setting(
        value_types.time_zone(), "UTC", "The time zone of schedules and local times."
    )
    enable_utc = Setting(
        value_types.fixed_flag(
            True, "times are sent and stored in UTC, always; use timezone for local times"
        ),
        True,
        "Times are sent and stored in UTC.",
    )
    beat_schedule = Setting(
        value_types.schedules(),
        value_types.NO_SCHEDULES,
        'Schedules by their ids; each is a mapping with "task" and "schedule".',
    )

    # --- workers ---

    worker_concurrency = Setting(
        value_types.whole(1), 100, "Tasks that one worker process runs at once."
    )
    worker_processes = Setting(value_types.whole(1), 1, "Number of worker processes.", ours=True)
    worker_threads = Setting(
        value_types.optional(value_types.whole(1)),
        None,
        "Threads of a process for plain functions; None: worker_concurrency, 64 at most.",
        ours=True,
    )
    worker_process_pool_size = Setting(
        value_types.optional(value_types.whole(1)),
        None,
        'Processes of a worker process for tasks with executor="process"; None: one for each core.',
        ours=True,
    )
    worker_max_tasks_per_child = Setting(
        value_types.optional(value_types.whole(1)),
        None,
        "Tasks after which a process is replaced; None: never.",
    )
    worker_max_memory_per_child = Setting(
        value_types.optional(value_types.memory()),
        None,
        "Memory in KiB; a process that uses more is replaced; None: never.",
    )
    worker_grace_period = Setting(
        value_types.seconds(zero=True),
        25.0,
        "Seconds that running tasks get to finish when a worker stops.",
        ours=True,
    )
    worker_lease = Setting(
        value_types.seconds(),
        15.0,
        "Seconds without a renewal after which a worker counts as dead, and others get its tasks.",
        ours=True,
    )
    worker_heartbeat = Setting(
        value_types.seconds(),
        3.0,
        "Seconds between two renewals of the lease; less than half of worker_lease.",
        ours=True,
    )
    worker_max_stuck_tasks = Setting(
        value_types.optional(value_types.whole(1)),
        10,
        "Number of tasks that did not end when they were cancelled. A process that reaches it "
        "takes no more tasks and is replaced; None: never.",
        ours=True,
    )
    worker_loop_block_warning = Setting(
        value_types.optional(value_types.seconds()),
        1.0,
        "Seconds after which a blocked event loop is logged, with the task and its stack; "
        "None: never.",
        ours=True,
    )
    worker_loop_block_limit = Setting(
        value_types.optional(value_types.seconds()),
        None,
        "Seconds after which a process with a blocked event loop is killed and replaced; "
        "None: never.",
        ours=True,
    )
    worker_end_orphans = Setting(
        value_types.flag(),
        True,
        "Whether processes that tasks have started end with their worker process; those in a "
        "session of their own go on.",
        ours=True,
    )
    worker_hijack_root_logger = Setting(
        value_types.flag(), True, "Whether a worker configures the root logger."
    )
    worker_log_format = Setting(
        value_types.log_format(),
        "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s",
        "The format of the log lines of a worker.",
    )
    worker_send_task_events = Setting(
        value_types.fixed_flag(False, _NO_EVENTS), False, "Not supported yet."
    )


def _table() -> Mapping[str, Setting[Any, Any]]:
    return {name: line for name, line in vars(SettingsTable).items() if isinstance(line, Setting)}


SETTINGS: Mapping[str, Setting[Any, Any]] = _table()
"""All settings by name, in the order of the table."""
