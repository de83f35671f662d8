"""Sending: calls are prepared, go through the middleware, and are stored.

The order of the steps keeps a refused batch from being half sent: all calls are encoded and checked
against the broker's traits before the first is stored, and a transaction that a call names is
looked at before anything is stored outside of one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias

from msgspec.structs import replace

from aiotaskq.client.prepare import PreparedMessage, check_traits, prepare, seal
from aiotaskq.client.session import Session
from aiotaskq.contract.message import Envelope, Message
from aiotaskq.events import Sent
from aiotaskq.middleware import Middleware, wrap_send
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.call import Call

Publish: TypeAlias = Callable[[Sequence[Envelope]], Awaitable[Collection[str]]]


async def send_calls(app: Application, session: Session, calls: Iterable[Call[Any]]) -> list[str]:
    """Store calls, those outside of transactions in one round trip; return the ids of their tasks.

    Where a middleware wraps the sending, they go through it one by one.

    Raises:
        EncodeError: An argument has no form in the serializer, or all of a call are too large. None
            of the calls is sent then, unless a middleware wraps the sending.
        Unsupported: The broker lacks a trait that a call needs; none is sent.
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
    routes = await _routes(session, calls, batch)
    if any(type(one).send is not Middleware.send for one in app.middlewares):
        for publish, group in routes:
            for prepared in group:
                await _send_through(app, publish, prepared)
    else:
        sealed = [
            (publish, group, [seal(one, app.codec) for one in group]) for publish, group in routes
        ]
        for publish, group, envelopes in sealed:
            refused = await publish(envelopes)
            _emit_sent(app, (one.message for one in group if one.message.id not in refused))
    return [prepared.message.id for prepared in batch]


async def _routes(
    session: Session, calls: Sequence[Call[Any]], batch: Sequence[PreparedMessage]
) -> Iterable[tuple[Publish, list[PreparedMessage]]]:
    """Group messages by their destination: each transaction of a caller has a round trip."""
    if not any("connection" in call.options for call in calls):  # nearly always
        return [(session.publisher.publish, list(batch))] if batch else []
    routes: dict[int | None, tuple[Publish, list[PreparedMessage]]] = {}
    for call, prepared in zip(calls, batch, strict=True):
        connection = call.options.get("connection")
        key = None if connection is None else id(connection)
        if key not in routes:
            publish: Publish = session.publisher.publish
            if connection is not None:
                publish = await session.enlist(connection)
            routes[key] = publish, []
        routes[key][1].append(prepared)
    # Transactions first: the refusal of a connection comes before anything is sent that nobody
    # rolls back.
    return [routes[key] for key in sorted(routes, key=lambda key: key is None)]


async def _send_through(app: Application, publish: Publish, prepared: PreparedMessage) -> None:
    async def send(message: Message) -> None:
        envelope = seal(prepared.with_message(message), app.codec)
        if envelope.id not in await publish([envelope]):
            _emit_sent(app, [message])

    await wrap_send(app.middlewares, send)(prepared.message)


def _emit_sent(app: Application, messages: Iterable[Message]) -> None:
    if app.observers.heard(Sent):
        for message in messages:
            app.observers.emit(Sent(message=message))
