"""A session: the connections of an application on one event loop.

It owns a broker and a result backend of that loop. Two parts of it turn many callers into few round
trips: the publisher, which sends the envelopes of concurrent callers together, and the waiters,
which share one subscription.

Each driver is opened at its first use, once: callers that come meanwhile wait for the same attempt
(`_locks`), and after a failure the next caller tries again. A session is closed by `close`, or with
its event loop: `asyncio.run` closes the async generators that are left, and one of them is held for
that (`_until_closed`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Sequence,
)
from functools import partial

from aiotaskq.client.audience import Audience
from aiotaskq.client.outbox import Outbox
from aiotaskq.client.publisher import Publisher, persist
from aiotaskq.client.schedule_store import RelayedSchedules
from aiotaskq.client.waiters import Waiters
from aiotaskq.contract.broker import Broker, Transactional
from aiotaskq.contract.message import Envelope, Message
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.results import ReplyBackend, ResultBackend
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.errors import (
    ConfigError,
    Unsupported,
)
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.session")


class Session:
    """A broker and a result backend on the running loop.

    Each is opened when it is first needed, so that a program that only sends does not depend on the
    server of the results.
    """

    def __init__(
        self,
        broker: Broker,
        backend: ResultBackend | None,
        outbox: Outbox | None = None,
        schedules: Broker | None = None,
        *,
        publish_timeout: float,
    ) -> None:
        self.broker = broker
        self._backend = backend
        self._outbox = outbox
        self._schedules = schedules
        given: object = backend
        self._replies = given if isinstance(given, ReplyBackend) else None
        self.publisher = Publisher(broker, publish_timeout)
        self._audience = Audience(broker)
        self._patience = publish_timeout
        self._waiters = Waiters(backend) if backend is not None else None
        self._opened: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._life: AsyncGenerator[None, None] | None = None

    @property
    def is_transactional(self) -> bool:
        """Return whether the broker itself stores tasks in transactions of callers."""
        return isinstance(self.broker, Transactional)

    @property
    def keeps_results(self) -> bool:
        """Return whether there is a result backend."""
        return self._backend is not None

    async def open(self) -> None:
        """Connect to the broker. Idempotent; after an error the next call tries again."""
        if "broker" not in self._opened:
            await self._open_once("broker", self.broker.open, self._patience)

    def note_sent(self, messages: Iterable[Message]) -> None:
        """Note messages that were sent, so that the log tells of those that nobody takes."""
        if "broker" in self._opened:  # it may be away, where all went into the outbox
            self._audience.note(messages)

    async def enlist(
        self, connection: object
    ) -> Callable[[Sequence[Envelope]], Awaitable[Collection[str]]]:
        """Return a function that stores envelopes in the transaction on a caller's connection.

        Raises:
            Unsupported: The broker has no transactions, and there is no outbox.
        """
        if isinstance(self.broker, Transactional):
            await self.open()
            return partial(self.broker.publish_in, connection)
        if self._outbox is None:
            raise Unsupported(
                f"{self.broker.url} cannot store a task in a transaction of yours: set outbox_url"
                " to the PostgreSQL database that connection= leads to, from where the workers"
                " pass it on"
            )
        await self._open_once("outbox", self._outbox.open, self._patience)
        return partial(self._outbox.publish_in, connection)

    async def schedules(self) -> ScheduleStore:
        """Return the store of the schedules, connected.

        Raises:
            BrokerUnavailable: It could not be reached for as long as sending tries to.
        """
        if self._schedules is None:
            await self.open()
            return self.broker.schedules()
        await self._open_once("schedules", self._schedules.open, self._patience)
        return RelayedSchedules(self._schedules.schedules())

    async def results(self, patience: float | None = None) -> ResultBackend:
        """Return the result backend, connected.

        Args:
            patience: Seconds to go on trying while it cannot be reached; None: as long as sending
                does.

        Raises:
            BackendUnavailable: It could not be reached for that time.
            ConfigError: This application keeps no results.
        """
        if self._backend is None:
            raise ConfigError("this application keeps no results: its result_backend is disabled")
        if "backend" not in self._opened:
            patience = self._patience if patience is None else patience
            await self._open_once("backend", self._backend.open, patience)
        return self._backend

    async def reply_address(self) -> str:
        """Return the address to which outcomes are sent; empty where they are kept in a store.

        Raises:
            BackendUnavailable: The server of the results cannot be reached now.
        """
        if self._replies is None:
            return ""
        await self.results()
        return await self._replies.reply_address()

    async def wait(self, task_id: str) -> Outcome:
        """Return the final outcome of a task, as soon as there is one.

        An outage of the result backend is waited out, before the connection as after it.
        """
        await self.results(math.inf)
        assert self._waiters is not None  # results() raised otherwise
        return await self._waiters.wait(task_id)

    async def _open_once(
        self, what: str, connect: Callable[[], Awaitable[None]], patience: float
    ) -> None:
        # A lock for each attempt, and not for all of them: callers differ in their patience.
        async def attempt() -> None:
            async with self._locks.setdefault(what, asyncio.Lock()):
                if what not in self._opened:
                    await connect()
                    self._opened.add(what)
                    if self._life is None:
                        self._life = self._until_closed()
                        await anext(self._life)

        await persist(attempt, patience)

    async def _until_closed(self) -> AsyncGenerator[None, None]:
        """Close the session with its event loop, where nobody calls `close`.

        `asyncio.run` closes async generators after all tasks have ended, so that tasks can send
        until their end. A task that waited for the end of the loop would be cancelled with them.
        """
        try:
            yield
        finally:
            await self._close()

    async def close(self) -> None:
        """Close the connections, after the calls that are under way."""
        if self._life is not None:
            life, self._life = self._life, None
            await life.aclose()

    async def _close(self) -> None:
        self._opened.clear()
        await self.publisher.close()
        await self._audience.close()
        if self._waiters is not None and self._backend is not None:
            await self._waiters.close()
            await self._backend.close()
        for store in (self._outbox, self._schedules):
            if store is not None:
                await store.close()
        await self.broker.close()
