"""What one event loop needs to send tasks and to wait for them.

A session owns a broker and a result backend of that loop. Two things in it turn many callers
into few round trips: the publisher, which sends together what was asked for while the call
before was under way, and the waiters, which share one subscription.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from typing import TypeVar

from aiotaskq.errors import (
    BackendUnavailable,
    BrokerFull,
    BrokerUnavailable,
    ConfigError,
    Unavailable,
    Unsupported,
)
from aiotaskq.message import Envelope, Outcome
from aiotaskq.outbox import Outbox
from aiotaskq.protocols import Broker, ReplyBackend, ResultBackend, Transactional

T = TypeVar("T")

logger = logging.getLogger("aiotaskq.session")

_ROUND = 1000  # envelopes sent in one call
_ROUND_BYTES = 8 * 1024 * 1024
_SAFETY_LOOK = 5.0  # seconds between looks that rely on no push
_LONGEST_PAUSE = 1.0
_RETRY_PAUSE = 0.05  # seconds before the first repeat of a failed call; doubled for each


class Publisher:
    """Sends envelopes, gathering those of concurrent callers.

    A lone caller pays nothing for it: the first call goes out at once, and only what arrives
    while it is under way is gathered.

    Args:
        timeout: Seconds to go on trying when the broker cannot be reached.
    """

    def __init__(self, broker: Broker, timeout: float) -> None:
        self._broker = broker
        self._timeout = timeout
        self._waiting: list[tuple[Sequence[Envelope], asyncio.Future[Collection[str]]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def publish(self, envelopes: Sequence[Envelope]) -> Collection[str]:
        """Store them all; return the ids that were stored before.

        Raises:
            BrokerUnavailable: The broker could not be reached for `timeout` seconds.
            BrokerFull: It has no room left; told at once, as room is not made by waiting.
        """
        sent = asyncio.get_running_loop().create_future()
        self._waiting.append((envelopes, sent))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_waiting())
        return await sent  # type: ignore[no-any-return]  # a Future made by the loop is untyped

    async def _send_waiting(self) -> None:
        try:
            while self._waiting:
                callers = self._next_round()
                batch = [envelope for envelopes, _ in callers for envelope in envelopes]
                try:
                    refused = await self._send(batch)
                except Exception as error:  # every caller is told
                    _tell(callers, error)
                except BaseException:
                    for _, sent in callers:
                        sent.cancel()
                    raise
                else:
                    for _, sent in callers:
                        if not sent.done():
                            sent.set_result(refused)
        finally:
            self._sender = None
            for _, sent in self._waiting:  # only when cancelled: the session closes
                sent.cancel()
            self._waiting.clear()

    def _next_round(self) -> list[tuple[Sequence[Envelope], asyncio.Future[Collection[str]]]]:
        """Take as many waiting callers as fit one call; at least one."""
        count = size = taken = 0
        for envelopes, _ in self._waiting:
            count += len(envelopes)
            size += sum(len(envelope.body) for envelope in envelopes)
            if taken and (count > _ROUND or size > _ROUND_BYTES):
                break
            taken += 1
        callers, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return callers

    async def _send(self, batch: Sequence[Envelope]) -> Collection[str]:
        call_id = uuid.uuid4().hex  # so that a repeat after a lost reply stores nothing twice
        return await _patiently(lambda: self._broker.publish(batch, call_id=call_id), self._timeout)

    async def close(self) -> None:
        """Wait for what is being sent."""
        if self._sender is not None:
            await asyncio.wait([self._sender])


async def _patiently(call: Callable[[], Awaitable[T]], timeout: float) -> T:
    """Make a call again and again while the broker is away, for `timeout` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pause = _RETRY_PAUSE
    while True:
        try:
            return await call()
        except BrokerFull:
            raise
        except BrokerUnavailable:
            left = deadline - loop.time()
            if left <= 0:
                raise
        await asyncio.sleep(min(pause * (0.5 + random.random() / 2), left))
        pause = min(pause * 2, _LONGEST_PAUSE)


def _tell(
    callers: Iterable[tuple[Sequence[Envelope], asyncio.Future[Collection[str]]]], error: Exception
) -> None:
    for _, sent in callers:
        if not sent.done():
            sent.set_exception(error)


class Waiters:
    """All callers of one process that wait for an outcome, over one subscription.

    A waiter is noted first, then the subscription is made sure of, then the store is looked
    into: an outcome is either there by then or will be pushed. A slow look at everything backs the
    push up, since a push may be lost with its connection.
    """

    def __init__(self, backend: ResultBackend) -> None:
        self._backend = backend
        self._waiting: dict[str, set[asyncio.Future[Outcome]]] = {}
        self._to_load: set[str] = set()
        self._wake = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def wait(self, task_id: str) -> Outcome:
        """Return the final outcome of a task, as soon as there is one."""
        arrived: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(task_id, set()).add(arrived)
        try:
            self._start()
            if self._subscribed.is_set():
                self._look({task_id})
            return await arrived
        finally:
            waiting = self._waiting.get(task_id)
            if waiting is not None:
                waiting.discard(arrived)
                if not waiting:
                    del self._waiting[task_id]

    def _start(self) -> None:
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._guard(self._hear)),
                asyncio.create_task(self._guard(self._load)),
            ]

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:  # a wrong password, say: whoever waits is told
            for task_id in self._waiting:
                self._fail(task_id, error)
            tasks, self._tasks = self._tasks, []  # the next to wait tries anew
            self._subscribed.clear()
            for task in tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    async def _hear(self) -> None:
        async with contextlib.aclosing(self._backend.arrivals()) as arrivals:  # type: ignore[type-var]  # an async generator in every driver
            async for news in arrivals:
                self._subscribed.set()
                self._resolve({one.task_id: one for one in news if isinstance(one, Outcome)})
                ids = {one for one in news if isinstance(one, str)}
                self._look(self._waiting.keys() & ids if news else self._waiting.keys())

    def _look(self, ids: Iterable[str]) -> None:
        self._to_load.update(ids)
        if self._to_load:
            self._wake.set()

    async def _load(self) -> None:
        pause = _RETRY_PAUSE
        loop = asyncio.get_running_loop()
        look_at = loop.time() + _SAFETY_LOOK
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at):
                    await self._wake.wait()
            if loop.time() >= look_at:  # due, however often it was woken meanwhile
                self._to_load.update(self._waiting)
                look_at = loop.time() + _SAFETY_LOOK
            self._wake.clear()
            ids, self._to_load = self._to_load & self._waiting.keys(), set()
            if not ids:
                continue
            try:
                await self._load_now(ids)
                pause = _RETRY_PAUSE
            except BackendUnavailable as error:
                logger.warning("cannot look for results, trying again: %s", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _SAFETY_LOOK)
                self._look(ids)

    async def _load_now(self, ids: Collection[str]) -> None:
        try:
            self._resolve(await self._backend.load(ids))
        except (Unavailable, ConfigError):
            raise  # it is no matter of single outcomes
        except Exception as error:
            if len(ids) == 1:
                for task_id in ids:
                    self._fail(task_id, error)
                return
            for task_id in ids:  # one that cannot be read is no reason to fail the others
                await self._load_now([task_id])

    def _fail(self, task_id: str, error: Exception) -> None:
        for arrived in self._waiting.get(task_id, ()):
            if not arrived.done():
                arrived.set_exception(error)

    def _resolve(self, outcomes: Mapping[str, Outcome]) -> None:
        for task_id, outcome in outcomes.items():
            if outcome.status.final:
                for arrived in self._waiting.get(task_id, ()):
                    if not arrived.done():
                        arrived.set_result(outcome)

    async def close(self) -> None:
        """End the subscription; whoever still waits is told."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task_id in self._waiting:  # not cancelled, which a waiter would misunderstand
            self._fail(
                task_id, BackendUnavailable("the connections were closed before the result came")
            )


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
            await self._open_once("broker", partial(_patiently, self.broker.open, self._patience))

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
        await self._open_once("outbox", partial(_patiently, self._outbox.open, self._patience))
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
