"""From a call to what the broker stores: names, times and defaults are filled in here."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from msgspec.structs import replace

from aiotaskq.codec import Codec
from aiotaskq.config import Config
from aiotaskq.errors import EncodeError, Unsupported
from aiotaskq.identity import new_id
from aiotaskq.message import Envelope, Message
from aiotaskq.protocols import Traits
from aiotaskq.task import Call, CallOptions, Task


class Outgoing(NamedTuple):
    """A message, and what a broker is to know beyond it."""

    message: Message
    not_before: float | None  # Unix time
    unique: bool  # store it only if its id was not stored before


def write(call: Call[Any], task: Task[Any, Any] | None, conf: Config, codec: Codec) -> Outgoing:
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
    if options:
        message = _with_options(message, options, now, conf)
    return Outgoing(message, _start(options, now, conf), task_id is not None)


def queue_of(name: str, task: Task[Any, Any] | None, conf: Config) -> str:
    """Return the queue that a task goes to where the call does not say."""
    own = None if task is None else task.options.queue
    return own or conf.route(name) or conf.task_default_queue


def seal(outgoing: Outgoing, codec: Codec) -> Envelope:
    """Return the envelope around a message.

    Raises:
        EncodeError: A header has no form in the serializer, or all of it is too large.
    """
    message, not_before, unique = outgoing
    return Envelope(
        id=message.id,
        queue=message.queue,
        body=codec.encode_message(message),
        priority=message.priority,
        not_before=not_before,
        expires_at=message.expires_at,
        unique=unique,
    )


def check_traits(outgoing: Outgoing, traits: Traits, url: str) -> None:
    """Raise `Unsupported` if a broker cannot do what a call asks."""
    if outgoing.unique and not traits.unique:
        raise Unsupported(f"{url} cannot store a task_id only once: leave it out")
    if outgoing.message.priority and not traits.priorities:
        raise Unsupported(f"{url} has no priorities, and {outgoing.message.task} asks for one")


def _priority(options: CallOptions, task: Task[Any, Any] | None, conf: Config) -> int:
    priority = options.get("priority")
    if priority is None and task is not None:
        priority = task.options.priority
    return conf.task_default_priority if priority is None else priority


def _with_options(message: Message, options: CallOptions, now: float, conf: Config) -> Message:
    retry = options.get("retry")
    expires = options.get("expires")
    return replace(
        message,
        expires_at=None if expires is None else _moment(expires, now, conf),
        timeout=options.get("timeout"),
        retry=None if retry is None else retry.to_policy(),
        headers=dict(options.get("headers") or {}),
    )


def _start(options: CallOptions, now: float, conf: Config) -> float | None:
    countdown = options.get("countdown")
    eta = options.get("eta")
    if countdown is not None:
        return now + countdown
    return None if eta is None else _moment(eta, now, conf)


def _moment(when: float | timedelta | datetime, now: float, conf: Config) -> float:
    if isinstance(when, datetime):
        if when.tzinfo is None:
            when = when.replace(tzinfo=ZoneInfo(conf.timezone))
        return when.timestamp()
    return now + (when.total_seconds() if isinstance(when, timedelta) else when)
