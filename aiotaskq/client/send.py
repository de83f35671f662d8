"""From calls to the store: through the middleware, and into the transaction that a call names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias

from msgspec.structs import replace

from aiotaskq.client.prepare import Outgoing, check_traits, seal, write
from aiotaskq.client.session import Session
from aiotaskq.contract.message import Envelope, Message
from aiotaskq.events import Sent
from aiotaskq.middleware import Middleware, wrap_send
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.call import Call

Publish: TypeAlias = Callable[[Sequence[Envelope]], Awaitable[Collection[str]]]


async def send_calls(app: Application, session: Session, calls: Iterable[Call[Any]]) -> list[str]:
    """Store calls, those outside of transactions in one round trip; return their ids.

    Where a middleware wraps the sending, they go through it one by one.

    Raises:
        EncodeError: An argument has no form in the serializer, or all of a call are too large. None
            of the calls is sent then, unless a middleware wraps the sending.
        Unsupported: The broker cannot do what a call asks; none is sent.
        BrokerUnavailable: The broker could not be reached; some may be stored.
    """
    calls = list(calls)
    batch = [write(call, app.tasks.get(call.name), app.conf, app.codec) for call in calls]
    reply_to = await session.reply_address()
    if reply_to:
        batch = [one.with_message(replace(one.message, reply_to=reply_to)) for one in batch]
    broker = session.broker
    for outgoing in batch:
        check_traits(outgoing, broker.traits, broker.url)
    routes = await _routes(session, calls, batch)
    if any(type(one).send is not Middleware.send for one in app.middlewares):
        for publish, group in routes:
            for outgoing in group:
                await _send_through(app, publish, outgoing)
    else:
        sealed = [
            (publish, group, [seal(one, app.codec) for one in group]) for publish, group in routes
        ]
        for publish, group, envelopes in sealed:
            refused = await publish(envelopes)
            _tell_sent(app, (one.message for one in group if one.message.id not in refused))
    return [outgoing.message.id for outgoing in batch]


async def _routes(
    session: Session, calls: Sequence[Call[Any]], batch: Sequence[Outgoing]
) -> Iterable[tuple[Publish, list[Outgoing]]]:
    """Return who stores what: a transaction that calls name has a round trip of its own."""
    if not any("connection" in call.options for call in calls):  # nearly always
        return [(session.publisher.publish, list(batch))] if batch else []
    routes: dict[int | None, tuple[Publish, list[Outgoing]]] = {}
    for call, outgoing in zip(calls, batch, strict=True):
        connection = call.options.get("connection")
        key = None if connection is None else id(connection)
        if key not in routes:
            publish: Publish = session.publisher.publish
            if connection is not None:
                publish = await session.enlist(connection)
            routes[key] = publish, []
        routes[key][1].append(outgoing)
    # What a connection is refused for is told before anything is sent that nobody rolls back.
    return [routes[key] for key in sorted(routes, key=lambda key: key is None)]


async def _send_through(app: Application, publish: Publish, outgoing: Outgoing) -> None:
    async def send(message: Message) -> None:
        envelope = seal(outgoing.with_message(message), app.codec)
        if envelope.id not in await publish([envelope]):
            _tell_sent(app, [message])

    await wrap_send(app.middlewares, send)(outgoing.message)


def _tell_sent(app: Application, messages: Iterable[Message]) -> None:
    if app.observers.heard(Sent):
        for message in messages:
            app.observers.emit(Sent(message=message))
