"""Every setting there is: name, type, default and meaning, as data.

The table is the class `Settings` itself. Each line is a descriptor, so that type checkers know what
``app.conf.result_expires`` is and what may be assigned to it, and the documentation of the settings
is made from the same lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Self, TypeVar, overload

from aiotaskq.config import kinds
from aiotaskq.config.kinds import Kind, Wrong
from aiotaskq.errors import ConfigError

Read = TypeVar("Read")
Write = TypeVar("Write")


class Setting(Generic[Read, Write]):
    """One setting.

    Attributes:
        name: Its name, in lower case.
        default: What holds if nobody says otherwise.
        meaning: What it does, in one line.
        ours: Whether Celery has no such setting, and so no old name for it either.
        secret: Whether its value must not be shown.
    """

    __slots__ = ("default", "kind", "meaning", "name", "ours", "secret")

    def __init__(
        self,
        kind: Kind[Read, Write],
        default: Read,
        meaning: str,
        *,
        ours: bool = False,
        secret: bool = False,
    ) -> None:
        self.name = ""
        self.kind = kind
        self.default = default
        self.meaning = meaning
        self.ours = ours
        self.secret = secret

    @property
    def wants(self) -> str:
        """What values it takes, in words."""
        return self.kind.wants

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"AIOTASKQ_{self.name.upper()}"

    def check(self, value: object, *, spelled: str | None = None) -> Read:
        """Return `value` in the form in which the setting is read.

        Args:
            value: Of any type.
            spelled: How the user named the setting, if otherwise than by its name.

        Raises:
            ConfigError: The value is not one that this setting takes.
        """
        try:
            return self.kind.check(value)
        except Wrong as error:
            label = spelled or self.name
            reason = error.reason or f"wants {self.wants}"
            raise ConfigError(f"{label}{self._shown(value)}: {reason}") from None

    def parse(self, text: str) -> Read:
        """Return what the text of the environment variable says.

        Raises:
            ConfigError: The text is not one that this setting takes.
        """
        try:
            value = self.kind.parse(text)
        except ValueError:
            shown = self._shown(text)
            raise ConfigError(f"{self.variable}{shown}: wants {self.wants}") from None
        return self.check(value, spelled=self.variable)

    def _shown(self, value: object) -> str:
        if self.secret:
            return ""
        text = repr(value)
        return f" = {text}" if len(text) <= 100 else f" = {text[:97]}..."

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, holder: None, owner: type) -> Self: ...
    @overload
    def __get__(self, holder: Settings, owner: type) -> Read: ...
    def __get__(self, holder: Settings | None, owner: type) -> Self | Read:
        if holder is None:
            return self
        value: Read = holder._values.get(self.name, self.default)
        return value

    def __set__(self, holder: Settings, value: Write) -> None:
        holder._assign({self.name: value})


_NO_EVENTS = "workers and senders publish no events in this version yet"

# What a broker's or a backend's options may hold, and why Celery's others are not among them.
DRIVER_OPTIONS: frozenset[str] = frozenset()
REFUSED_DRIVER_OPTIONS: Mapping[str, str] = {
    "visibility_timeout": "leases made it needless; a task may run for as long as it likes, and "
    "what a dead worker held comes back after worker_lease seconds",
    "global_keyprefix": "use the setting prefix",
    "queue_name_prefix": "use the setting prefix",
    "unacked_restore_limit": "what dead workers held is taken back without being asked",
    "fanout_prefix": "nothing is broadcast over shared keys",
    "fanout_patterns": "nothing is broadcast over shared keys",
    "priority_steps": "priorities are 0 to 9",
    "sep": "priorities are not part of a queue's name",
    "queue_order_strategy": "queues are drained in the order in which a worker names them",
    "polling_interval": "waiting is pushed, not polled",
    "confirm_publish": "a message that was sent is stored, always",
    "max_retries": "use broker_publish_timeout",
    "interval_start": "use broker_publish_timeout",
    "interval_step": "use broker_publish_timeout",
    "interval_max": "use broker_publish_timeout",
    "result_chord_ordered": "there are no chords in this version yet",
    "retry_policy": "results are stored again by themselves until that succeeds",
}


class Settings:
    """All settings, as typed attributes. `Config` is the one that users meet."""

    __slots__ = ("_values",)

    _values: Mapping[str, Any]

    def _assign(self, settings: Mapping[str, object]) -> None:
        raise NotImplementedError

    # --- where ---

    broker_url = Setting(kinds.optional(kinds.url()), None, "Where messages wait.", secret=True)
    result_backend = Setting(
        kinds.optional(kinds.url(disabled=True)),
        None,
        'Where results rest; "disabled://" keeps none. None: in the broker\'s own store.',
        secret=True,
    )
    outbox_url = Setting(
        kinds.optional(kinds.url()),
        None,
        "The PostgreSQL database where tasks sent with connection= wait for a worker to pass them"
        " on, if the broker is another system.",
        secret=True,
        ours=True,
    )
    prefix = Setting(
        kinds.prefix(),
        "aiotaskq",
        "What every key, table, exchange and queue begins with.",
        ours=True,
    )
    broker_transport_options = Setting(
        kinds.options(DRIVER_OPTIONS, REFUSED_DRIVER_OPTIONS),
        kinds.NOTHING,
        "Options for the broker's driver.",
        secret=True,
    )
    result_backend_transport_options = Setting(
        kinds.options(DRIVER_OPTIONS, REFUSED_DRIVER_OPTIONS),
        kinds.NOTHING,
        "Options for the result backend's driver.",
        secret=True,
    )
    broker_connection_retry_on_startup = Setting(
        kinds.flag(),
        True,
        "Whether a worker that starts waits for its servers, instead of giving up.",
    )
    broker_publish_timeout = Setting(
        kinds.seconds(zero=True),
        5.0,
        "Seconds for which a sender tries again while the broker cannot be reached.",
        ours=True,
    )

    # --- encoding ---

    task_serializer = Setting(kinds.serializer(), "json", "What messages are written in.")
    result_serializer = Setting(kinds.serializer(), "json", "What results are written in.")
    accept_content = Setting(
        kinds.accepted(),
        ("json", "msgpack"),
        "What a worker takes; messages in anything else go to the dead letters.",
    )
    max_payload_size = Setting(
        kinds.whole(1, of="of bytes"), 1_048_576, "The most bytes of a message.", ours=True
    )
    max_result_size = Setting(
        kinds.whole(1, of="of bytes"), 1_048_576, "The most bytes of a result.", ours=True
    )

    # --- results ---

    result_expires = Setting(
        kinds.lifetime(), 86_400.0, "Seconds for which a result is kept; None: for ever."
    )
    result_extended = Setting(
        kinds.flag(), False, "Whether a result also keeps the arguments of its task."
    )

    # --- tasks ---

    task_default_queue = Setting(
        kinds.queue(), "default", "The queue of tasks for which nothing else is said."
    )
    task_default_priority = Setting(
        kinds.priority(), 0, "The priority of tasks for which nothing else is said, 9 first."
    )
    task_routes = Setting[Mapping[str, str], Mapping[str, str | Mapping[str, str]] | None](
        kinds.routes(), kinds.NOTHING, "Queues by the name of the task, or by a glob of names."
    )
    task_ignore_result = Setting(
        kinds.flag(), False, "Whether tasks for which nothing else is said keep no result."
    )
    task_track_started = Setting(
        kinds.flag(), False, "Whether a task that runs is told apart from one that waits."
    )
    task_time_limit = Setting(
        kinds.optional(kinds.seconds()),
        None,
        "Seconds that a task may run for which nothing else is said; None: no limit.",
    )
    task_soft_time_limit = Setting(
        kinds.optional(kinds.seconds()),
        None,
        "Seconds after which a task for which nothing else is said is told to come to an end; "
        "None: it is not told.",
    )
    task_cancel_grace = Setting(
        kinds.seconds(zero=True),
        5.0,
        "Seconds that a cancelled or timed-out task gets to end, before its slot is freed and "
        "what it still does is ignored.",
        ours=True,
    )
    task_default_retry = Setting(
        kinds.optional(kinds.retry()),
        None,
        "The retry of tasks for which nothing else is said; None: they run once.",
        ours=True,
    )
    task_always_eager = Setting(
        kinds.only_flag(
            False,
            "running tasks in the sender is not supported in this version; call the task itself, "
            'or use the broker "memory://" with a worker in the same process',
        ),
        False,
        "Not supported yet.",
    )
    task_send_sent_event = Setting(kinds.only_flag(False, _NO_EVENTS), False, "Not supported yet.")
    unknown_task_ttl = Setting(
        kinds.seconds(zero=True),
        600.0,
        "Seconds for which a task that no worker knows is tried again before it goes to the "
        "dead letters.",
        ours=True,
    )
    max_crashes = Setting(
        kinds.whole(1),
        3,
        "How many workers may die of a task before it goes to the dead letters.",
        ours=True,
    )
    dead_letter_max = Setting(
        kinds.whole(0),
        10_000,
        "How many dead letters a queue keeps; the oldest go first.",
        ours=True,
    )
    dead_letter_expires = Setting(
        kinds.lifetime(),
        30 * 86_400.0,
        "Seconds for which a dead letter is kept; None: for ever.",
        ours=True,
    )

    # --- modules and time ---

    imports = Setting(kinds.modules(), (), "Modules that a worker imports when it starts.")
    include = Setting(kinds.modules(), (), "More modules that a worker imports when it starts.")
    timezone = Setting(kinds.time_zone(), "UTC", "The time zone of schedules and local times.")
    enable_utc = Setting(
        kinds.only_flag(
            True, "times travel and rest in UTC, always; timezone says how to show them"
        ),
        True,
        "Times travel and rest in UTC.",
    )
    beat_schedule = Setting(
        kinds.schedules(),
        kinds.NO_SCHEDULES,
        'Tasks that a scheduler sends by the clock: by id, a mapping with "task" and "schedule".',
    )

    # --- workers ---

    worker_concurrency = Setting(
        kinds.whole(1), 100, "How many tasks a process of a worker runs at once."
    )
    worker_processes = Setting(kinds.whole(1), 1, "How many processes a worker has.", ours=True)
    worker_threads = Setting(
        kinds.optional(kinds.whole(1)),
        None,
        "How many threads run plain functions; None: the worker chooses.",
        ours=True,
    )
    worker_process_pool_size = Setting(
        kinds.optional(kinds.whole(1)),
        None,
        'How many processes run the tasks of executor="process"; None: the worker chooses.',
        ours=True,
    )
    worker_max_tasks_per_child = Setting(
        kinds.optional(kinds.whole(1)),
        None,
        "After how many tasks a process is replaced; None: never.",
    )
    worker_max_memory_per_child = Setting(
        kinds.optional(kinds.memory()),
        None,
        "Above how many KiB of memory a process is replaced; None: never.",
    )
    worker_grace_period = Setting(
        kinds.seconds(zero=True),
        25.0,
        "Seconds that running tasks have to finish once a worker is told to stop.",
        ours=True,
    )
    worker_lease = Setting(
        kinds.seconds(),
        15.0,
        "Seconds without a sign of life after which a worker's tasks are given to others.",
        ours=True,
    )
    worker_heartbeat = Setting(
        kinds.seconds(),
        3.0,
        "Seconds between two signs of life; less than half of worker_lease.",
        ours=True,
    )
    worker_max_stuck_tasks = Setting(
        kinds.optional(kinds.whole(1)),
        10,
        "How many tasks that could not be stopped a process may have before it takes no more "
        "and is replaced; None: any number.",
        ours=True,
    )
    worker_loop_block_warning = Setting(
        kinds.optional(kinds.seconds()),
        1.0,
        "After how many seconds a blocked event loop is logged, with what blocks it; None: never.",
        ours=True,
    )
    worker_loop_block_limit = Setting(
        kinds.optional(kinds.seconds()),
        None,
        "After how many seconds a process with a blocked event loop is ended; None: never.",
        ours=True,
    )
    worker_hijack_root_logger = Setting(
        kinds.flag(), True, "Whether a worker sets up the root logger."
    )
    worker_log_format = Setting(
        kinds.log_format(),
        "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s",
        "The lines that a worker logs.",
    )
    worker_send_task_events = Setting(
        kinds.only_flag(False, _NO_EVENTS), False, "Not supported yet."
    )


def _table() -> Mapping[str, Setting[Any, Any]]:
    return {name: line for name, line in vars(Settings).items() if isinstance(line, Setting)}


SETTINGS: Mapping[str, Setting[Any, Any]] = _table()
"""Every setting by its name, in the order of the table."""
