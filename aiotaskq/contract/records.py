"""Records that drivers keep or return beside messages: dead letters, leases, schedules, counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from aiotaskq.contract.message import Attempt


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that could not end well, kept with the reason."""

    key: str  # of this letter in its queue; one id may have several letters
    id: str
    queue: str
    body: bytes
    reason: str
    crashes: int
    died_at: float  # Unix time
    details: bytes = b""  # as in `Dead`


class DeathDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker writes as JSON into the `details` of a dead letter."""

    task: str = ""  # its name; empty where the message cannot be read
    worker: str = ""  # that buried it
    attempts: tuple[Attempt, ...] = ()  # of many, the latest
    crash_note: str = ""  # what is known of the last worker that died of it


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tells of itself, as JSON, to those who ask the broker for its consumers."""

    name: str
    host: str
    pid: int
    started_at: float  # Unix time by its own clock
    tasks: tuple[str, ...]  # that it knows


class DeadLimits(msgspec.Struct, frozen=True):
    """How many dead letters a queue keeps, and for how long; the oldest go first."""

    most: int = 10_000
    age: float | None = 30 * 86_400.0  # seconds; None: for ever


class Grant(msgspec.Struct, frozen=True):
    """What names a consumer's lease, so that another process can renew or end it."""

    consumer: str
    queues: tuple[str, ...]
    seconds: float


class ConsumerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer whose lease runs."""

    id: str
    queues: tuple[str, ...]
    about: bytes  # as it was given to `Broker.consumer`


class News(msgspec.Struct, frozen=True):
    """What a consumer should hear of."""

    cancelled: Collection[str] = ()  # ids that it may hold
    suspects: bool = False  # messages in its queues wait to be handed out alone


class Depth(msgspec.Struct, frozen=True):
    """How many messages of a queue are in each state."""

    ready: int = 0
    delayed: int = 0
    held: int = 0  # handed out and not yet settled
    dead: int = 0


class StoredSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule as it rests in a store, which acts on the due time alone."""

    id: str
    body: bytes  # no driver reads it
    due_at: float | None  # Unix time by the store's clock of its next run; None: there is none
    revision: str  # another one after each change; given by whoever makes it


class DueSchedules(msgspec.Struct, frozen=True, kw_only=True):
    """What is due in a store, and when it is worth to look again."""

    schedules: Sequence[StoredSchedule]
    now: float  # Unix time by the store's clock
    next_at: float | None  # the earliest due time after `now`; None: there is none


class Maintained(msgspec.Struct, frozen=True):
    """What one round of housekeeping moved."""

    promoted: int = 0  # delayed ones that fell due
    reclaimed: int = 0  # taken back from consumers whose lease had lapsed
    trimmed: int = 0  # dead letters dropped, as there were too many or too old ones
