"""Results over RabbitMQ, like Celery's `rpc://`: sent to the client that sent the task only.

Each client has a queue of its own, whose name travels with its messages. Outcomes that arrive are
kept in the memory of the process, where all its event loops find them.

Theory of operation
-------------------
`RabbitOutcomes` (`outcomes.py`) has the outcomes of one process, for all backends of the same URL
and prefix; a forked child has others.

A backend receives nothing until `reply_address` is called. Then one task (`_receive_replies`)
consumes from the client's queue as long as the backend is open, and connects again when the
channel, the queue or the connection is lost. The queue is durable and belongs to no connection:
results that arrive in between wait in it. It vanishes by itself an hour after its last use.

A result is acknowledged before it is put. Both happen in one step of the event loop, so only the
death of the process comes in between, and its memory is lost then anyway. After each reconnect the
listeners get an empty batch, because a queue that was deleted has taken its results along.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import msgspec
from pamqp.commands import Basic, Queue

from aiotaskq.backoff import Backoff
from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.opening import OpenOnce
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpError,
    AmqpMessage,
    AmqpPublication,
    RabbitChannel,
)
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.outcomes import RabbitOutcomes
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import BackendUnavailable, BatchRefused, ConfigError
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.rabbitmq")

_UNREAD_FOR = 3600.0  # seconds after which the queue of a client that is gone is removed
_AHEAD = 1000  # outcomes that the server sends before the first is acknowledged
_MOST = 1000  # outcomes in one batch
_SWEEP_EVERY = 5.0  # seconds
_LONGEST_TTL = 2**32 - 1  # milliseconds; the server refuses more
_DELETE_WAIT = 1.0  # seconds in which the queue is deleted at the end
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between attempts to consume

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Outcome).decode


_outcomes: dict[tuple[int, str, str], RabbitOutcomes] = {}
_outcomes_lock = threading.Lock()


def _outcomes_of_process(url: str, prefix: str) -> RabbitOutcomes:
    # By process id: after a fork the child is another client.
    with _outcomes_lock:
        return _outcomes.setdefault((os.getpid(), url, prefix), RabbitOutcomes())


class RabbitBackend:
    """Outcomes as messages to the clients that wait for them.

    Args:
        url: The URL of a server, as for `RabbitBroker`.
        prefix: The beginning of the names of all queues.

    Raises:
        ConfigError: It is not a RabbitMQ URL, or has an unknown option.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._address = parse_url(url)
        self._prefix = prefix
        self._names = RabbitNames(prefix, self._address.queue_type)
        self._outcomes = _outcomes_of_process(url, prefix)
        self._queue = self._names.replies(uuid.uuid4().hex)
        self._connection = OpenOnce[RabbitConnection](
            lambda: BackendUnavailable(f"{self.url}: the result backend is not open")
        )
        self._receiving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return self._address.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._prefix)

    async def open(self) -> None:
        await self._connection.open(self._connect)

    async def _connect(self) -> RabbitConnection:
        return await RabbitConnection(
            self._address, self._names, BackendUnavailable, BackendUnavailable
        ).opened()

    async def close(self) -> None:
        connection = self._connection.release()
        receiving, self._receiving = self._receiving, None
        if connection is None:
            return
        if receiving is not None:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            try:
                async with asyncio.timeout(_DELETE_WAIT):
                    await connection.call(Queue.Delete(queue=self._queue))
            except (AmqpError, BackendUnavailable, ConfigError, TimeoutError):
                pass  # it vanishes by itself, later
        await connection.close()

    async def reply_address(self) -> str:
        """Return the address that outcomes are sent to; they are received from then on."""
        if self._receiving is None:
            await self._declare(self._connection.get())
            connection = self._connection.get()  # it may have been closed meanwhile
            if self._receiving is None:  # another call may have started it
                self._receiving = asyncio.create_task(
                    self._receive_replies(connection), name="aiotaskq-replies"
                )
        return self._queue

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        connection = self._connection.get()
        # An outcome without an address is for this process, or for nobody.
        refused = self._outcomes.put([one for one in batch if not one.reply_to], ttl)
        expiration = None if ttl is None else str(max(1, min(round(ttl * 1000), _LONGEST_TTL)))
        properties = Basic.Properties(
            content_type="application/json", delivery_mode=2, expiration=expiration
        ).marshal()
        replies: list[AmqpPublication] = []
        places: list[int] = []
        refusals: dict[int, Exception] = {}
        for place, one in enumerate(batch):
            if not one.reply_to:
                continue
            if self._names.is_replies(one.reply_to):
                try:
                    body = _encode(one)
                except (ValueError, RecursionError) as error:  # a lone surrogate, deep nesting
                    refusals[place] = error
                    continue
                replies.append(AmqpPublication("", one.reply_to, properties, body))
                places.append(place)
            else:
                # The message chose it. A result must not become a task, nor go anywhere else.
                logger.warning(
                    "A task asked for its result to be sent to what is no queue of results: it is"
                    " dropped",
                    extra={
                        "event": "rabbitmq_reply_refused",
                        "task_id": one.task_id,
                        "reply_to": ascii(one.reply_to[:300]),
                    },
                )
        if not replies:
            await connection.ping()
        for start in range(0, len(replies), _MOST):
            # Not strict: a client that is gone waits for nothing.
            some = await connection.publish(replies[start : start + _MOST], strict=False)
            refusals |= {places[start + number]: error for number, error in some.items()}
        if refusals:
            raise BatchRefused(refusals, answer=refused)
        return refused

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        self._connection.get()
        return await self._outcomes.get(ids)

    async def subscribe(self) -> AsyncGenerator[Sequence[str | Outcome], None]:
        listener = self._outcomes.listen()
        try:
            yield []
            while True:
                yield await listener.batches.get()
        finally:
            self._outcomes.unlisten(listener)

    async def forget(self, ids: Collection[str]) -> int:
        self._connection.get()
        return self._outcomes.forget(ids)

    async def _declare(self, connection: RabbitConnection) -> None:
        # Durable, and not bound to the connection: results that arrive while it is away must wait.
        lasting: dict[str, Any] = {"x-expires": round(_UNREAD_FOR * 1000)}
        await connection.declare(Queue.Declare(queue=self._queue, durable=True, arguments=lasting))

    async def _receive_replies(self, connection: RabbitConnection) -> None:
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            pause = _FIRST_PAUSE
            try:
                transport = await connection.transport()
                await self._declare(connection)
                channel = await transport.open_channel()
                ended = await self._consume(channel)
                backoff.reset()
                self._outcomes.notify_missed()
                while not ended.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_SWEEP_EVERY):
                            await ended.wait()
                    await self._outcomes.sweep()
                await channel.close()
            except (AmqpError, BackendUnavailable, ConfigError) as error:
                if not backoff.failures:
                    logger.warning(
                        "The queue of results was lost; it is tried again",
                        extra={
                            "event": "rabbitmq_replies_lost",
                            "url": self.url,
                            "error": str(error),
                        },
                    )
                pause = backoff.next()
            await asyncio.sleep(pause)

    async def _consume(self, channel: RabbitChannel) -> asyncio.Event:
        """Begin to receive results; return an event that is set when none arrive any more."""
        # A channel fails with its connection, and may also fail by itself.
        ended = asyncio.Event()
        channel.on_failed = ended.set
        channel.on_cancelled = lambda _: ended.set()

        def receive(message: AmqpMessage) -> None:
            channel.ack([message.method.delivery_tag])
            try:
                outcome = _decode(message.body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                return  # not written by this package
            # The server counts this time only while the result waits there.
            lasts = message.properties.expiration
            known = lasts.isascii() and lasts.isdecimal()
            self._outcomes.put([outcome], int(lasts) / 1000 if known else None)

        channel.listen("replies", receive)
        await channel.call(
            Basic.Qos(prefetch_count=_AHEAD),
            Basic.Consume(queue=self._queue, consumer_tag="replies"),
        )
        return ended
