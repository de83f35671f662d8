"""The state of a random history, and the operations that its rules are made of.

Theory of operation. A history changes the broker and the model in the same order, one step after
the other, on one event loop; so the model is exact between two steps. A step that calls the broker
in two ways at once, or cancels a call, accepts each outcome that the contract allows, and tells the
model which one came. Where messages travel between processes (no trait `order`) the broker may
agree with the model only after a moment: `_eventually` waits for that.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from hypothesis.stateful import RuleBasedStateMachine

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import DeadLetter, DeadLimits, Depth, Maintained
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.testing.conformance.harness import BrokerHarness, LethalHarness
from aiotaskq.testing.conformance.rig import MOMENT, PATIENCE, maintain
from aiotaskq.testing.model.state import LEASE, QUEUES, UNIT, Copy, ModelState, ModelWorker

_SOON = 5.0  # seconds until a broker without the trait `order` agrees

Value = TypeVar("Value")
Kind: TypeAlias = Literal["done", "again", "later", "dead", "release"]


class BrokerMachine(RuleBasedStateMachine):
    """The broker, the model and the consumers of one history, and operations on them."""

    def __init__(self) -> None:
        super().__init__()
        self.outer_exception = sys.exc_info()[1]  # handled by the caller of the history
        self.runner = asyncio.Runner()
        self.workers: list[ModelWorker] = []
        self.numbers = itertools.count()
        self.harness: BrokerHarness
        self.broker: Broker
        self.model: ModelState

    async def open_harness(self) -> BrokerHarness:
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        return self.runner.run(work)

    @property
    def leases(self) -> bool:
        """Return whether leases run out by a clock, and may be ended by others."""
        return self.broker.traits.leases

    def _worker(self, number: int) -> ModelWorker:
        return self.workers[number % len(self.workers)]

    async def _open_worker(self, queues: Sequence[str]) -> ModelWorker:
        broker = await self.harness.broker()
        consumer = broker.consumer(queues, name="model", lease=LEASE)
        await consumer.open()
        return ModelWorker(broker, consumer, tuple(queues), self.model.units)

    def _replace(self, worker: ModelWorker, queues: Sequence[str]) -> None:
        self.run(worker.consumer.close())
        self.model.close(worker)
        place = self.workers.index(worker)
        self.workers[place] = self.run(self._open_worker(queues))

    def _new_copy(self, name: int | None, queue: str, priority: int, delay: int, life: int) -> Copy:
        number = next(self.numbers)
        known = f"id of {number}" if name is None else f"id {name}"
        if not self.broker.traits.priorities:
            priority = 0
        if not self.broker.traits.clock:  # its clock cannot be moved: hours would really pass
            delay = life = 0
        return Copy(number, known, queue, priority, delay=delay, life=life)

    def _settlement(
        self, delivery: Delivery, copy: Copy, kind: Kind, now: float
    ) -> tuple[Settlement, Copy | None]:
        if kind == "done":
            return Done(delivery), None
        if kind == "dead":
            return Dead(delivery, f"reason of {copy.number}", b"details"), None
        if kind == "release":
            return Release(delivery), None
        new = self._new_copy(None, copy.queue, copy.priority, 1 if kind == "later" else 0, 0)
        new.id = copy.id
        return Again(delivery, new.envelope(now, relative=bool(new.number % 2))), new

    def _apply_settlement(self, copy: Copy, kind: Kind, new: Copy | None) -> None:
        if kind == "release":
            self.model.give_back(copy)
            return
        copy.state = "gone"
        if kind == "dead":
            self.model.add_dead_letter(copy)
        if new is not None:
            self.model.store(new)

    def _queue_with_dead_letters(self, number: int) -> str:
        return self.model.dead_letters[-1 - number % len(self.model.dead_letters)].queue

    def _read_dead_letters(self, queue: str) -> list[Copy]:
        """Read all dead letters of a queue, one by one, and note their keys."""
        mine = [one for one in self.model.dead_letters if one.queue == queue][::-1]
        pages: list[DeadLetter] = []
        before = None
        while page := self.run(self.broker.dead(queue, 1, before=before)):
            pages += page
            before = page[-1].key
        assert [(one.id, int(one.body)) for one in pages] == [(one.id, one.number) for one in mine]
        for letter, copy in zip(pages, mine, strict=True):
            assert letter.crashes == copy.crashes
            assert copy.key in ("", letter.key), "the key of a letter changed"
            copy.key = letter.key
        return mine

    def _check_suspect_news(self, worker: ModelWorker) -> None:
        async def check() -> None:
            news = await worker.consumer.news()
            wait = any(one.suspect for one in self.model.ready_for(worker))
            # Without order a suspect is known when a consumer comes upon it.
            late = not self.model.ordered
            assert late or news.suspects is wait or any(self.model.cancelled_waiting.values())

        self.run(self._eventually(check))

    async def _fetch(self, worker: ModelWorker, limit: int, order: Sequence[str] | None) -> None:
        """Fetch up to `limit` ready copies: without order another may hold them for a moment."""
        expected = self.model.expected(worker, limit)
        got = await worker.consumer.fetch(limit, 0, order=order)
        self.model.check_deliveries(worker, got, order)
        if self.model.ordered:
            assert len(got) in expected, "a batch of another size than what is there"
            return
        count = len(got)
        async with asyncio.timeout(PATIENCE):
            while count < min(expected):
                more = await worker.consumer.fetch(limit - count, MOMENT, order=order)
                self.model.check_deliveries(worker, more, order)
                count += len(more)

    async def _kill(self, worker: ModelWorker) -> int:
        """End a consumer of a broker without the trait `leases`."""
        assert isinstance(self.harness, LethalHarness)
        await self._eventually(self._check_depths)
        return await self.harness.kill(worker.consumer)

    async def _check_depths(self) -> None:
        depths = await self.broker.depth()
        assert set(depths) <= set(QUEUES)
        for queue in QUEUES:
            self.model.check_depth(queue, depths.get(queue, Depth()))

    async def _eventually(self, check: Callable[[], Awaitable[None]]) -> None:
        """Run a check until it passes: at once with the trait `order`, else within `_SOON`."""
        end = time.monotonic() + (0.0 if self.model.ordered else _SOON)
        while True:
            try:
                return await check()
            except AssertionError:
                if time.monotonic() >= end:
                    raise
                await asyncio.sleep(MOMENT / 10)

    async def _wait_for_cancel_news(self, worker: ModelWorker, name: str) -> None:
        told: set[str] = set()
        async with asyncio.timeout(PATIENCE):
            while name not in told:
                told |= set((await worker.consumer.news()).cancelled)
                await asyncio.sleep(0)

    async def _drain(self) -> None:
        """Check that one consumer gets all copies that are left, also those of a dead consumer."""
        for worker in self.workers[1:]:
            await worker.consumer.close()
            self.model.close(worker)
        first = self.workers[0] if self.workers and self.workers[0].alive else None
        if first is not None and not self.leases:
            await self._kill(first)
        if first is not None:
            self.model.give_up(first, None)
        if self.broker.traits.clock:
            self.model.units += 4
            await self.harness.pass_time(4 * UNIT)
            self.model.promote()
        last = await self._open_worker(QUEUES)
        self.workers.append(last)
        for _ in range(len(self.model.copies) + 2):  # each call brings one copy at least
            await maintain(self.broker, DeadLimits(most=0))
            patient = not self.model.ordered and any(one.waits for one in self.model.copies)
            got = await last.consumer.fetch(100, MOMENT if patient else 0)
            self.model.check_deliveries(last, got)
            assert not await last.consumer.settle([Done(one) for one in got])
            for copy in self.model.held_by(last):
                copy.state = "gone"
        waiting = [one.number for one in self.model.copies if one.waits]
        assert not waiting, f"never handed out: {waiting}"
        for worker in self.workers:
            await worker.consumer.close()
        assert await maintain(self.broker) == Maintained()

        async def empty() -> None:
            assert await self.broker.depth() == {}

        await self._eventually(empty)

    async def _close(self) -> None:
        """Close everything, also after a failure: other histories are played after this one."""
        for worker in self.workers:
            await worker.consumer.close()
        if hasattr(self, "harness"):
            await self.harness.close()
