"""The last step of every task: its outcome is stored, then its delivery is settled, in batches.

::

    add ──▶ waiting ──▶ under way: store(outcomes), then settle(settlements) ──▶ gone
                            ▲ repeated while a server is away and the lease is alive

- Results go before settlements. A crash in between runs the task again; in the other order its
  result would be lost.
- There is no timer. While one batch is under way, the tasks that end gather for the next one: an
  idle worker completes at once, a busy one in bulk.
- Before each call the heartbeat says whether the lease is trusted. Once it is lost, the deliveries
  belong to other workers: nothing more is stored or settled, and the outcomes count as refused.
- Both calls may be repeated after an error whose effect is unknown: the first final outcome of an
  id stays, and a receipt settles once.
- An outcome or a settlement that is refused for good never stops the others, nor the worker. The
  outcome is replaced by a failure that says so, the settlement by a dead letter. A delivery that
  cannot even become one stays held: it goes back when the worker ends.
- A `ConfigError` says that the set-up does not work any more, and is waited out as an outage is,
  since somebody may mend it. If others of the same batch take effect, then it was about the entry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from aiotaskq.contract.broker import Consumer
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.results import ResultBackend, Transaction, TransactionalResults
from aiotaskq.contract.settlement import Dead, Settlement
from aiotaskq.encoding.exceptions import describe, encode_error
from aiotaskq.errors import BatchRefused, ConfigError, Unavailable, Unsupported
from aiotaskq.readable import get_logger, on_one_line
from aiotaskq.worker.health import Health, Outage
from aiotaskq.worker.heartbeat import Heartbeat

logger = get_logger("aiotaskq.worker")

T = TypeVar("T")
Entry = TypeVar("Entry", Outcome, Settlement)

_BATCH = 1000  # deliveries settled in one call
_MOST_WAITING = 10_000  # tasks that have ended and wait to be settled, and
_MOST_BYTES = 64 * 1024 * 1024  # bytes of their results, at which the worker fetches no more
_MOST_DOUBTFUL = 10  # entries that fail before the set-up counts as broken
_SHORT = 200  # characters of a reason that every store can keep
_PAUSES = (0.05, 5.0)  # seconds: the first pause while a server is away, and the longest


class _TakenAway(Exception):
    """The lease was lost before the outcomes of a batch were stored."""


class _SetUpBroken(Exception):
    """No entry took effect, as the set-up does not work any more."""

    def __init__(self, error: ConfigError, left: Sequence[Any]) -> None:
        self.error = error
        self.left = left  # the entries that have not taken effect


class Completer:
    """Stores outcomes and settles deliveries for one consumer.

    Args:
        consumer: The consumer whose deliveries are settled.
        backend: Where outcomes are stored; None: they are not.
        heartbeat: Knows whether the lease of the consumer is alive.
        health: Hears of servers that are away, and of refused outcomes.
        ttl: Seconds for which a result is kept; None: for ever.
    """

    def __init__(
        self,
        consumer: Consumer,
        backend: ResultBackend | None,
        heartbeat: Heartbeat,
        health: Health,
        *,
        ttl: float | None,
    ) -> None:
        self._consumer = consumer
        self._backend = backend
        self._heartbeat = heartbeat
        self._health = health
        self._ttl = ttl
        self._storing = Outage(
            health, "finished tasks wait for their results to be stored", _PAUSES
        )
        self._settling = Outage(health, "finished tasks wait to be settled", _PAUSES)
        self._full = Outage(health, "finished tasks wait for room in a queue", _PAUSES)
        # Settlements that found their queue full. They are tried again with what ends by then.
        self._no_room: list[Settlement] = []
        self._trying_again: asyncio.TimerHandle | None = None
        self._outcomes: list[Outcome] = []
        self._settlements: list[Settlement] = []
        # What is done, by the identity of a delivery, if its settlement is refused for good.
        self._on_refused: dict[int, Callable[[Exception], None]] = {}
        self._under_way = 0
        self._settled = 0  # batches, for `settled`
        self._size = 0  # bytes of results that wait to be stored
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()  # a batch has
        self._idle = asyncio.Event()
        self._idle.set()

    def add(
        self,
        settlement: Settlement | None,
        outcome: Outcome | None = None,
        *,
        on_refused: Callable[[Exception], None] | None = None,
    ) -> None:
        """Accept the settlement and outcome of a task that has ended, or an interim outcome.

        Args:
            settlement: The settlement; None: the task has not ended.
            outcome: The outcome, which is stored before.
            on_refused: Called with the reason if the broker refuses the settlement for good; it
                adds another one.
        """
        if outcome is not None and self._backend is not None:
            self._outcomes.append(outcome)
            self._size += memoryview(outcome.result).nbytes
        if settlement is not None:
            self._settlements.append(settlement)
            if on_refused is not None:
                self._on_refused[id(settlement.delivery)] = on_refused
        self._idle.clear()
        self._wake.set()

    @property
    def keeps_results(self) -> bool:
        """Return whether outcomes are stored at all."""
        return self._backend is not None

    @property
    def wants_arguments(self) -> bool:
        """Return whether outcomes should carry the task's arguments."""
        return self._backend is not None and self._backend.wants_arguments

    async def begin(self) -> Transaction:
        """Begin a transaction in which a task writes, and in which its outcome is stored.

        Raises:
            Unsupported: The result backend has no transactions.
            BackendUnavailable: Its server cannot be reached now.
        """
        if not isinstance(self._backend, TransactionalResults):
            where = "no results are kept" if self._backend is None else self._backend.url
            raise Unsupported(
                "a task's transaction() is one of the result backend's, which has to be"
                f" postgresql://, and not {where}: set result_backend"
            )
        return await self._backend.begin()

    async def earlier(self, task_id: str) -> Outcome | None:
        """Return the final outcome that a task already has; None: it has none, or it is unknown."""
        if self._backend is None:
            return None
        try:
            outcome = (await self._backend.load([task_id])).get(task_id)
        except Exception as error:  # a store that fails is no reason not to run it
            logger.warning("cannot look whether %s has ended before: %r", task_id, error)
            return None
        return outcome if outcome is not None and outcome.status.final else None

    @property
    def backlog(self) -> int:
        """The number of tasks that have ended and are not settled yet."""
        return len(self._settlements) + self._under_way

    @property
    def unsettled(self) -> int:
        """The same, and those that wait for room in a queue while others are settled."""
        return self.backlog + len(self._no_room)

    @property
    def full(self) -> bool:
        """Return whether so much waits to be stored that no more tasks should be run."""
        return self.unsettled >= _MOST_WAITING or self._size >= _MOST_BYTES

    @property
    def idle(self) -> bool:
        """Return whether there is nothing to do, but to wait for room in a queue."""
        return self._idle.is_set()

    async def drained(self) -> None:
        """Wait until all that was added is stored and settled, or waits for room in a queue."""
        await self._idle.wait()

    async def finished(self) -> None:
        """Wait until all that was added is stored and settled."""
        while self._no_room or not self.idle:
            self._ended.clear()
            await self._ended.wait()

    async def settled(self) -> None:
        """Wait until all that was added before is settled; more may be added meanwhile."""
        batches = -(-len(self._settlements) // _BATCH) + (self._under_way > 0)
        last = self._settled + batches
        while self._settled < last:
            self._ended.clear()
            await self._ended.wait()

    async def run(self) -> None:
        """Complete tasks as they are added, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outcomes or self._settlements:
                await self._complete_batch()
            self._idle.set()
            self._ended.set()

    async def _complete_batch(self) -> None:
        # An outcome is added together with its settlement, so taking all of the former with
        # a part of the latter can only store early, never settle early.
        outcomes, self._outcomes = self._outcomes, []
        size = self._size
        settlements = self._settlements[:_BATCH]
        del self._settlements[:_BATCH]
        self._under_way = len(settlements)
        refused: set[str] = set()
        stored, broken = False, None
        try:
            if outcomes:
                refused.update(await self._store(outcomes))
            stored = True
            if settlements:
                refused.update(delivery.id for delivery in await self._settle(settlements))
        except _TakenAway:
            refused.update(settlement.delivery.id for settlement in settlements)
        except _SetUpBroken as error:
            broken = error
        finally:
            self._under_way = 0
            self._settled += bool(settlements)
            self._ended.set()
            self._size -= size
        if refused:
            self._health.refused(refused)
        if broken is None:
            self._forget_refusals(settlements)
        elif stored:
            await self._put_back((), broken.left, broken.error, self._settling)
        else:
            await self._put_back(broken.left, settlements, broken.error, self._storing)

    def _forget_refusals(self, settled: Sequence[Settlement]) -> None:
        if self._on_refused:
            waiting = {id(one.delivery) for one in self._no_room}
            for one in settled:
                if id(one.delivery) not in waiting:
                    self._on_refused.pop(id(one.delivery), None)

    async def _put_back(
        self,
        outcomes: Sequence[Outcome],
        settlements: Sequence[Settlement],
        error: ConfigError,
        outage: Outage,
    ) -> None:
        """Wait with what did not take effect; what ends meanwhile joins it for another try."""
        self._outcomes[:0] = outcomes
        self._size += sum(memoryview(one.result).nbytes for one in outcomes)
        self._settlements[:0] = settlements
        await asyncio.sleep(outage.pause(error))

    async def _settle(self, batch: Sequence[Settlement]) -> Collection[Delivery]:
        gone = await self._apply(
            batch, self._consumer.settle, self._settling, self._settle_otherwise
        )
        if not self._no_room:
            self._full.over()
        return gone

    def _try_again(self) -> None:
        self._trying_again = None
        self._settlements += self._no_room
        self._no_room.clear()
        self._idle.clear()
        self._wake.set()

    async def _settle_otherwise(self, one: Settlement, why: Exception) -> Collection[Delivery]:
        """Add another settlement in place of one that the broker refuses."""
        if isinstance(why, Unavailable):  # such as a queue without room: not for good
            self._no_room.append(one)
            if self._trying_again is None:
                pause = self._full.pause(why)
                loop = asyncio.get_running_loop()
                self._trying_again = loop.call_later(pause, self._try_again)
            return ()
        logger.error("the broker refuses to settle %s: %s", on_one_line(one.delivery.id), why)
        self._health.counts["unsettled"] += 1
        on_refused = self._on_refused.pop(id(one.delivery), None)
        if on_refused is not None:
            on_refused(why)
        elif isinstance(one, Dead) and (one.details or len(one.reason) > _SHORT):
            self.add(Dead(one.delivery, one.reason[:_SHORT]))
        else:
            logger.error(
                "%s stays with this worker, and goes back when it ends",
                on_one_line(one.delivery.id),
            )
        return ()

    async def _store(self, outcomes: Sequence[Outcome]) -> Collection[str]:
        backend = self._backend
        assert backend is not None  # add() takes no outcome otherwise

        refused = await self._apply(
            outcomes,
            lambda batch: backend.store(batch, self._ttl),
            self._storing,
            partial(self._store_otherwise, backend),
        )
        # The caller that cancelled a task has stored its outcome already: nothing is lost.
        revoked = {one.task_id for one in outcomes if one.status is TaskStatus.REVOKED}
        return set(refused) - revoked

    async def _apply(
        self,
        batch: Sequence[Entry],
        call: Callable[[Sequence[Entry]], Awaitable[Collection[T]]],
        outage: Outage,
        otherwise: Callable[[Entry, Exception], Awaitable[Collection[T]]],
    ) -> list[T]:
        """Apply a batch, and replace the entries that are refused for good; return the answers.

        Raises:
            _TakenAway: Other workers have the deliveries.
            _SetUpBroken: No entry takes effect, as far as could be seen.
        """
        refused: Mapping[int, Exception]
        try:
            return list(await self._persist(lambda: call(batch), outage))
        except _TakenAway:
            raise
        except BatchRefused as error:
            answers, refused = list(error.answer), error.errors
        except Exception as error:
            if len(batch) > 1:
                return await self._apply_each(batch, call, outage, otherwise)
            if isinstance(error, ConfigError) and not isinstance(error, Unsupported):
                raise _SetUpBroken(error, batch) from None
            answers, refused = [], {0: error}
        for at, why in refused.items():
            answers += await otherwise(batch[at], why)
        return answers

    async def _apply_each(
        self,
        batch: Sequence[Entry],
        call: Callable[[Sequence[Entry]], Awaitable[Collection[T]]],
        outage: Outage,
        otherwise: Callable[[Entry, Exception], Awaitable[Collection[T]]],
    ) -> list[T]:
        """Apply a batch one by one, to see which entries are at fault."""
        answers: list[T] = []
        doubtful: list[tuple[Entry, ConfigError]] = []
        at: int  # mypy: the type variable has two values
        for at, one in enumerate(batch):
            try:
                answers += await self._apply([one], call, outage, otherwise)
            except _SetUpBroken as broken:
                doubtful.append((one, broken.error))
                if len(doubtful) == at + 1 and (at + 1 == len(batch) or at + 1 == _MOST_DOUBTFUL):
                    # Those that were tried come last the next time: others may take effect.
                    left = [*batch[at + 1 :], *batch[: at + 1]]
                    raise _SetUpBroken(broken.error, left) from None
        for one, error in doubtful:  # others took effect, so the set-up works
            answers += await otherwise(one, error)
        return answers

    async def _store_otherwise(
        self, backend: ResultBackend, outcome: Outcome, why: Exception
    ) -> Collection[str]:
        """Store a failure in place of an outcome that cannot be stored; it says why."""
        logger.error("the result of %s cannot be stored", outcome.task_id, exc_info=why)
        result, traceback = describe(why)
        failure = msgspec.structs.replace(
            outcome, status=TaskStatus.FAILURE, result=result, traceback=traceback
        )
        try:
            return await self._persist(lambda: backend.store([failure], self._ttl), self._storing)
        except _TakenAway:
            raise
        except Exception:
            logger.exception(
                "nor can that, so its arguments and its history are left out: %s", outcome.task_id
            )
        return await self._store_bare(backend, failure)

    async def _store_bare(self, backend: ResultBackend, failure: Outcome) -> Collection[str]:
        """Store no more of a failure than has to be. Nobody is told if even that fails."""
        bare = Outcome(
            task_id=failure.task_id,
            status=failure.status,
            result=encode_error("EncodeError", "its outcome cannot be stored; see the log"),
            date_done=failure.date_done,
        )
        try:
            return await self._persist(lambda: backend.store([bare], self._ttl), self._storing)
        except _TakenAway:
            raise
        except Exception:  # it must not end the worker: it would end the next one as well
            logger.exception("%s has ended, and no outcome of it can be stored", bare.task_id)
            return ()

    async def _persist(self, call: Callable[[], Awaitable[T]], outage: Outage) -> T:
        """Make a call until its server can be reached, while the lease is alive.

        Raises:
            _TakenAway: Other workers have the deliveries.
        """
        while True:
            if not await self._heartbeat.alive():
                raise _TakenAway
            try:
                answer = await call()
            except Unavailable as error:
                pause = outage.pause(error)
            except BatchRefused:
                outage.over()
                raise
            else:
                outage.over()
                return answer
            await asyncio.sleep(pause)
