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

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

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
