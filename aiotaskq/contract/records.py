"""Other data that drivers store or return: dead letters, leases, schedules, counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from aiotaskq.contract.message import Attempt


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message whose task could not end well, kept with the reason."""

    key: str  # identifies it in its queue; several dead letters may have the same id
    id: str
    queue: str
    body: bytes
    reason: str
    crashes: int
    died_at: float  # Unix time
    details: bytes = b""  # as in `Dead`


class DeathDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `details` of a dead letter, which a worker writes as JSON."""

    task: str = ""  # the name of the task; empty if the message cannot be read
    worker: str = ""  # the name of the worker that made it a dead letter
    attempts: tuple[Attempt, ...] = ()  # the latest ones, if there were many
    crash_note: str = ""  # how the last worker died that ran it


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a worker: the `about` of its consumer, as JSON."""

    name: str
    host: str
    pid: int
    started_at: float  # Unix time by the clock of the worker
    tasks: tuple[str, ...]  # the names of the tasks that it knows


def read_worker_info(about: bytes) -> WorkerInfo | None:
    """Return the description in the `about` of a consumer; None if another program wrote it."""
    try:
        return _decode_worker_info(about)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


_decode_worker_info = msgspec.json.Decoder(WorkerInfo).decode


class DeadLimits(msgspec.Struct, frozen=True):
    """Limits of the dead letters of a queue, in number and in age; the oldest are deleted first."""

    most: int = 10_000
    age: float | None = 30 * 86_400.0  # seconds; None: for ever


class Grant(msgspec.Struct, frozen=True):
    """The name of a consumer's lease, with which another process can renew or end it."""

    consumer: str  # `Consumer.id`
    queues: tuple[str, ...]
    seconds: float  # the length of the lease


class ConsumerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer whose lease runs."""

    id: str
    queues: tuple[str, ...]
    about: bytes  # as it was given to `Broker.consumer`


class News(msgspec.Struct, frozen=True):
    """News from a broker for a consumer, besides deliveries."""

    cancelled: Collection[str] = ()  # ids that it may hold
    suspects: bool = False  # suspects wait in its queues for a consumer that holds nothing


class Depth(msgspec.Struct, frozen=True):
    """The number of messages of a queue in each state."""

    ready: int = 0
    delayed: int = 0
    held: int = 0  # delivered and not yet settled
    dead: int = 0


class StoredSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule in a store. The store acts only on the due time."""

    id: str
    body: bytes  # no driver reads it
    due_at: float | None  # Unix time of the next run, by the store's clock; None: there is none
    revision: str  # a new one for each change, chosen by the caller that makes the change


class DueSchedules(msgspec.Struct, frozen=True, kw_only=True):
    """The schedules that are due in a store, and the time of the next one."""

    schedules: Sequence[StoredSchedule]
    now: float  # Unix time by the store's clock
    next_at: float | None  # the earliest due time after `now`; None: there is none


class Maintained(msgspec.Struct, frozen=True):
    """The number of messages that one call of `Broker.maintain` moved."""

    promoted: int = 0  # delayed messages that became ready
    reclaimed: int = 0  # messages taken back from consumers whose leases had lapsed
    trimmed: int = 0  # dead letters deleted because there were too many, or they were too old
    aside: int = 0  # entries that no driver can have written, set aside since the call before
