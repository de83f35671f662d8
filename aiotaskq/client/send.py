"""Sending: calls are prepared, go through the middleware, and are stored.

The order of the steps keeps a refused batch from being half sent: all calls are encoded and checked
against the broker's traits before the first is stored, and a transaction that a call names is
looked at before anything is stored outside of one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from msgspec.structs import replace

from aiotaskq.client.cancel import store_revoked
from aiotaskq.client.prepare import PreparedMessage, check_traits, prepare, seal
from aiotaskq.client.session import Session
from aiotaskq.contract.message import Envelope, Message
from aiotaskq.errors import AioTaskQError, BatchRefused
from aiotaskq.events import Sent
from aiotaskq.middleware import Middleware, wrap_send
from aiotaskq.readable import get_logger
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.call import Call

logger = get_logger("aiotaskq.session")

Publish: TypeAlias = Callable[[Sequence[Envelope]], Awaitable[Collection[str]]]
# Messages with one destination, and their positions among the calls.
Group: TypeAlias = tuple[Publish, list[int], list[PreparedMessage]]
# Messages that the broker has taken, and the positions of their calls. A middleware may have
# changed them, or have left some out.
Published: TypeAlias = list[tuple[int, Message]]


async def send_calls(app: Application, session: Session, calls: Iterable[Call[Any]]) -> list[str]:
    """Store calls, those outside of transactions in one round trip; return the ids of their tasks.

    Where a middleware wraps the sending, they go through it one by one.

    Raises:
        EncodeError: An argument has no form in the serializer, or all of a call are too large. None
            of the calls is sent then, unless a middleware wraps the sending.
        Unsupported: The broker lacks a trait that a call needs; none is sent.
        BatchRefused: The broker refused some of several calls; the others are stored. `answer` has
            the ids of all.
        BrokerUnavailable: The broker could not be reached; some may be stored.
    """
    calls = list(calls)
    batch = [prepare(call, app) for call in calls]
    reply_to = await session.reply_address()
    if reply_to:
        batch = [one.with_message(replace(one.message, reply_to=reply_to)) for one in batch]
    broker = session.broker
    for prepared in batch:
        check_traits(prepared, broker.traits, broker.url)
    if not broker.traits.unique:  # a task_id is an id there, and not refused the second time
        batch = [
            one if "connection" in call.options else one._replace(unique=False)
            for call, one in zip(calls, batch, strict=True)
        ]
    groups = await _groups(session, calls, batch)
    ids = [prepared.message.id for prepared in batch]
    published: Published = []
    refused: BatchRefused | None = None
    try:
        await _send_groups(app, groups, ids, published)
    except BatchRefused as error:  # the others are stored
        refused = error
    finally:
        session.note_sent(message for _, message in published)
    # A task in the outbox is not at the broker yet, which may be away.
    named = {
        message.id: message
        for at, message in published
        if "task_id" in calls[at].options
        and ("connection" not in calls[at].options or session.is_transactional)
    }
    if named:
        await _tell_cancelled(app, session, named)
    if refused is not None:
        raise refused
    return ids


async def _groups(
    session: Session, calls: Sequence[Call[Any]], batch: Sequence[PreparedMessage]
) -> Sequence[Group]:
    """Group messages by their destination: each transaction of a caller has a round trip."""
    if not any("connection" in call.options for call in calls):  # nearly always
        return [(session.publisher.publish, list(range(len(batch))), list(batch))] if batch else []
    groups: dict[int | None, Group] = {}
    for at, (call, prepared) in enumerate(zip(calls, batch, strict=True)):
        connection = call.options.get("connection")
        key = None if connection is None else id(connection)
        if key not in groups:
            publish: Publish = session.publisher.publish
            if connection is not None:
                publish = await session.enlist(connection)
            groups[key] = publish, [], []
        groups[key][1].append(at)
        groups[key][2].append(prepared)
    # Transactions first: the refusal of a connection comes before anything is sent that nobody
    # rolls back.
    return [groups[key] for key in sorted(groups, key=lambda key: key is None)]


async def _send_groups(
    app: Application, groups: Sequence[Group], ids: Sequence[str], published: Published
) -> None:
    if any(type(one).send is not Middleware.send for one in app.middlewares):
        for publish, positions, group in groups:
            for at, prepared in zip(positions, group, strict=True):
                await _send_through(app, publish, at, prepared, published)
        return
    sealed = [[seal(one, app.codec) for one in group] for _, _, group in groups]
    errors: dict[int, Exception] = {}
    for (publish, positions, group), envelopes in zip(groups, sealed, strict=True):
        own: Mapping[int, Exception] = {}
        try:
            duplicates = await publish(envelopes)
        except BatchRefused as error:
            duplicates, own = error.answer, error.errors
        published += [(positions[at], one.message) for at, one in enumerate(group) if at not in own]
        _emit_sent(
            app,
            (
                one.message
                for at, one in enumerate(group)
                if one.message.id not in duplicates and at not in own
            ),
        )
        errors.update({positions[at]: why for at, why in own.items()})
    if errors:
        raise BatchRefused(errors, answer=ids)


async def _send_through(
    app: Application, publish: Publish, at: int, prepared: PreparedMessage, published: Published
) -> None:
    async def send(message: Message) -> None:
        envelope = seal(prepared.with_message(message), app.codec)
        duplicates = await publish([envelope])
        published.append((at, message))
        if envelope.id not in duplicates:
            _emit_sent(app, [message])

    await wrap_send(app.middlewares, send)(prepared.message)


async def _tell_cancelled(app: Application, session: Session, named: Mapping[str, Message]) -> None:
    """Tell of the messages that never run, since their ids were cancelled before they were sent.

    Ids outlive results: a caller that waits would find no outcome, and wait for ever.
    """
    try:
        for task_id in await session.broker.cancelled_among(named):
            message = named[task_id]
            logger.warning(
                "task %s was cancelled before it was sent now: it never runs, and its outcome is"
                " REVOKED. Send it with another task_id",
                message,
            )
            if not app.effective_options(message.task).ignore_result:
                await store_revoked(session, task_id, app.conf.result_expires)
    except AioTaskQError as error:  # all is stored, and the caller is not to send it again
        logger.warning("cannot see whether %s was cancelled before: %s", ", ".join(named), error)


def _emit_sent(app: Application, messages: Iterable[Message]) -> None:
    if app.observers.heard(Sent):
        for message in messages:
            app.observers.emit(Sent(message=message))
