"""The scheduler: sends the runs of schedules when they are due.

Any number of schedulers work side by side, and none is special. Each looks for due schedules, makes
the messages of their runs, and asks the store for one step: "if this schedule still has the
revision that I saw, move it on and store these messages". Of several schedulers that see the same
run one succeeds, so that it is sent once. One that dies at any moment leaves nothing behind that
another would have to wait for: either the step happened, or it did not.

::

    look for due schedules ─▶ for each, in a task of its own: plan ─ overlap? ─ messages ─▶ swap
     ▲                                                                                       │
     └── sleep until the next is due, at most a second, as others may add schedules ◀────────┘

A schedule that fails, or hangs in a middleware, is tried again by itself and holds up no other. One
that cannot be read is *parked*: it stays in the store and is not due any more. A
scheduler whose step came second waits some milliseconds longer the next time (`_POLITE`): where
many run, one does most of the work, and the others save their queries.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from types import TracebackType
from typing import Self

from msgspec.structs import replace

from aiotaskq import forks
from aiotaskq.backoff import Backoff
from aiotaskq.client.outbox import Outbox
from aiotaskq.client.outbox_relay import OutboxRelay
from aiotaskq.client.prepare import PreparedMessage, check_traits, prepare, seal
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Envelope, Message
from aiotaskq.contract.records import StoredSchedule
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.errors import AioTaskQError, ConfigError, Unavailable
from aiotaskq.events import Sent
from aiotaskq.ids import host_name
from aiotaskq.middleware import wrap_send
from aiotaskq.readable import get_logger
from aiotaskq.recurrence import Plan, plan
from aiotaskq.scheduling.record import ScheduleRecord, UnreadableSchedule, parked, read
from aiotaskq.scheduling.schedules import synchronize
from aiotaskq.tasks.application import Application

logger = get_logger("aiotaskq.scheduler")

_LOOK = 1.0  # seconds between looks, at most: new schedules are found by looking
_AT_ONCE = 1000  # schedules whose runs are sent at the same time, those that hang included
_MOST_RUNS = 500  # runs of one schedule in one step
_PATIENCE = 30.0  # seconds in which the runs of one schedule are to be made and stored
_PAUSES = (0.1, 5.0)  # seconds: the first pause while the store is away, and the longest
_RESTS = (1.0, 60.0)  # the same for one schedule that has failed
_POLITE = 0.05  # seconds, at most, by which a scheduler waits longer after it came second


class _RelayOutage:
    """The times at which runs cannot be passed on to the broker."""

    def __init__(self) -> None:
        self._backoff = Backoff(*_PAUSES)
        self._told: type[Exception] | None = None

    def pause(self, error: Exception) -> float:
        if type(error) is not self._told:  # a wrong password may come to light after an outage
            self._told = type(error)
            logger.warning("runs wait to be passed on to the broker, trying again: %s", error)
        return self._backoff.next()

    def over(self) -> None:
        if self._backoff.failures:
            self._backoff.reset()
            self._told = None
            logger.warning("runs are passed on to the broker again")


class Scheduler:
    """Sends the due runs of an application's schedules, from the running event loop.

    There are two ways to run a scheduler. ``async with scheduler:`` starts it on entry and stops it
    on exit; ``await scheduler.run()`` returns when it was told to `stop`. It waits out a broker
    that cannot be reached.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._stopping = asyncio.Event()
        self._wake = asyncio.Event()
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, tuple[float, Backoff]] = {}  # by id; the first: when to try again
        self._polite = 0.0
        self.parked = 0
        """The number of schedules that this scheduler could not read and has parked."""
        self._main: asyncio.Task[None] | None = None
        self._relaying: asyncio.Task[None] | None = None

    @cached_property
    def _broker(self) -> Broker:
        """The broker of the application, not opened: its traits are of interest."""
        return self._app.drivers()[0]

    async def run(self, *, patient: bool = True) -> None:
        """Send due runs until told to stop; runs that are being sent then are finished.

        Args:
            patient: Whether to wait for a broker that cannot be reached at the beginning.

        Raises:
            ConfigError: A schedule of the code is wrong, or the broker keeps no schedules.
            BrokerUnavailable: It cannot be reached, and the scheduler is not patient.
        """
        forks.guard(asyncio.get_running_loop())
        try:
            store = await self._prepare(patient=patient)
            if store is not None:
                self._start_relay()
                logger.info("scheduler ready")
                await self._serve(store)
        finally:
            await self._finish()

    def stop(self) -> None:
        """Tell `run` to return. To be called in its own event loop."""
        self._stopping.set()
        self._wake.set()

    async def __aenter__(self) -> Self:
        """Start in the background."""
        self._main = asyncio.create_task(self.run(), name="aiotaskq-scheduler")
        self._main.add_done_callback(_tell_failure)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and raise the error with which it failed."""
        self.stop()
        if self._main is not None:
            await self._main

    # The loop

    async def _prepare(self, *, patient: bool) -> ScheduleStore | None:
        """Return the store, brought in line with the code; None if told to stop before that."""
        backoff = Backoff(*_PAUSES)
        while not self._stopping.is_set():
            try:
                store = await self._app.schedule_store()
                put, removed = await synchronize(store, self._app, self._app.declared_schedules())
            except ConfigError:
                raise
            except Exception as error:  # a fault of a driver included: it may pass
                if not patient:
                    raise
                await self._outage(error, backoff)
                continue
            for what, ids in (("put", put), ("removed", removed)):
                if ids:
                    logger.info("schedules of the code %s: %s", what, ", ".join(ids))
            return store
        return None

    async def _serve(self, store: ScheduleStore) -> None:
        backoff = Backoff(*_PAUSES)
        while not self._stopping.is_set():
            self._wake.clear()
            # Busy and failed schedules are due as well: they must not keep others out.
            limit = _AT_ONCE + len(self._busy) + len(self._failed)
            asked = asyncio.get_running_loop().time()
            try:
                found = await store.due(limit)
            except Exception as error:  # whatever the store holds, the other runs are wanted
                await self._outage(error, backoff)
                continue
            backoff.reset()
            # A failed schedule that is not due any more was removed or paused.
            due = {stored.id for stored in found.schedules}
            self._failed = {name: told for name, told in self._failed.items() if name in due}
            for stored in found.schedules:
                self._begin(store, stored, found.now)
            await self._rest(asked, found.now, found.next_at)

    async def _outage(self, error: Exception, backoff: Backoff) -> None:
        """Wait while the store is away, longer each time."""
        if not backoff.failures:
            fault = None if isinstance(error, AioTaskQError) else error
            logger.warning("no runs can be sent now, trying again: %s", error, exc_info=fault)
        await self._sleep(backoff.next())

    async def _rest(self, asked: float, now: float, next_at: float | None) -> None:
        """Wait until something may be due."""
        until = asked + _LOOK
        if next_at is not None and next_at - now < _LOOK:
            until = asked + next_at - now + self._polite * random.random()
        until = min([until, *(again for again, _ in self._failed.values())])
        await self._sleep(until - asyncio.get_running_loop().time())

    async def _sleep(self, seconds: float) -> None:
        """Sleep, unless something was sent, or it is told to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.001)):
                await self._wake.wait()

    async def _finish(self) -> None:
        if self._busy:
            await asyncio.wait(self._busy.values(), timeout=_PATIENCE)
        for task in self._busy.values():
            task.cancel()
        if self._relaying is not None:
            self._relaying.cancel()
            await asyncio.wait([self._relaying])

    # The relay

    def _start_relay(self) -> None:
        """Pass runs on to the broker, where they are stored elsewhere than there."""
        store = self._app.schedule_broker()
        if store is not None:
            logger.info("schedules are stored at %s, and their runs wait there", store.url)
            self._relaying = asyncio.create_task(self._relay(store), name="aiotaskq-relay")
            self._relaying.add_done_callback(_tell_failure)

    async def _relay(self, store: Broker) -> None:
        outage, broker = _RelayOutage(), None
        while broker is None:
            try:
                broker = await self._app.broker()
            except Exception as error:  # a wrong setting too: somebody may mend it, and runs wait
                if not isinstance(error, AioTaskQError):
                    logger.exception("the broker cannot be opened, trying again")
                await asyncio.sleep(outage.pause(error))
        name = f"{host_name()}:{os.getpid()} scheduler"
        lease = self._app.conf.worker_lease
        await OutboxRelay(Outbox(store), broker, outage, name=name, lease=lease).run()

    # One schedule

    def _begin(self, store: ScheduleStore, stored: StoredSchedule, now: float) -> None:
        failed = self._failed.get(stored.id)
        if failed is not None and asyncio.get_running_loop().time() < failed[0]:
            return
        if stored.id in self._busy:
            return
        if len(self._busy) >= _AT_ONCE:
            return
        self._busy[stored.id] = asyncio.create_task(self._attempt(store, stored, now))

    async def _attempt(self, store: ScheduleStore, stored: StoredSchedule, now: float) -> None:
        """Send the due runs of one schedule; whatever goes wrong concerns no other."""
        try:
            async with asyncio.timeout(_PATIENCE):
                first = await self._send_or_park(store, stored, now)
        except Exception as error:
            self._note_failure(stored.id, error)
        else:
            self._failed.pop(stored.id, None)
            self._polite = 0.0 if first else _POLITE
        finally:
            del self._busy[stored.id]
            self._wake.set()

    async def _send_or_park(self, store: ScheduleStore, stored: StoredSchedule, now: float) -> bool:
        try:
            return await self._send(store, stored, now)
        except UnreadableSchedule as error:
            if not await store.compare_and_swap(stored.id, stored.revision, parked(stored)):
                # Another scheduler was faster; or the store cannot find what it has returned, and
                # the schedule rests longer and longer.
                raise
            self.parked += 1
            logger.error("a schedule is parked: %s", error)
            return True

    def _note_failure(self, schedule_id: str, error: Exception) -> None:
        failed = self._failed.get(schedule_id)
        backoff = Backoff(*_RESTS, jitter=False) if failed is None else failed[1]
        rest = backoff.next()
        self._failed[schedule_id] = asyncio.get_running_loop().time() + rest, backoff
        if isinstance(error, UnreadableSchedule):
            level = logging.ERROR if failed is None else logging.DEBUG  # it stays like that
            logger.log(level, "%s", error)
        elif isinstance(error, Unavailable):
            logger.warning("the runs of %s cannot be sent now: %s", schedule_id, error)
        elif isinstance(error, TimeoutError):
            logger.error(
                "the runs of %s could not be sent within %g s: a middleware hangs, or a server;"
                " trying again in %g s",
                schedule_id,
                _PATIENCE,
                rest,
            )
        else:
            logger.error(
                "the runs of %s cannot be sent; trying again in %g s",
                schedule_id,
                rest,
                exc_info=error,
            )

    async def _send(self, store: ScheduleStore, stored: StoredSchedule, now: float) -> bool:
        """Send the due runs of one schedule; return whether no other scheduler was faster."""
        record = read(stored)
        due = record.state.due
        if due is None or record.state.paused:  # then it should not be due
            await store.compare_and_swap(stored.id, stored.revision, record.stored(stored.id))
            return True
        definition = record.definition
        planned = plan(
            definition.timing,
            stored.id,
            due,
            now,
            misfire=definition.misfire,
            grace=definition.grace,
            most=_MOST_RUNS,
        )
        runs = await self._without_overlap(record, planned.runs, now)
        messages, envelopes = await self._write(stored.id, record, runs)
        moved = _moved(stored.id, record, planned, runs, now)
        # A schedule that was made at run time and has no more runs would stay for ever.
        ended = planned.next_due is None and not definition.owner
        new = None if ended else moved.stored(stored.id)
        if not await store.compare_and_swap(stored.id, stored.revision, new, envelopes):
            return False
        self._tell(stored.id, record, planned, runs, messages)
        return True

    async def _without_overlap(
        self, record: ScheduleRecord, runs: Sequence[float], now: float
    ) -> Sequence[float]:
        """Return the runs that may be sent, given whether the run before has ended."""
        if record.definition.overlap == "allow" or not runs:
            return runs
        return [] if await self._is_unfinished(record, now) else runs[-1:]

    async def _is_unfinished(self, record: ScheduleRecord, now: float) -> bool:
        backend = await self._app.backend()
        state = record.state
        if backend is None or state.last_id is None or state.last_at is None:
            return False
        outcome = (await backend.load([state.last_id])).get(state.last_id)
        if outcome is not None:
            return not outcome.status.final
        # It has not ended, or it ended so long ago that its result is gone.
        kept = self._app.conf.result_expires
        return kept is None or now - state.last_at < kept

    async def _write(
        self, schedule_id: str, record: ScheduleRecord, runs: Sequence[float]
    ) -> tuple[list[Message], list[Envelope]]:
        """Return the messages of runs that the middleware lets through, and their envelopes."""
        app = self._app
        broker = self._broker
        messages: list[Message] = []
        envelopes: list[Envelope] = []
        for due in runs:
            call = record.definition.call({"task_id": run_id(schedule_id, due)})
            # Not unique: the swap sends a run once, at no further cost.
            prepared = prepare(call, app)._replace(unique=False)
            check_traits(prepared, broker.traits, broker.url)

            async def keep(message: Message, prepared: PreparedMessage = prepared) -> None:
                messages.append(message)
                envelopes.append(seal(prepared.with_message(message), app.codec))

            await wrap_send(app.middlewares, keep)(prepared.message)
        return messages, envelopes

    def _tell(
        self,
        schedule_id: str,
        record: ScheduleRecord,
        planned: Plan,
        runs: Sequence[float],
        messages: Sequence[Message],
    ) -> None:
        if planned.missed:
            logger.warning(
                "nobody sent the runs of %s in time since %s; misfire=%r: %d of them sent now",
                schedule_id,
                _iso(record.state.due or 0.0),
                record.definition.misfire,
                len(runs),
            )
        elif len(runs) < len(planned.runs):
            logger.info("left out %s: its last run has not ended", schedule_id)
        for message in messages:
            logger.info("sent %s of %s", message, schedule_id)
            if self._app.observers.heard(Sent):
                self._app.observers.emit(Sent(message=message))


def run_id(schedule_id: str, due: float) -> str:
    """Return the id of the task of one run; it is the same for all schedulers."""
    return f"{schedule_id}@{_iso(due)}"


def _iso(moment: float) -> str:
    text = datetime.fromtimestamp(moment, UTC).replace(tzinfo=None).isoformat()
    return f"{text.rstrip('0')}Z" if "." in text else f"{text}Z"


def _moved(
    schedule_id: str, record: ScheduleRecord, planned: Plan, runs: Sequence[float], now: float
) -> ScheduleRecord:
    """Return the record of a schedule after its runs were sent or left out."""
    state = replace(
        record.state,
        due=planned.next_due,
        runs=record.state.runs + len(runs),
        skipped=record.state.skipped + len(planned.runs) - len(runs) + planned.missed,
    )
    if runs:
        last = runs[-1]
        state = replace(state, last_due=last, last_at=now, last_id=run_id(schedule_id, last))
    return replace(record, state=state)


def _tell_failure(main: asyncio.Task[None]) -> None:
    """Log at once that the scheduler failed; its error is raised only on exit."""
    error = None if main.cancelled() else main.exception()
    if error is not None:
        logger.error("the scheduler failed", exc_info=error)
