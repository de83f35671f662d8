"""What one event loop needs to send tasks and to wait for them.

A session owns a broker and a result backend of that loop. Two things in it turn many callers
into few round trips: the publisher, which sends together what was asked for while the call
before was under way, and the waiters, which share one subscription.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Sequence,
)
from functools import partial

from aiotaskq.client.outbox import Outbox
from aiotaskq.client.publisher import Publisher, persist
from aiotaskq.client.waiters import Waiters
from aiotaskq.contract.broker import Broker, Transactional
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.results import ReplyBackend, ResultBackend
from aiotaskq.errors import (
    ConfigError,
    Unsupported,
)

logger = logging.getLogger("aiotaskq.session")


class Session:
    """A broker and a result backend on the running loop.

    Each is opened when first needed, so that who only sends depends on no result server.
    """

    def __init__(
        self,
        broker: Broker,
        backend: ResultBackend | None,
        outbox: Outbox | None = None,
        *,
        publish_timeout: float,
    ) -> None:
        self.broker = broker
        self._backend = backend
        self._outbox = outbox
        given: object = backend
        self._replies = given if isinstance(given, ReplyBackend) else None
        self.publisher = Publisher(broker, publish_timeout)
        self._patience = publish_timeout
        self._waiters = Waiters(backend) if backend is not None else None
        self._opened: set[str] = set()
        self._lock = asyncio.Lock()
        self._life: AsyncGenerator[None, None] | None = None

    @property
    def keeps_results(self) -> bool:
        """Whether there is a result backend at all."""
        return self._backend is not None

    async def open(self) -> None:
        """Connect to the broker. Idempotent; after an error the next call tries again."""
        if "broker" not in self._opened:
            await self._open_once("broker", partial(persist, self.broker.open, self._patience))

    async def enlist(
        self, connection: object
    ) -> Callable[[Sequence[Envelope]], Awaitable[Collection[str]]]:
        """Return what stores envelopes in the transaction on a connection of the caller's.

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
        await self._open_once("outbox", partial(persist, self._outbox.open, self._patience))
        return partial(self._outbox.publish_in, connection)

    async def results(self) -> ResultBackend:
        """Return the result backend, connected.

        Raises:
            ConfigError: This application keeps no results.
        """
        if self._backend is None:
            raise ConfigError("this application keeps no results: its result_backend is disabled")
        if "backend" not in self._opened:
            await self._open_once("backend", self._backend.open)
        return self._backend

    async def reply_address(self) -> str:
        """Return where outcomes are to be sent; empty where they rest in a store.

        Raises:
            BackendUnavailable: They are sent over a server that cannot be reached now.
        """
        if self._replies is None:
            return ""
        await self.results()
        return await self._replies.reply_address()

    async def wait(self, task_id: str) -> Outcome:
        """Return the final outcome of a task, as soon as there is one."""
        await self.results()
        assert self._waiters is not None  # results() raised otherwise
        return await self._waiters.wait(task_id)

    async def _open_once(self, what: str, connect: Callable[[], Awaitable[None]]) -> None:
        async with self._lock:
            if what not in self._opened:
                await connect()
                self._opened.add(what)
                if self._life is None:
                    self._life = self._until_closed()
                    await anext(self._life)

    async def _until_closed(self) -> AsyncGenerator[None, None]:
        """Close with the loop where nobody calls `close`.

        `asyncio.run` ends such generators once all tasks have ended, so that these can send to the
        last. A task that waited for the end would go with them.
        """
        try:
            yield
        finally:
            await self._close()

    async def close(self) -> None:
        """Let go of both connections, after what is being sent."""
        if self._life is not None:
            life, self._life = self._life, None
            await life.aclose()

    async def _close(self) -> None:
        self._opened.clear()
        await self.publisher.close()
        if self._waiters is not None and self._backend is not None:
            await self._waiters.close()
            await self._backend.close()
        if self._outbox is not None:
            await self._outbox.close()
        await self.broker.close()
