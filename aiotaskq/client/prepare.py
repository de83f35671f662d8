"""Preparation of a call: its message, and the envelope that a broker stores.

Names, times and defaults are filled in here. Nothing here does I/O.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec

from aiotaskq.config import Config
from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope, Message
from aiotaskq.encoding.codec import Codec
from aiotaskq.encoding.forms import UNKNOWN_WRITERS
from aiotaskq.errors import EncodeError, Unsupported
from aiotaskq.ids import new_id
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.call import Call


class PreparedMessage(NamedTuple):
    """A message, and the facts that a broker needs beyond it."""

    message: Message
    not_before: float | None = None  # Unix time
    delay: float | None = None  # seconds; at most one of the two is given
    expires_in: float | None = None  # seconds; None: at the message's own time, if ever
    unique: bool = False  # store it only if its id was not stored before

    def with_message(self, message: Message) -> PreparedMessage:
        """Return the same with another message, such as a middleware makes it."""
        moved = message.expires_at != self.message.expires_at
        return self._replace(message=message, expires_in=None if moved else self.expires_in)


def prepare(call: Call[Any], app: Application) -> PreparedMessage:
    """Return the message of a call, whose options are checked already.

    Raises:
        EncodeError: An argument has no form in the serializer.
    """
    task = app.tasks.get(call.name)
    writers = UNKNOWN_WRITERS if task is None else task.arguments
    try:
        args, kwargs, pickled = app.codec.pack(call.args, call.kwargs, writers)
    except EncodeError as error:
        raise EncodeError(f"{call.name}, {error}") from error
    options = call.options
    effective = app.effective_options(call.name)
    if options:
        effective = effective.for_call(options)
    task_id = options.get("task_id")
    now = time.time()
    message = Message(
        id=new_id() if task_id is None else str(task_id),
        task=call.name,
        args=args,
        kwargs=kwargs,
        pickled=pickled,
        queue=effective.queue,
        priority=effective.priority,
        sent_at=now,
    )
    if not options:
        return PreparedMessage(message)
    eta, countdown = options.get("eta"), options.get("countdown", 0.0)
    retry = options.get("retry")
    # The call's own, and not the effective ones: the worker may have other settings.
    message = msgspec.structs.replace(
        message,
        expires_at=_expiry(options.get("expires"), now, app.conf),
        timeout=options.get("timeout"),
        soft_timeout=options.get("soft_timeout"),
        retry=None if retry is None else retry.to_policy(),
        headers=dict(options.get("headers") or {}),
    )
    return PreparedMessage(
        message,
        not_before=None if eta is None else _moment(eta, app.conf),
        delay=countdown if countdown > 0 else None,
        expires_in=_length(options.get("expires")),
        unique=task_id is not None,
    )


def seal(prepared: PreparedMessage, codec: Codec) -> Envelope:
    """Return the envelope around a message.

    Raises:
        EncodeError: A header has no form in the serializer, or all of it is too large.
    """
    message = prepared.message
    in_seconds = prepared.expires_in is not None
    return Envelope(
        id=message.id,
        queue=message.queue,
        body=codec.encode_message(message),
        priority=message.priority,
        not_before=prepared.not_before,
        delay=prepared.delay,
        expires_at=None if in_seconds else message.expires_at,
        expires_in=prepared.expires_in,
        unique=prepared.unique,
    )


def check_traits(prepared: PreparedMessage, traits: Traits, url: str) -> None:
    """Raise `Unsupported` if a broker lacks a trait that a call needs."""
    if prepared.message.priority and not traits.priorities:
        raise Unsupported(f"{url} has no priorities, and {prepared.message.task} asks for one")


def _expiry(expires: float | timedelta | datetime | None, now: float, conf: Config) -> float | None:
    """Return when a message expires; where that is given in seconds, by the sender's clock."""
    if isinstance(expires, datetime):
        return _moment(expires, conf)
    length = _length(expires)
    return None if length is None else now + length


def _length(when: float | timedelta | datetime | None) -> float | None:
    """Return the seconds, if it is a length of time."""
    if isinstance(when, datetime):
        return None
    return when.total_seconds() if isinstance(when, timedelta) else when


def _moment(when: datetime, conf: Config) -> float:
    if when.tzinfo is None:
        when = when.replace(tzinfo=ZoneInfo(conf.timezone))
    return when.timestamp()
