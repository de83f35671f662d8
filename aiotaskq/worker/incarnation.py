"""An incarnation: one lease of a worker at the broker, and everything that is held under it.

::

    open ──▶ serve ──▶ finish ──▶ close        told to stop: run on, hand back the rest, settle
               │
               └─ lease lost ──▶ abandon ──▶ close      the worker makes another incarnation

- A lease that was lost never comes back. The broker has given the deliveries to other workers, so
  everything that runs under it is cancelled and forgotten; only outcomes that were on their way to
  the store are counted as refused.
- Five loops share the incarnation: fetching, the completer, maintenance, news, and the thread of
  the heartbeat. Each of them waits out a broker that is away. An unexpected error in one of them
  ends the worker loudly (`serve` watches all of them).
- At most `concurrency` deliveries are held. Nothing is prefetched: a delivery that waits in one
  worker cannot be run by another one (see `fetching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import msgspec

from aiotaskq.contract.records import DeadLimits, Grant
from aiotaskq.errors import LeaseLost
from aiotaskq.readable import get_logger
from aiotaskq.worker.census import Census
from aiotaskq.worker.completer import Completer
from aiotaskq.worker.environment import WorkerEnvironment
from aiotaskq.worker.executor import Executor
from aiotaskq.worker.fetching import Fetching, Quota
from aiotaskq.worker.health import Outage
from aiotaskq.worker.heartbeat import Heartbeat
from aiotaskq.worker.quarantine import Quarantine

logger = get_logger("aiotaskq.worker")


_MAINTAIN_EVERY = 1.0  # seconds, give or take a quarter, so that workers take turns
_MAINTAIN_MORE = 0.05  # the same after a round that has moved `_MANY`: there may be more
_MANY = 100
_NEWS_EVERY = 0.5  # seconds between questions for cancelled tasks, while anything runs
_PAUSES = (0.05, 5.0)  # seconds: the first pause while the broker is away, and the longest
_STORE_WAIT = 10.0  # seconds at the end for finished tasks to be stored
_REFUSE_WAIT = 1.0  # seconds after a lost lease in which late outcomes are counted as refused


class Incarnation:
    """Fetches deliveries, runs and completes them under one lease.

    Args:
        environment: The objects that all parts of the worker share.
        quota: How many deliveries may still be taken.
        count_stuck: Called about once a second with the number of tasks that do not end.
    """

    def __init__(
        self,
        environment: WorkerEnvironment,
        *,
        quota: Quota,
        count_stuck: Callable[[int], None],
    ) -> None:
        conf, options, broker = environment.app.conf, environment.options, environment.broker
        self._broker = broker
        self._health = environment.health
        self._count_stuck = count_stuck
        self._quarantine = Quarantine()
        self._limits = DeadLimits(conf.dead_letter_max, conf.dead_letter_expires)
        self._lost = asyncio.Event()
        self._consumer = broker.consumer(
            options.queues,
            name=options.name,
            lease=conf.worker_lease,
            about=msgspec.json.encode(environment.info),
        )
        self._heartbeat = Heartbeat(
            broker.lease(self.grant),
            length=conf.worker_lease,
            beat=conf.worker_heartbeat,
            lost=self._lost.set,
        )
        self._completer = Completer(
            self._consumer,
            environment.backend,
            self._heartbeat,
            environment.health,
            ttl=conf.result_expires,
        )
        self._census = Census(broker, self._consumer.id)
        self._executor = Executor(
            environment,
            self._completer,
            self._census,
            slot_freed=lambda: self._fetching.slot_freed(),
            pool_freed=lambda executor: self._fetching.pool_freed(executor),
        )
        self._fetching = Fetching(
            self._consumer,
            self._executor,
            self._completer,
            self._quarantine,
            environment.health,
            options,
            quota,
            {environment.app.effective_options(name).executor for name in environment.app.tasks},
        )
        self._helpers: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Begin the lease. Raises `BrokerUnavailable` if the broker cannot be reached."""
        await self._consumer.open()
        await self._heartbeat.start()
        self._helpers = [
            asyncio.create_task(self._completer.run(), name="aiotaskq-completer"),
            asyncio.create_task(self._maintain(), name="aiotaskq-maintain"),
            asyncio.create_task(self._hear_news(), name="aiotaskq-news"),
        ]

    @property
    def grant(self) -> Grant:
        """The grant of the lease, with which another process can renew or end it."""
        return self._consumer.grant

    @property
    def running(self) -> int:
        """The number of tasks that run now."""
        return self._executor.running

    def describe(self, work: asyncio.Task[Any] | None) -> str:
        """Return the name and id of the task that an asyncio task runs; empty if it runs none."""
        return self._executor.describe(work)

    async def serve(self) -> None:
        """Fetch deliveries and run them, until cancelled or there is nothing more to fetch.

        Raises:
            LeaseLost: The broker has given this incarnation up for dead.
        """
        fetching = asyncio.create_task(self._fetching.run(), name="aiotaskq-fetch")
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
                task.result()  # a fault in the worker itself ends it, loudly
        finally:
            for task in (fetching, losing):
                task.cancel()
            await asyncio.wait([fetching, losing])

    async def _maintain(self) -> None:
        outage = Outage(self._health, "cannot maintain the queues", _PAUSES)
        more = False
        while True:
            pause = _MAINTAIN_MORE if more else _MAINTAIN_EVERY
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            more = False
            self._count_stuck(self._executor.stuck)
            try:
                maintained = await self._broker.maintain(self._limits)
                await self._census.take()
            except Exception as error:  # whatever the store holds, the tasks go on
                await asyncio.sleep(outage.pause(error))
                continue
            outage.over()
            self._health.counts["reclaimed"] += maintained.reclaimed
            self._health.counts["trimmed"] += maintained.trimmed
            self._health.counts["aside"] += maintained.aside
            # A round has a bound, so that it keeps nobody waiting for long.
            more = maintained.reclaimed + maintained.trimmed >= _MANY
            if maintained.reclaimed:
                logger.warning("took %s back from workers that died", _tasks(maintained.reclaimed))
            if maintained.trimmed:
                logger.warning(
                    "dropped the oldest dead letters (%d): dead_letter_max is %d, and"
                    " dead_letter_expires %s s",
                    maintained.trimmed,
                    self._limits.most,
                    self._limits.age,
                )

    async def _hear_news(self) -> None:
        """Ask which tasks were cancelled, while any task runs, and until an outage is over."""
        outage = Outage(self._health, "cannot hear of cancelled tasks", _PAUSES)
        while True:
            await asyncio.sleep(_NEWS_EVERY)
            if not (self._executor.held or outage.on):
                continue
            try:
                news = await self._consumer.news()
            except LeaseLost:
                raise
            except Exception as error:  # a fault of a driver is no reason to end what runs
                await asyncio.sleep(outage.pause(error))
                continue
            outage.over()
            self._executor.revoke(news.cancelled)
            self._quarantine.note(suspects=news.suspects)

    async def finish(self, grace: float, hurry: asyncio.Event) -> None:
        """Wait for running tasks to end, for `grace` seconds or until `hurry`; release the rest.

        What has not started is handed back at once.
        """
        self._executor.hand_back()
        waits = [
            asyncio.create_task(wait)
            for wait in (self._fetching.finished(), hurry.wait(), self._lost.wait())
        ]
        try:
            await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)
        if self._executor.running:
            logger.warning("handing back what still runs (%d)", self._executor.running)
        await self._executor.release()
        try:
            async with asyncio.timeout(_STORE_WAIT):
                await self._completer.finished()
        except TimeoutError:
            logger.error(
                "%d finished tasks could not be settled; they run again elsewhere",
                self._completer.unsettled,
            )

    async def abandon(self) -> None:
        """Cancel all running tasks, which other workers get; count the outcomes that are late."""
        await self._executor.abandon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REFUSE_WAIT):
                await self._completer.finished()

    async def close(self) -> None:
        """End the lease; deliveries that are still held go back to their queues."""
        for task in self._helpers:
            task.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        await self._consumer.close()
        await self._heartbeat.stop()


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"
