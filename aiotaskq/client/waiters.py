"""The waiters: callers that wait for outcomes, over one subscription.

A waiter is noted first, then the subscription is made sure of, then the store is read: an outcome
is either stored by then, or it will be pushed. A slow look at everything (`_SAFETY_LOOK`) backs the
push up, since a push may be lost with its connection.

Two tasks serve all waiters, one that listens and one that loads. They start with the first waiter.
If one of them fails for good (a wrong password), all waiters are told and the next one starts them
again; after any other error it begins anew by itself. An outcome that cannot be read fails its own
waiters and no others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

from aiotaskq.backoff import Backoff
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.results import ResultBackend
from aiotaskq.errors import (
    BackendUnavailable,
    ConfigError,
    Unavailable,
)
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.session")

_PAUSES = (0.05, 5.0)  # seconds: the first pause while the store is away, and the longest
_SAFETY_LOOK = 5.0  # seconds between looks that rely on no push


class Waiters:
    """All callers on one event loop that wait for an outcome.

    Args:
        backend: The open result backend.
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

    async def _guard(self, work: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        backoff = Backoff(*_PAUSES)
        clock = asyncio.get_running_loop().time
        try:
            while True:
                began = clock()
                try:
                    await work(backoff.reset)
                    return
                except ConfigError:
                    raise
                except Exception:  # whatever others have sent, the waiters wait on
                    if clock() - began > _PAUSES[1]:  # it went well, though nothing came
                        backoff.reset()
                    if not backoff.failures:
                        logger.exception("waiting for results failed, beginning again")
                    self._look(self._waiting)
                    await asyncio.sleep(backoff.next())
        except ConfigError as error:  # such as a wrong password: all waiters are told
            for task_id in self._waiting:
                self._fail(task_id, error)
            tasks, self._tasks = self._tasks, []  # the next to wait tries anew
            self._subscribed.clear()
            for task in tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    async def _hear(self, note_success: Callable[[], None]) -> None:
        async with contextlib.aclosing(self._backend.subscribe()) as arrivals:  # type: ignore[type-var]  # an async generator in every driver
            async for news in arrivals:
                self._subscribed.set()
                if news:  # the empty item of a new subscription says little: it may fail at once
                    note_success()
                self._resolve({one.task_id: one for one in news if isinstance(one, Outcome)})
                ids = {one for one in news if isinstance(one, str)}
                self._look(self._waiting.keys() & ids if news else self._waiting.keys())

    def _look(self, ids: Iterable[str]) -> None:
        self._to_load.update(ids)
        if self._to_load:
            self._wake.set()

    async def _load(self, note_success: Callable[[], None]) -> None:
        backoff = Backoff(*_PAUSES)
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
                backoff.reset()
                note_success()
            except BackendUnavailable as error:
                logger.warning("cannot look for results, trying again: %s", error)
                await asyncio.sleep(backoff.next())
                self._look(ids)

    async def _load_now(self, ids: Collection[str]) -> None:
        try:
            self._resolve(await self._backend.load(ids))
        except (Unavailable, ConfigError):
            raise  # this concerns all outcomes, not single ones
        except Exception as error:
            if len(ids) == 1:
                for task_id in ids:
                    self._fail(task_id, error)
                return
            for task_id in ids:  # an outcome that cannot be read must not fail the others
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
        """End the subscription; callers that still wait are told."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task_id in self._waiting:  # not cancelled, which a waiter would misunderstand
            self._fail(
                task_id, BackendUnavailable("the connections were closed before the result came")
            )
