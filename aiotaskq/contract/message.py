"""Messages, and the two forms in which a broker handles them: envelopes and deliveries.

::

    sender:  Message ── encode ──▶ Envelope ── Broker.publish ──▶ store
    worker:  Message ◀── decode ── Delivery ◀── Consumer.fetch ── store

A `Message` is one request to run a task once. An `Envelope` is an encoded message with the fields
that a broker acts on; only these fields are known to a driver. A `Delivery` is an envelope that was
given to one consumer. All three are plain data.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from aiotaskq.readable import on_one_line

SUSPECT = 2
"""The number of crashes from which on a message is delivered alone, as a *suspect*.

If its worker dies again, the death is certainly not counted against other messages.
"""

NOTHING = Raw()
"""The value of `Message.args` and `Message.kwargs` without arguments; it is not encoded."""


class RetryPolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """The form of a `Retry` in a message: the number and the delays of further attempts."""

    max_attempts: int = 1
    delay: float = 1.0
    backoff: str = "exponential"
    max_delay: float = 600.0
    jitter: bool = True
    full_jitter: bool = False  # a random part of the whole delay, not only of its second half


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One earlier run of a task: when and where it ran, and how it failed."""

    number: int  # 1 is the first
    at: float  # Unix time at which it ended, by the clock of the worker
    worker: str
    error: str  # such as "ValueError: no such user", shortened
    traceback: str = ""  # a long one is shortened to its end


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One request to run a task once.

    Old and new workers can share a queue: a new field has a default, no field changes its meaning,
    and a reader ignores fields that it does not know.
    """

    id: str
    task: str
    args: Raw = NOTHING  # a list, in the same encoding as the message: JSON or MessagePack
    kwargs: Raw = NOTHING  # a map by the names of parameters, in the same encoding
    pickled: bytes | None = None  # the pickled pair (args, kwargs), if pickle is the serializer
    queue: str = "default"
    priority: Annotated[int, Meta(ge=0, le=9)] = 0
    attempt: Annotated[int, Meta(ge=1, le=2**31 - 2)] = 1  # 1 is the first; stores have 32 bits
    sent_at: float = 0.0  # Unix time by the clock of the sender
    expires_at: float | None = None  # Unix time
    timeout: float | None = None  # seconds
    soft_timeout: float | None = None  # seconds
    retry: RetryPolicy | None = None  # set if the call has a retry of its own
    history: tuple[Attempt, ...] = ()  # earlier attempts; the latest ones, if there were many
    unknown_for: float = 0.0  # seconds for which it has waited for a worker that knows its task
    headers: dict[str, str] = {}  # for middleware; aiotaskq itself reads none of them
    reply_to: str = ""  # the address for its outcome, if the result backend is a `ReplyBackend`

    def __str__(self) -> str:
        """Return the name and the id, safe to print on one line of a log."""
        return f"{on_one_line(self.task)}[{on_one_line(self.id)}]"


class Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An encoded message with the fields that a broker acts on. A driver knows nothing else of it.

    At most one of `not_before` and `delay` is set, and at most one of `expires_at` and
    `expires_in`. The relative ones (`delay`, `expires_in`) are better where they fit: only the
    clock of the store decides then, and the clocks of senders may be wrong.
    """

    id: str
    queue: str
    body: bytes
    priority: int = 0  # 0 to 9, 9 first
    not_before: float | None = None  # Unix time from which on it may be delivered
    delay: float | None = None  # the same, in seconds after it was stored, by the store's clock
    expires_at: float | None = None  # Unix time after which it is delivered as expired
    expires_in: float | None = (
        None  # the same, in seconds after it was stored, by the store's clock
    )
    unique: bool = False  # refuse it if a unique envelope with this id was stored in the last day


class Delivery(msgspec.Struct, frozen=True, eq=False, gc=False):
    """An envelope that was given to one consumer, which holds it while its lease lasts.

    The receipt identifies this delivery; every delivery of a message has a new one. It becomes
    void when the delivery is settled, when it is given back, and when the consumer is given up. A
    settlement with a void receipt changes nothing.
    """

    id: str
    queue: str
    body: bytes
    receipt: Any
    crashes: int = 0  # number of consumers that died while they held it
    priority: int = 0
    expired: bool = False  # by the store's clock: the worker stores its end and does not run it
    expires_at: float | None = (
        None  # Unix time by the store's clock, for the envelope of an `Again`
    )
    crash_note: str = ""  # how the last consumer lost it, even if that did not count as a crash
