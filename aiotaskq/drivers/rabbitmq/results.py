"""Results over RabbitMQ, as `rpc://` has them: sent to the one who sent the task, to nobody else.

Each client has a queue of its own, whose name travels with its messages. What arrives is kept in
the memory of the process, where every event loop of it finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import msgspec
from pamqp.commands import Basic, Queue

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.rabbitmq.address import parse
from aiotaskq.drivers.rabbitmq.channel import (
    Channel,
    Content,
    Disconnected,
    Publication,
    Refused,
    pack,
)
from aiotaskq.drivers.rabbitmq.link import Link
from aiotaskq.drivers.rabbitmq.names import Names
from aiotaskq.errors import BackendUnavailable, ConfigError

logger = logging.getLogger("aiotaskq.rabbitmq")

_KEPT = 10_000  # outcomes in the memory of a process, the latest
_UNREAD_FOR = 3600.0  # seconds after which the queue of a client that is gone is removed
_AHEAD = 1000  # outcomes that the server sends before the first is acknowledged
_MOST = 1000  # outcomes in one batch
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between attempts to connect

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Outcome).decode


class Inbox:
    """The outcomes that a process was sent, for all its event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[str, tuple[Outcome, float]] = OrderedDict()  # until when
        self._ears: set[Ear] = set()

    def put(self, outcomes: Sequence[Outcome], ttl: float | None = None) -> list[str]:
        """Keep outcomes for some seconds; return the ids of those whose task has ended before."""
        until = math.inf if ttl is None else time.monotonic() + ttl
        refused: list[str] = []
        taken: list[Outcome] = []
        with self._lock:
            for outcome in outcomes:
                known = self._find(outcome.task_id)
                if known is not None and known.status.final:
                    refused.append(outcome.task_id)
                    continue
                self._outcomes[outcome.task_id] = outcome, until
                self._outcomes.move_to_end(outcome.task_id)
                if outcome.status.final:
                    taken.append(outcome)
            while len(self._outcomes) > _KEPT:
                self._outcomes.popitem(last=False)
            ears = list(self._ears)
        self.tell(taken, ears)
        return refused

    def get(self, ids: Collection[str]) -> dict[str, Outcome]:
        """Return those that are there."""
        with self._lock:
            found = {one: self._find(one) for one in ids}
        return {one: outcome for one, outcome in found.items() if outcome is not None}

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

    def tell(self, outcomes: Sequence[Outcome], ears: Collection[Ear] | None = None) -> None:
        """Tell those who listen of outcomes; of none: that something may have been missed."""
        for ear in list(self._ears) if ears is None else ears:
            if outcomes or ears is None:
                ear.hear(outcomes)

    def listen(self) -> Ear:
        """Begin to listen, on the running event loop."""
        ear = Ear()
        with self._lock:
            self._ears.add(ear)
        return ear

    def unlisten(self, ear: Ear) -> None:
        """Listen no more."""
        with self._lock:
            self._ears.discard(ear)


class Ear:
    """Hears of outcomes on the event loop that made it, whoever puts them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[Sequence[Outcome]] = asyncio.Queue()

    def hear(self, outcomes: Sequence[Outcome]) -> None:
        """Take note, called in any thread."""
        with contextlib.suppress(RuntimeError):  # that loop is closed
            self._loop.call_soon_threadsafe(self.news.put_nowait, outcomes)


_inboxes: dict[tuple[int, str, str], Inbox] = {}
_inboxes_lock = threading.Lock()


def _inbox(url: str, prefix: str) -> Inbox:
    # By process: after a fork the child is another client.
    with _inboxes_lock:
        return _inboxes.setdefault((os.getpid(), url, prefix), Inbox())


class RabbitBackend:
    """Outcomes as messages to those who wait.

    Args:
        url: As of `RabbitBroker`.
        prefix: What the names of all queues begin with.

    Raises:
        ConfigError: The URL is none that there is.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._address = parse(url)
        self._prefix = prefix
        self._names = Names(prefix, self._address.queue_type)
        self._inbox = _inbox(url, prefix)
        self._queue = self._names.replies(uuid.uuid4().hex)
        self._link: Link | None = None
        self._hearing: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return self._address.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._prefix)

    async def open(self) -> None:
        if self._link is not None:
            return
        link = Link(self._address, self._names, BackendUnavailable, BackendUnavailable)
        try:
            await link.wire()
        except BaseException:
            await link.close()
            raise
        if self._link is None:
            self._link = link
        else:  # two tasks opened it at once
            await link.close()

    async def close(self) -> None:
        link, self._link = self._link, None
        hearing, self._hearing = self._hearing, None
        if hearing is not None:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)
        if link is not None:
            if hearing is not None:
                try:
                    async with asyncio.timeout(1.0):
                        await link.call(Queue.Delete(queue=self._queue))
                except (BackendUnavailable, ConfigError, Refused, TimeoutError):
                    pass  # it goes by itself, later
            await link.close()

    async def reply_address(self) -> str:
        """Return where outcomes are to be sent; from then on they are heard."""
        if self._hearing is None:
            await self._declare(self._opened())
            link = self._opened()  # it may have been closed meanwhile
            if self._hearing is None:  # another call may have begun, too
                self._hearing = asyncio.create_task(self._hear(link), name="aiotaskq-replies")
        return self._queue

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        link = self._opened()
        # Where there is no address, the one who waits is here, or nobody does.
        refused = self._inbox.put([one for one in batch if not one.reply_to], ttl)
        expiration = None if ttl is None else str(max(1, round(ttl * 1000)))
        properties = pack(
            Basic.Properties(
                content_type="application/json", delivery_mode=2, expiration=expiration
            )
        )
        letters = [
            Publication("", one.reply_to, properties, _encode(one)) for one in batch if one.reply_to
        ]
        if not letters:
            await link.ping()
        for start in range(0, len(letters), _MOST):
            # Who is gone does not wait any more.
            confirmation = await link.start(letters[start : start + _MOST])
            await link.finish(confirmation, strict=False)
        return refused

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        self._opened()
        return self._inbox.get(ids)

    async def subscribe(self) -> AsyncGenerator[Sequence[str | Outcome], None]:
        ear = self._inbox.listen()
        try:
            yield []
            while True:
                yield await ear.news.get()
        finally:
            self._inbox.unlisten(ear)

    async def forget(self, ids: Collection[str]) -> int:
        self._opened()
        return self._inbox.forget(ids)

    def _opened(self) -> Link:
        if self._link is None:
            raise BackendUnavailable(f"{self._address.url}: the result backend is not open")
        return self._link

    async def _declare(self, link: Link) -> None:
        # Durable, and not bound to the connection: what comes while it is away is not lost.
        lasting: dict[str, Any] = {"x-expires": round(_UNREAD_FOR * 1000)}
        await link.declare(Queue.Declare(queue=self._queue, durable=True, arguments=lasting))

    async def _hear(self, link: Link) -> None:
        failures = 0
        while True:
            try:
                wire = await link.wire()
                await self._declare(link)
                channel = await wire.channel()
                gone = await self._consume(channel)
                failures = 0
                self._inbox.tell([])
                await gone.wait()
                await channel.close()
            except (Disconnected, Refused, BackendUnavailable, ConfigError) as error:
                if not failures:
                    logger.warning(
                        "The queue of results was lost; it is tried again",
                        extra={
                            "event": "rabbitmq_replies_lost",
                            "url": self.url,
                            "error": str(error),
                        },
                    )
                failures += 1
            longest = min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2.0 ** min(failures, 10))
            await asyncio.sleep(random.uniform(_SHORTEST_PAUSE, longest))

    async def _consume(self, channel: Channel) -> asyncio.Event:
        """Begin to hear; return what is set when nothing is heard any more."""
        # A channel fails with its connection, and may also fail by itself.
        gone = asyncio.Event()
        channel.on_failed = gone.set
        channel.on_cancelled = lambda _: gone.set()

        def receive(content: Content) -> None:
            channel.ack([content.method.delivery_tag])
            try:
                self._inbox.put([_decode(content.body)])
            except msgspec.MsgspecError:
                return  # not of our making

        channel.listen("replies", receive)
        await channel.call(
            Basic.Qos(prefetch_count=_AHEAD),
            Basic.Consume(queue=self._queue, consumer_tag="replies"),
        )
        return gone
