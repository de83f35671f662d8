"""One lease of a worker at the broker, and everything that is held under it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random

from aiotaskq.context import State
from aiotaskq.errors import LeaseLost, Unavailable
from aiotaskq.protocols import Broker, ResultBackend
from aiotaskq.worker.application import Application
from aiotaskq.worker.completer import Completer
from aiotaskq.worker.executor import Executor
from aiotaskq.worker.heartbeat import Heartbeat
from aiotaskq.worker.options import WorkerOptions
from aiotaskq.worker.pools import Pools

logger = logging.getLogger("aiotaskq.worker")


_FETCH_WAIT = 5.0  # seconds that an idle fetch waits; a driver may look more often by itself
_TEND_EVERY = 1.0  # seconds, give or take a quarter, so that workers take turns
_BACKOFF = (0.05, 5.0)  # seconds: the first pause while the broker is away, and the longest
_CANCEL_WAIT = 5.0  # seconds that a cancelled task gets to clean up
_STORE_WAIT = 10.0  # seconds at the end for finished tasks to be stored
_REFUSE_WAIT = 1.0  # seconds after a lost lease for what had ended to be counted as refused
_BURST_LOOK = 0.1  # seconds between looks of a burst that only waits for running tasks to end


class Quota:
    """How many deliveries a process may still take, over all its incarnations."""

    def __init__(self, most: int | None) -> None:
        self._left = most

    def cap(self, wanted: int) -> int:
        """Return how many of the wanted may be taken."""
        return wanted if self._left is None else min(wanted, self._left)

    def spend(self, taken: int) -> None:
        """Note what was taken."""
        if self._left is not None:
            self._left -= taken

    @property
    def spent(self) -> bool:
        """Whether no more may be taken."""
        return self._left is not None and self._left <= 0


class Incarnation:
    """Fetches, runs and completes under one lease."""

    def __init__(
        self,
        app: Application,
        broker: Broker,
        backend: ResultBackend | None,
        pools: Pools,
        options: WorkerOptions,
        *,
        state: State,
        quota: Quota,
    ) -> None:
        conf = app.conf
        self._broker = broker
        self._options = options
        self._quota = quota
        self._slot_free = asyncio.Event()
        self._lost = asyncio.Event()
        self._consumer = broker.consumer(options.queues, name=options.name, lease=conf.worker_lease)
        self._heartbeat = Heartbeat(
            self._consumer.lease(),
            length=conf.worker_lease,
            beat=conf.worker_heartbeat,
            lost=self._lost.set,
        )
        self._completer = Completer(
            self._consumer, backend, self._heartbeat, app.observers, ttl=conf.result_expires
        )
        self._executor = Executor(
            app,
            self._completer,
            pools,
            state=state,
            worker=options.name,
            ended=self._slot_free.set,
        )
        self._helpers: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Begin the lease. Raises `BrokerUnavailable` if the broker cannot be reached."""
        await self._consumer.open()
        self._heartbeat.start()
        self._helpers = [
            asyncio.create_task(self._completer.run(), name="aiotaskq-completer"),
            asyncio.create_task(self._tend(), name="aiotaskq-tend"),
        ]

    @property
    def running(self) -> int:
        """How many tasks run now."""
        return self._executor.running

    async def serve(self) -> None:
        """Take deliveries and run them, until cancelled or there is nothing more to take.

        Raises:
            LeaseLost: The broker gave this incarnation up for dead.
        """
        fetching = asyncio.create_task(self._fetch(), name="aiotaskq-fetch")
        losing = asyncio.create_task(self._lost.wait())
        watched = {fetching, losing, *self._helpers}
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if self._lost.is_set():
                raise LeaseLost(
                    f"the broker does not know {self._consumer.id} any more: it gave no sign of"
                    " life in time, or the broker has lost its data"
                )
            for task in done:
                task.result()  # a fault of the worker's own ends it, loudly
        finally:
            for task in (fetching, losing):
                task.cancel()
            await asyncio.wait([fetching, losing])

    async def _fetch(self) -> None:
        outage = _Outage("cannot fetch tasks")
        while not self._quota.spent:
            room = self._quota.cap(self._options.concurrency - self._executor.running)
            if room <= 0 or self._completer.full:
                await self._something_ended()
                continue
            busy = self._executor.running > 0 or self._completer.backlog > 0
            try:
                wait = _FETCH_WAIT
                if self._options.burst:
                    wait = _BURST_LOOK if busy else 0.0
                deliveries = await self._consumer.fetch(room, wait)
            except Unavailable as error:
                await outage.wait(error)
                continue
            outage.over()
            if not deliveries and self._options.burst and not busy:
                return
            self._quota.spend(len(deliveries))
            for delivery in deliveries:
                self._executor.accept(delivery)
        await self._finished()

    async def _something_ended(self) -> None:
        self._slot_free.clear()
        if self._executor.running < self._options.concurrency:  # it is the backlog that is full
            await self._completer.drained()
        else:
            await self._slot_free.wait()

    async def _finished(self) -> None:
        """Wait for all that runs to end."""
        while self._executor.running:
            self._slot_free.clear()
            await self._slot_free.wait()

    async def _tend(self) -> None:
        outage = _Outage("cannot tend the queues")
        while True:
            await asyncio.sleep(_TEND_EVERY * random.uniform(0.75, 1.25))
            try:
                tended = await self._broker.tend()
                self._executor.revoke(await self._consumer.cancelled())
            except Unavailable as error:
                await outage.wait(error)
                continue
            outage.over()
            if tended.reclaimed:
                logger.warning(
                    "took %d %s back from workers that died",
                    tended.reclaimed,
                    "task" if tended.reclaimed == 1 else "tasks",
                )

    async def finish(self, grace: float, hurry: asyncio.Event) -> None:
        """Let running tasks end within `grace` seconds, or until `hurry`; hand back the rest."""
        waits = [
            asyncio.create_task(wait)
            for wait in (self._finished(), hurry.wait(), self._lost.wait())
        ]
        try:
            await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)
        if self._executor.running:
            logger.warning("handing back what still runs (%d)", self._executor.running)
            await self._executor.release(_CANCEL_WAIT)
        try:
            async with asyncio.timeout(_STORE_WAIT):
                await self._completer.drained()
        except TimeoutError:
            logger.error(
                "%d finished tasks could not be settled; they run again elsewhere",
                self._completer.backlog,
            )

    async def abandon(self) -> None:
        """Cancel what runs, since it was given to others or will be; count what came too late."""
        await self._executor.abandon(_CANCEL_WAIT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REFUSE_WAIT):
                await self._completer.drained()

    async def close(self) -> None:
        """End the lease; what is still held goes back to its queue."""
        for task in self._helpers:
            task.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        await self._consumer.close()
        await self._heartbeat.stop()


class _Outage:
    """Waits while a server is away, longer each time, and logs its beginning and end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._pause = 0.0

    async def wait(self, error: Unavailable) -> None:
        first, longest = _BACKOFF
        if not self._pause:
            logger.warning("%s, trying again: %s", self._what, error)
        self._pause = min(self._pause * 2 or first, longest)
        await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))

    def over(self) -> None:
        if self._pause:
            self._pause = 0.0
            logger.warning("%s: over", self._what)
