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

from datetime import datetime
from enum import StrEnum
from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType


class TaskStatus(StrEnum):
    """Where a task stands, in Celery's words."""

    PENDING = "PENDING"  # waiting, or unknown
    STARTED = "STARTED"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"

    @property
    def final(self) -> bool:
        """Whether nothing comes after it."""
        return self in _FINAL


_FINAL = frozenset({TaskStatus.SUCCESS, TaskStatus.FAILURE, TaskStatus.REVOKED})

NOTHING = Raw()
"""Stands for "no arguments" in a `Message`, and is left out when encoding."""


class RetryPolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """How often and how soon a failed task runs again, as it travels in a message."""

    max_attempts: int = 1
    delay: float = 1.0
    backoff: str = "exponential"
    max_delay: float = 600.0
    jitter: bool = True


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
    priority: int = 0
    attempt: int = 1  # of the task; the broker counts hand-outs by itself
    sent_at: float = 0.0  # Unix time at the sender
    expires_at: float | None = None  # Unix time
    timeout: float | None = None  # seconds
    retry: RetryPolicy | None = None  # set where the call asked for its own
    unknown_since: float | None = None  # when a worker first had no such task
    headers: dict[str, str] = {}  # for middleware; the core reads none


class Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that a broker may know of a message."""

    id: str
    queue: str
    body: bytes
    priority: int = 0  # 0 to 9, 9 first
    not_before: float | None = None  # Unix time; kept in the store until then
    expires_at: float | None = None  # Unix time; handed out as expired after it
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


class Release(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Hand it back unrun: to the head of its queue, nothing counted."""

    delivery: Delivery


Settlement: TypeAlias = Done | Again | Dead | Release


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that could not end well, kept with the reason."""

    id: str
    queue: str
    body: bytes
    reason: str
    crashes: int
    died_at: float  # Unix time


class Depth(msgspec.Struct, frozen=True):
    """How many messages of a queue are in each state."""

    ready: int = 0
    delayed: int = 0
    held: int = 0  # handed out and not yet settled
    dead: int = 0


class Tended(msgspec.Struct, frozen=True):
    """What one round of housekeeping moved."""

    promoted: int = 0  # delayed ones that fell due
    reclaimed: int = 0  # taken back from consumers whose lease had lapsed


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


class RemoteError(msgspec.Struct, frozen=True):
    """An exception as it rests in `Outcome.result`, in the shape that Celery uses."""

    exc_type: str
    exc_message: list[Any]
    exc_module: str
