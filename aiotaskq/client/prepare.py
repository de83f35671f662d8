"""From a call to what the broker stores: names, times and defaults are filled in here."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from msgspec.structs import replace

from aiotaskq.config import Config
from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope, Message
from aiotaskq.encoding.codec import Codec
from aiotaskq.errors import EncodeError, Unsupported
from aiotaskq.ids import new_id
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.tasks.options import CallOptions


class Outgoing(NamedTuple):
    """A message, and what a broker is to know beyond it."""

    message: Message
    not_before: float | None = None  # Unix time
    delay: float | None = None  # seconds; at most one of the two is given
    expires_in: float | None = None  # seconds; None: at the message's own time, if ever
    unique: bool = False  # store it only if its id was not stored before

    def with_message(self, message: Message) -> Outgoing:
        """Return the same with another message, as a middleware made it."""
        moved = message.expires_at != self.message.expires_at
        return self._replace(message=message, expires_in=None if moved else self.expires_in)


def write(call: Call[Any], task: TaskDefinition | None, conf: Config, codec: Codec) -> Outgoing:
    """Return the message of a call.

    Args:
        call: Its options are checked already.
        task: The called task, if it is registered here.
        conf: What holds where neither says otherwise.
        codec: What arguments are written with.

    Raises:
        EncodeError: An argument has no form in the serializer.
    """
    try:
        args, kwargs, pickled = codec.pack(call.args, call.kwargs)
    except EncodeError as error:
        raise EncodeError(f"{call.name}, {error}") from error
    options = call.options
    now = time.time()
    task_id = options.get("task_id")
    queue = options.get("queue") or queue_of(call.name, task, conf)
    message = Message(
        id=new_id() if task_id is None else str(task_id),
        task=call.name,
        args=args,
        kwargs=kwargs,
        pickled=pickled,
        queue=queue,
        priority=_priority(options, task, conf),
        sent_at=now,
    )
    if not options:
        return Outgoing(message)
    message = _with_options(message, options, now, conf)
    eta, countdown = options.get("eta"), options.get("countdown", 0.0)
    return Outgoing(
        message,
        not_before=None if eta is None else _moment(eta, conf),
        delay=countdown if countdown > 0 else None,
        expires_in=_length(options.get("expires")),
        unique=task_id is not None,
    )


def queue_of(name: str, task: TaskDefinition | None, conf: Config) -> str:
    """Return the queue that a task goes to where the call does not say."""
    own = None if task is None else task.options.queue
    return own or conf.route(name) or conf.task_default_queue


def seal(outgoing: Outgoing, codec: Codec) -> Envelope:
    """Return the envelope around a message.

    Raises:
        EncodeError: A header has no form in the serializer, or all of it is too large.
    """
    message = outgoing.message
    in_seconds = outgoing.expires_in is not None
    return Envelope(
        id=message.id,
        queue=message.queue,
        body=codec.encode_message(message),
        priority=message.priority,
        not_before=outgoing.not_before,
        delay=outgoing.delay,
        expires_at=None if in_seconds else message.expires_at,
        expires_in=outgoing.expires_in,
        unique=outgoing.unique,
    )


def check_traits(outgoing: Outgoing, traits: Traits, url: str) -> None:
    """Raise `Unsupported` if a broker cannot do what a call asks."""
    if outgoing.unique and not traits.unique:
        raise Unsupported(f"{url} cannot store a task_id only once: leave it out")
    if outgoing.message.priority and not traits.priorities:
        raise Unsupported(f"{url} has no priorities, and {outgoing.message.task} asks for one")


def _priority(options: CallOptions, task: TaskDefinition | None, conf: Config) -> int:
    priority = options.get("priority")
    if priority is None and task is not None:
        priority = task.options.priority
    return conf.task_default_priority if priority is None else priority


def _with_options(message: Message, options: CallOptions, now: float, conf: Config) -> Message:
    retry = options.get("retry")
    return replace(
        message,
        expires_at=_expiry(options.get("expires"), now, conf),
        timeout=options.get("timeout"),
        soft_timeout=options.get("soft_timeout"),
        retry=None if retry is None else retry.to_policy(),
        headers=dict(options.get("headers") or {}),
    )


def _expiry(expires: float | timedelta | datetime | None, now: float, conf: Config) -> float | None:
    """Return the time as the message tells it; of seconds, by the sender's clock."""
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
