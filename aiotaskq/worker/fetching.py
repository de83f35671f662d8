"""Fetching: takes deliveries for which there is room, and hands back those that cannot start soon.

At most `concurrency` deliveries are held. A delivery that needs a thread or a process while none is
free waits for a moment only (`WaitingRoom`); then it goes back to its queue, and the queue is left
to other workers (`FetchPlan`). A fetch is given up for a suspect: a message that crashed workers
before is handed out only to a consumer that holds nothing (see `quarantine`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence

from aiotaskq.contract.broker import Consumer
from aiotaskq.contract.message import SUSPECT, Delivery
from aiotaskq.errors import LeaseLost
from aiotaskq.tasks.option_table import Executor as ExecutorName
from aiotaskq.worker.completer import Completer
from aiotaskq.worker.executor import Executor
from aiotaskq.worker.fetch_plan import FetchPlan
from aiotaskq.worker.health import Health, Outage
from aiotaskq.worker.quarantine import Quarantine
from aiotaskq.worker.queue_rotation import QueueRotation
from aiotaskq.worker.worker_options import WorkerOptions

_FETCH_WAIT = 5.0  # seconds that an idle fetch waits; a driver may look more often by itself
_PAUSES = (0.05, 5.0)  # seconds: the first pause while the broker is away, and the longest
_BURST_LOOK = 0.1  # seconds between fetches of a burst that only waits for running tasks to end
_LOOK = 0.02  # seconds between looks into the other queues, while one is left out
_HOLD = 0.05  # seconds for which a delivery may wait for a thread or a process, and
_RETURN_WAIT = 1.0  # seconds for them to be back; longer only if a server is away
_HOLD_MIXED = 0.5  # the same while others of its queue get past it


class Quota:
    """The number of deliveries that a process may still take, over all its incarnations."""

    def __init__(self, most: int | None) -> None:
        self._left = most

    def cap(self, wanted: int) -> int:
        """Return the number of deliveries that may be taken, at most `wanted`."""
        return wanted if self._left is None else min(wanted, self._left)

    def spend(self, taken: int) -> None:
        """Note that deliveries were taken; a negative number was handed back unused."""
        if self._left is not None:
            self._left -= taken

    @property
    def spent(self) -> bool:
        """Return whether no more may be taken."""
        return self._left is not None and self._left <= 0


class Fetching:
    """The fetching of one incarnation.

    Args:
        consumer: The consumer.
        executor: Runs the deliveries.
        completer: Settles them.
        quarantine: Says when to be quiet for a suspect.
        health: Hears of a broker that is away.
        options: Of the worker.
        quota: How many deliveries may still be taken.
        executors: Those of all tasks that the worker knows.
    """

    def __init__(
        self,
        consumer: Consumer,
        executor: Executor,
        completer: Completer,
        quarantine: Quarantine,
        health: Health,
        options: WorkerOptions,
        quota: Quota,
        executors: Iterable[ExecutorName],
    ) -> None:
        self._consumer = consumer
        self._executor = executor
        self._completer = completer
        self._quarantine = quarantine
        self._health = health
        self._options = options
        self._quota = quota
        self._rotation = QueueRotation(options.weights) if options.weights else None
        self._plan = FetchPlan(options.concurrency, executors)
        self._slot_free = asyncio.Event()
        self._handed_back = False  # and maybe not settled yet

    def slot_freed(self) -> None:
        """Note that there is room for another delivery."""
        self._slot_free.set()

    def pool_freed(self, executor: ExecutorName) -> None:
        """Note that an executor has a free slot, and that nothing waits for it here."""
        self._plan.freed(executor)
        self._slot_free.set()

    async def run(self) -> None:
        """Fetch deliveries and have them run, until there is nothing more to fetch."""
        outage = Outage(self._health, "cannot fetch tasks", _PAUSES)
        suspect = False
        while not self._quota.spent or self._executor.waiting:
            late_in = self._hand_back_late()
            busy = self._executor.held > 0 or self._completer.backlog > 0
            # A suspect is alone until it is settled: a crash before that is counted against it.
            quiet = busy and (suspect or self._quarantine.quiet)
            if quiet or self._room() <= 0 or self._completer.full:
                await self._something_ended(late_in)
                continue
            wait = 0.0 if outage.on else _FETCH_WAIT  # the end of an outage is to be noted at once
            if self._options.burst:
                wait = _BURST_LOOK if busy else 0.0
            try:
                deliveries = await self._fetch(wait if late_in is None else min(wait, late_in))
            except _FetchFailed as failed:
                await asyncio.sleep(outage.pause(failed.error))
                continue
            outage.over()
            if not deliveries and self._options.burst and not busy:
                return
            suspect = _has_suspect(deliveries)
        await self.finished()

    async def finished(self) -> None:
        """Wait for all running tasks to end."""
        while self._executor.running:
            self._slot_free.clear()
            await self._slot_free.wait()

    async def _fetch(self, wait: float) -> Sequence[Delivery]:
        """Fetch and accept deliveries; wait for the first one."""
        order = None if self._rotation is None else self._rotation.next()
        if self._plan.is_open:
            return self._accept(await self._ask(self._room(), wait, order))
        if self._handed_back:  # first these, so that they come before those behind them
            self._handed_back = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETURN_WAIT):
                    await self._completer.settled()
        self._slot_free.clear()
        calls = self._plan.calls(order or self._options.queues)
        deliveries: list[Delivery] = []
        may_wait = self._plan.may_wait
        if may_wait and len(calls) == 1:
            calls.clear()  # one that waits will do
        for queues, most in calls:
            room = min(self._room(), most)
            if room > 0 and not _has_suspect(deliveries):
                deliveries += await self._call(room, 0.0, queues, queues)
        if deliveries:
            return deliveries
        if may_wait:
            most = min(self._room(), self._plan.narrowest)
            return await self._call(most, wait, order, self._options.queues)
        # Not a fetch that waits: it would be woken in place of another worker, for a queue that is
        # left out here.
        probe = self._plan.next_probe()
        await self._rest(min(wait, _LOOK if calls else wait, wait if probe is None else probe))
        return deliveries

    async def _ask(self, most: int, wait: float, order: Sequence[str] | None) -> Sequence[Delivery]:
        try:
            return await self._consumer.fetch(most, wait, order=order)
        except LeaseLost:
            raise
        except Exception as error:  # a driver's own included: the next look may find others
            raise _FetchFailed(error) from error

    async def _call(
        self, most: int, wait: float, order: Sequence[str] | None, queues: Sequence[str]
    ) -> Sequence[Delivery]:
        deliveries = self._accept(await self._ask(most, wait, order))
        for executor in self._plan.fetched(queues):
            self._hand_back(executor)
        return deliveries

    def _accept(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        self._quota.spend(len(deliveries))
        plain = self._plan.is_open
        for delivery in deliveries:
            waits_for = self._executor.accept(delivery)
            if not plain or waits_for is not None:
                plain = False
                self._plan.accepted(delivery.queue, waits_for)
        return deliveries

    def _room(self) -> int:
        return self._quota.cap(self._options.concurrency - self._executor.held)

    def _hand_back_late(self) -> float | None:
        """Hand back what has waited for too long; return the seconds until there is more."""
        late_in: float | None = None
        for executor, since in self._executor.waiting_since().items():
            hold = _HOLD_MIXED if self._plan.is_mixed(executor) else _HOLD
            left = since + hold - time.monotonic()
            if left <= 0:
                self._hand_back(executor)
            else:
                late_in = left if late_in is None else min(left, late_in)
        return late_in

    def _hand_back(self, executor: ExecutorName) -> None:
        back = self._executor.hand_back(executor)
        self._quota.spend(-len(back))
        self._plan.handed_back(executor, back)
        self._handed_back = self._handed_back or bool(back)

    async def _something_ended(self, late_in: float | None) -> None:
        """Wait until there may be room again, or the quiet time for a suspect is over."""
        self._slot_free.clear()
        if not (self._executor.held or self._completer.idle):  # full, or in the way of a suspect
            await self._completer.drained()
            return
        await self._rest(_FETCH_WAIT if late_in is None else late_in)

    async def _rest(self, seconds: float) -> None:
        """Wait until a slot is free, but no longer than some seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._slot_free.wait()


class _FetchFailed(Exception):
    """The broker could not be asked for deliveries, or has answered with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _has_suspect(deliveries: Sequence[Delivery]) -> bool:
    return any(delivery.crashes >= SUSPECT for delivery in deliveries)
