"""Results over RabbitMQ, like Celery's `rpc://`: sent to the client that sent the task only.

Each client has a queue of its own, whose name travels with its messages. Outcomes that arrive are
kept in the memory of the process, where all its event loops find them.

Theory of operation
-------------------
`RabbitOutcomes` is the memory of one process, shared by all backends of the same URL and prefix; a
forked child has another one. It is used from several threads under a lock. The first final outcome
of an id stays. Listeners are notified after the outcome was put, so that they find it.

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
import math
import os
import threading
import time
import uuid
from collections import OrderedDict
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
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import BackendUnavailable, BatchRefused, ConfigError
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.rabbitmq")

_KEPT = 10_000  # outcomes in the memory of a process, the latest
_UNREAD_FOR = 3600.0  # seconds after which the queue of a client that is gone is removed
_AHEAD = 1000  # outcomes that the server sends before the first is acknowledged
_MOST = 1000  # outcomes in one batch
_LONGEST_TTL = 2**32 - 1  # milliseconds; the server refuses more
_DELETE_WAIT = 1.0  # seconds in which the queue is deleted at the end
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between attempts to consume

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Outcome).decode


class RabbitOutcomes:
    """The outcomes that a process has received, for all its event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[str, tuple[Outcome, float]] = OrderedDict()  # with expiry
        self._listeners: set[RabbitOutcomeListener] = set()

    def put(self, outcomes: Sequence[Outcome], ttl: float | None = None) -> list[str]:
        """Keep outcomes for some seconds; return the ids of those whose task has ended before."""
        until = math.inf if ttl is None else time.monotonic() + ttl
        refused: list[str] = []
        final: list[Outcome] = []
        with self._lock:
            for outcome in outcomes:
                known = self._find(outcome.task_id)
                if known is not None and known.status.final:
                    refused.append(outcome.task_id)
                    continue
                self._outcomes[outcome.task_id] = outcome, until
                self._outcomes.move_to_end(outcome.task_id)
                if outcome.status.final:
                    final.append(outcome)
            while len(self._outcomes) > _KEPT:
                self._outcomes.popitem(last=False)
            listeners = list(self._listeners)
        if final:
            for listener in listeners:
                listener.notify(final)
        return refused

    def get(self, ids: Collection[str]) -> dict[str, Outcome]:
        """Return the outcomes of those ids that have one."""
        with self._lock:
            return {one: found for one in ids if (found := self._find(one)) is not None}

    def forget(self, ids: Collection[str]) -> int:
        """Drop outcomes; return how many there were."""
        with self._lock:
            there = [one for one in set(ids) if self._find(one) is not None]
            for one in there:
                del self._outcomes[one]
        return len(there)

    def _find(self, task_id: str) -> Outcome | None:
        outcome, until = self._outcomes.get(task_id, (None, math.inf))
        if time.monotonic() < until:
            return outcome
        del self._outcomes[task_id]
        return None

    def notify_missed(self) -> None:
        """Notify all listeners that they may have missed outcomes."""
        for listener in list(self._listeners):
            listener.notify([])

    def listen(self) -> RabbitOutcomeListener:
        """Return a new listener for the running event loop."""
        listener = RabbitOutcomeListener()
        with self._lock:
            self._listeners.add(listener)
        return listener

    def unlisten(self, listener: RabbitOutcomeListener) -> None:
        """Drop a listener."""
        with self._lock:
            self._listeners.discard(listener)


class RabbitOutcomeListener:
    """Passes outcomes from any thread to the event loop in which it was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.batches: asyncio.Queue[Sequence[Outcome]] = asyncio.Queue()

    def notify(self, outcomes: Sequence[Outcome]) -> None:
        """Pass outcomes on. Safe to call in any thread."""
        with contextlib.suppress(RuntimeError):  # its event loop is closed
            self._loop.call_soon_threadsafe(self.batches.put_nowait, outcomes)


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
        for place, one in enumerate(batch):
            if not one.reply_to:
                continue
            if self._names.is_replies(one.reply_to):
                replies.append(AmqpPublication("", one.reply_to, properties, _encode(one)))
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
        refusals: dict[int, Exception] = {}
        for start in range(0, len(replies), _MOST):
            # Not strict: a client that is gone waits for nothing.
            some = await connection.publish(replies[start : start + _MOST], strict=False)
            refusals |= {places[start + number]: error for number, error in some.items()}
        if refusals:
            raise BatchRefused(refusals, answer=refused)
        return refused

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        self._connection.get()
        return self._outcomes.get(ids)

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
                await ended.wait()
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
            with contextlib.suppress(msgspec.MsgspecError):  # not written by this package
                self._outcomes.put([_decode(message.body)])

        channel.listen("replies", receive)
        await channel.call(
            Basic.Qos(prefetch_count=_AHEAD),
            Basic.Consume(queue=self._queue, consumer_tag="replies"),
        )
        return ended
