"""What travels: messages, envelopes, deliveries, settlements, outcomes.

Data only. Nothing here does I/O or knows a driver.

============  ======================================================================
message       one request to run a task once
envelope      a message, encoded, with the few facts that a broker acts on
delivery      one hand-out of an envelope to a consumer, under that consumer's lease
settlement    what a worker decided about a delivery
outcome       what a run left behind: status, value or error
============  ======================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType


class TaskStatus(StrEnum):
    """Where a task stands, in Celery's words."""

    PENDING = "PENDING"  # waiting, or unknown
    STARTED = "STARTED"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"

    def __init__(self, _: str) -> None:
        self.final = self.value in ("SUCCESS", "FAILURE", "REVOKED")
        """Whether nothing comes after it."""


SUSPECT = 2
"""From so many crashes on a message is handed out alone, so that it takes no others with it."""

NOTHING = Raw()
"""Stands for "no arguments" in a `Message`, and is left out when encoding."""


class RetryPolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """How often and how soon a failed task runs again, as it travels in a message."""

    max_attempts: int = 1
    delay: float = 1.0
    backoff: str = "exponential"
    max_delay: float = 600.0
    jitter: bool = True
    full_jitter: bool = False  # from nothing to the whole of the delay, rather than from its half


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run that did not end its task: when, where, and what came of it."""

    number: int  # 1 is the first
    at: float  # Unix time of its end, by that worker's clock
    worker: str
    error: str  # such as "ValueError: no such user", shortened
    traceback: str = ""  # its end, where it is long


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One request to run a task once.

    Fields may be added with a default; none changes its meaning. A reader ignores those it
    does not know, so that old and new workers can share a queue.
    """

    id: str
    task: str
    args: Raw = NOTHING  # a list, in the framing of the message itself
    kwargs: Raw = NOTHING  # a map of parameter names
    pickled: bytes | None = None  # (args, kwargs) instead of both, where pickle was switched on
    queue: str = "default"
    priority: Annotated[int, Meta(ge=0, le=9)] = 0
    attempt: Annotated[int, Meta(ge=1, le=2**31 - 2)] = 1  # of the task; stores have 32 bits for it
    sent_at: float = 0.0  # Unix time at the sender
    expires_at: float | None = None  # Unix time
    timeout: float | None = None  # seconds
    soft_timeout: float | None = None  # seconds
    retry: RetryPolicy | None = None  # set where the call asked for its own
    history: tuple[Attempt, ...] = ()  # earlier attempts; of many, the latest
    unknown_for: float = 0.0  # seconds that it has waited for a worker that knows its task
    headers: dict[str, str] = {}  # for middleware; the core reads none
    reply_to: str = ""  # where its outcome is sent, by a backend that keeps none for others

    def __str__(self) -> str:
        """Return name and id, fit for a line of a log whoever wrote them."""
        return f"{on_one_line(self.task)}[{on_one_line(self.id)}]"


def on_one_line(name: str) -> str:
    """Return a name as it is if it is fit for a line of a log, else with its odd parts escaped."""
    return name if name.isprintable() else repr(name)


class Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that a broker may know of a message.

    Of `not_before` and `delay` at most one is given, of `expires_at` and `expires_in` likewise.
    The relative ones are what callers should prefer: no clock but the store's has a say then.
    """

    id: str
    queue: str
    body: bytes
    priority: int = 0  # 0 to 9, 9 first
    not_before: float | None = None  # Unix time; kept in the store until then
    delay: float | None = None  # the same, in seconds from its storing by the store's clock
    expires_at: float | None = None  # Unix time; handed out as expired after it
    expires_in: float | None = None  # the same, in seconds from its storing by the store's clock
    unique: bool = False  # store only if no unique one of this id was stored in the last day


class Delivery(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One hand-out of an envelope.

    It is yours while your consumer's lease lasts. `receipt` proves the hand-out and is new
    for each; once the delivery is settled, released or taken back, it is void.
    """

    id: str
    queue: str
    body: bytes
    receipt: Any
    crashes: int = 0  # consumers that died while they held it
    priority: int = 0
    expired: bool = False  # by the store's clock: not to be run, only to be told of
    expires_at: float | None = None  # Unix time by the store's clock, to go into an `Again`
    crash_note: str = ""  # how the last one that lost it did, even where that was no crash


class Done(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Finished: forget the envelope."""

    delivery: Delivery


class Again(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Store `envelope` in place of the delivered one, in one step."""

    delivery: Delivery
    envelope: Envelope


class Dead(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Keep it among the dead letters, payload untouched, with the reason."""

    delivery: Delivery
    reason: str
    details: bytes = b""  # whatever else is known of it; no driver reads it


class Release(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Hand it back unrun: to the head of its queue, nothing counted."""

    delivery: Delivery


Settlement: TypeAlias = Done | Again | Dead | Release


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


class Tended(msgspec.Struct, frozen=True):
    """What one round of housekeeping moved."""

    promoted: int = 0  # delayed ones that fell due
    reclaimed: int = 0  # taken back from consumers whose lease had lapsed
    trimmed: int = 0  # dead letters dropped, as there were too many or too old ones


class Outcome(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a run left behind, field by field as it rests in a result store.

    `result` holds the value in the result serializer's encoding: with SUCCESS what the task
    returned, with FAILURE or RETRY a `RemoteError`, with REVOKED a `RemoteError` that says why.
    """

    task_id: str
    status: TaskStatus
    result: Raw
    traceback: str | None = None
    children: list[str] = []
    date_done: datetime | None = None  # aware, UTC
    name: str | None = None
    worker: str | None = None
    queue: str | None = None
    retries: int = 0
    execution_time: float | None = None  # seconds
    args: Raw | UnsetType = UNSET
    kwargs: Raw | UnsetType = UNSET
    history: tuple[Attempt, ...] = ()  # the attempts before this one; of many, the latest
    reply_to: str | UnsetType = UNSET  # as in `Message`, where that says anything


class RemoteError(msgspec.Struct, frozen=True):
    """An exception as it rests in `Outcome.result`, in the shape that Celery uses."""

    exc_type: str
    exc_message: list[Any]
    exc_module: str
