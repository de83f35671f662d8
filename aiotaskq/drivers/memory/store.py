"""The store that the drivers of one process share: messages and outcomes in plain containers.

Theory of operation. Each method takes the lock of the store for a moment and never waits. So any
number of event loops in any number of threads can work on one store, and no thread sees anything
half done. A process that dies takes the store with it, so nothing has to survive a crash. Between
two calls, another thread may call any other method, a caller may be cancelled, and its event loop
may be closed. *Invariants:*

- *A message is in exactly one place* of the picture below. A receipt names one hand-out; it is
  valid while the holder is alive and holds the item under it. So a settlement takes effect once or
  not at all.
- *A holder that has died never lives again.* All items that it holds go back, at once or in later
  rounds.
- *A change is either found or notified.* A consumer that finds nothing leaves a `MemoryWaiter` in
  the same step. Every method that changes something wakes the waiters that it concerns.

Two clocks: messages fall due and expire by the wall clock, as their senders name such times.
Leases, and the times for which ids are remembered, go by the monotonic clock.

The way of an envelope::

    publish ──▶ delayed ──▶ ready ──fetch──▶ held ──Done────▶ gone
                  due,      ▲  ▲              │││
                 to the     │  └──head────────┘│└──Dead────▶ dead letters
                  tail      │  Release, close, │                  │
                            │  lease lapsed    │                  │
                            ├──tail────────────┘                  │
                            │  Again                              │
                            └──tail───────────────────────────────┘
                               revive
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import (
    ConsumerInfo,
    DeadLetter,
    DeadLimits,
    Depth,
    DueSchedules,
    Maintained,
    News,
    StoredSchedule,
)
from aiotaskq.contract.settlement import Again, Dead, Release, Settlement
from aiotaskq.drivers.common.retention import CALLS_FOR, CANCELLED_IDS_FOR, UNIQUE_IDS_FOR
from aiotaskq.drivers.memory.notify import MemoryWaiter
from aiotaskq.drivers.memory.outcomes import MemoryOutcomes
from aiotaskq.drivers.memory.queues import PRIORITIES, MemoryHolder, MemoryItem, MemoryQueue
from aiotaskq.errors import LeaseLost

MOVED_AT_MOST = 1000
"""Moves of each kind in one call of `maintain`."""


class MemoryStore(MemoryOutcomes):
    """The messages, outcomes and schedules of the drivers of one process.

    Safe to use from any thread. It lives as long as something refers to it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of receipts and of dead letters; among delayed messages they tell which is older.
        self._numbers = itertools.count()
        self._queues: dict[str, MemoryQueue] = {}
        self._holders: dict[str, MemoryHolder] = {}  # by the id of the consumer
        self._unique: dict[str, float] = {}  # by id: when it is forgotten, the soonest first
        self._cancelled: dict[str, float] = {}  # the same
        self._calls: dict[str, tuple[float, list[str]]] = {}  # the same, and the answer
        self._schedules: dict[str, StoredSchedule] = {}

    def _tick(self) -> float:
        # A clock that nobody sets: a correction of the wall clock must not end leases.
        return time.monotonic() + self._time_shift

    # --- publishing -------------------------------------------------------------------------------

    def publish(self, batch: Sequence[Envelope], call_id: str | None) -> list[str]:
        with self._lock:
            tick = self._tick()
            if call_id is not None and (before := self._calls.get(call_id)) is not None:
                if before[0] > tick:
                    return list(before[1])
                del self._calls[call_id]  # so that the new one goes to the end
            refused = [one.id for one in batch if not self._accept(one, tick)]
            if call_id is not None:
                self._forget_old(tick)
                self._calls[call_id] = tick + CALLS_FOR, refused
            return list(refused)

    def _accept(self, envelope: Envelope, tick: float) -> bool:
        if envelope.unique:
            if self._unique.get(envelope.id, tick) > tick:
                return False
            self._claim(envelope.id, tick)
        self._add(envelope)
        return True

    def _claim(self, name: str, tick: float) -> None:
        self._unique.pop(name, None)  # so that it goes to the end
        self._unique[name] = tick + UNIQUE_IDS_FOR

    def _add(self, envelope: Envelope) -> None:
        """Put an envelope at the end of its queue, unless its id is cancelled."""
        if envelope.id in self._cancelled:
            return
        queue, now = self._queue(envelope.queue), self.now()
        item = MemoryItem(envelope, now)
        if item.due is not None and item.due > now:
            heapq.heappush(queue.delayed, (item.due, next(self._numbers), item))
        else:
            queue.level(item).append(item)
        # For a delayed one too: a waiting consumer has to learn until when it may wait.
        queue.wake_waiters()

    def _queue(self, name: str) -> MemoryQueue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = MemoryQueue()
        return queue

    def _forget_old(self, tick: float) -> None:
        """Forget ids and calls whose time is over. Each dict is in the order of these times."""
        for ids in (self._unique, self._cancelled):
            while ids and ids[first := next(iter(ids))] <= tick:
                del ids[first]
        while self._calls and self._calls[first := next(iter(self._calls))][0] <= tick:
            del self._calls[first]

    # --- fetching ---------------------------------------------------------------------------------

    def begin_lease(self, holder: MemoryHolder) -> None:
        """Begin a lease. A second call changes nothing: a lease that has ended stays ended."""
        with self._lock:
            if not holder.begun:
                holder.begun = holder.alive = True
                holder.deadline = self._tick() + holder.grant.seconds
                self._holders[holder.grant.consumer] = holder

    def renew(self, consumer: str) -> bool:
        with self._lock:
            holder = self._holders.get(consumer)
            if holder is None or not holder.alive:
                return False
            holder.deadline = self._tick() + holder.grant.seconds
            return True

    def consumers(self) -> list[ConsumerInfo]:
        with self._lock:
            tick = self._tick()
            return [one.info for one in self._holders.values() if one.alive and one.deadline > tick]

    def take(
        self,
        holder: MemoryHolder,
        limit: int,
        waiter: MemoryWaiter | None,
        order: Sequence[str] | None = None,
    ) -> list[Delivery]:
        """Hand out due messages; if there are none, register the waiter."""
        queues = holder.queues if order is None else order
        with self._lock:
            if not holder.alive:
                raise LeaseLost("the lease of this consumer has ended")
            now = self.now()
            taken = [] if holder.held else self._take_suspect(holder, queues, now)
            if not taken:
                taken = self._take_plain(holder, queues, limit, now)
            if waiter is not None and not taken:
                holder.waiters.add(waiter)
                for name in holder.queues:
                    self._queue(name).waiters.add(waiter)
            return taken

    def _take_suspect(
        self, holder: MemoryHolder, queues: Sequence[str], now: float
    ) -> list[Delivery]:
        for name in queues:
            queue = self._queues.get(name)
            if queue and (item := queue.pop_suspect()):
                return [self._hand(item, holder, now)]
        return []

    def _take_plain(
        self, holder: MemoryHolder, queues: Sequence[str], limit: int, now: float
    ) -> list[Delivery]:
        taken: list[Delivery] = []
        for name in queues:
            if queue := self._queues.get(name):
                queue.promote(now, MOVED_AT_MOST)
                for priority in PRIORITIES:
                    level = queue.levels.get(priority)
                    while level and len(taken) < limit:
                        taken.append(self._hand(level.popleft(), holder, now))
            if len(taken) == limit:
                break
        return taken

    def _hand(self, item: MemoryItem, holder: MemoryHolder, now: float) -> Delivery:
        receipt = next(self._numbers)
        holder.held[receipt] = item
        return item.delivery(receipt, now)

    def stop_waiting(self, holder: MemoryHolder, waiter: MemoryWaiter) -> None:
        """Remove a waiter."""
        with self._lock:
            holder.waiters.discard(waiter)
            for name in holder.queues:
                if queue := self._queues.get(name):
                    queue.waiters.discard(waiter)

    def next_due(self, holder: MemoryHolder) -> float | None:
        """Return the seconds until the next delayed message of a consumer falls due; None: none."""
        with self._lock:
            queues = [queue for name in holder.queues if (queue := self._queues.get(name))]
            due = min((one.delayed[0][0] for one in queues if one.delayed), default=None)
            return None if due is None else max(0.0, due - self.now())

    def news(self, holder: MemoryHolder) -> News:
        with self._lock:
            return News(cancelled=holder.news(), suspects=self._suspects_wait(holder))

    def _suspects_wait(self, holder: MemoryHolder) -> bool:
        queues = map(self._queues.get, holder.queues)
        return any(queue is not None and queue.suspects for queue in queues)

    # --- settling ---------------------------------------------------------------------------------

    def settle(self, holder: MemoryHolder, batch: Sequence[Settlement]) -> list[Delivery]:
        with self._lock:
            gone: list[Delivery] = []
            back: list[tuple[int, MemoryItem]] = []
            for one in batch:
                receipt = one.delivery.receipt
                item = holder.held.pop(receipt, None) if holder.alive else None
                if item is None:
                    gone.append(one.delivery)
                elif isinstance(one, Release):
                    back.append((receipt, item))
                elif isinstance(one, Dead):
                    self._bury(item, one)
                elif isinstance(one, Again):
                    self._replace(item, one.envelope)
            self._give_back(back)
            # A fetch of its own that waits may take suspects now that nothing is held.
            if holder.waiters and not holder.held and self._suspects_wait(holder):
                holder.wake_waiters()
            return gone

    def _replace(self, item: MemoryItem, envelope: Envelope) -> None:
        if not (item.cancelled and item.envelope.id == envelope.id):
            self._add(envelope)

    def _bury(self, item: MemoryItem, one: Dead) -> None:
        envelope, key = item.envelope, str(next(self._numbers))
        self._queue(envelope.queue).dead[key] = DeadLetter(
            key=key,
            id=envelope.id,
            queue=envelope.queue,
            body=envelope.body,
            reason=one.reason,
            crashes=item.crashes,
            died_at=self.now(),
            details=one.details,
        )

    def _give_back(self, items: Iterable[tuple[int, MemoryItem]]) -> None:
        """Put items at the head of their queues, in the order in which they were handed out."""
        for _, item in sorted(items, key=lambda pair: pair[0], reverse=True):
            if not item.cancelled:
                queue = self._queue(item.envelope.queue)
                queue.level(item).appendleft(item)
                queue.wake_waiters()

    def end_lease(self, holder: MemoryHolder) -> None:
        """End a lease in good order: messages that are held go back, and no crash is counted."""
        with self._lock:
            if holder.alive:
                del self._holders[holder.grant.consumer]
                holder.end()
                self._give_back(holder.held.items())
                holder.held.clear()

    # --- maintenance -----------------------------------------------------------------------------

    def cancel(self, ids: Collection[str], *, running: bool) -> set[str]:
        """Drop the messages that wait; return the ids that are left alone because they are held."""
        wanted = set(ids)
        with self._lock:
            spared = set() if running else wanted & self._held()
            for queue in self._queues.values():
                queue.drop(lambda item: item.envelope.id in wanted)
            if running:
                for holder in self._holders.values():
                    holder.cancel(wanted)
            until = self._tick() + CANCELLED_IDS_FOR
            for name in wanted - spared:
                self._cancelled.pop(name, None)  # so that it goes to the end
                self._cancelled[name] = until
            return spared

    def cancelled_among(self, ids: Collection[str]) -> set[str]:
        with self._lock:
            return {name for name in ids if name in self._cancelled}

    def _held(self) -> set[str]:
        """Return the ids of held messages that may come back."""
        return {
            item.envelope.id
            for holder in self._holders.values()
            for item in holder.held.values()
            if not item.cancelled
        }

    def give_up(self, consumer: str, note: str) -> int:
        """Give a consumer up for dead and take messages back; return their number."""
        with self._lock:
            holder = self._holders.get(consumer)
            if holder is None or not holder.alive:
                return 0
            holder.die(note)
            taken = self._take_back(holder, MOVED_AT_MOST)
            self._give_back(taken)
            return len(taken)

    def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        with self._lock:
            now, tick, promoted, trimmed = self.now(), self._tick(), 0, 0
            for name, queue in list(self._queues.items()):
                if moved := queue.promote(now, MOVED_AT_MOST - promoted):
                    promoted += moved
                    queue.wake_waiters()
                trimmed += queue.trim(limits, now, MOVED_AT_MOST - trimmed)
                if queue.idle():
                    del self._queues[name]
            lapsed = self._lapsed(tick)
            self._forget_old(tick)
            self._give_back(lapsed)
            return Maintained(promoted=promoted, reclaimed=len(lapsed), trimmed=trimmed)

    def _lapsed(self, tick: float) -> list[tuple[int, MemoryItem]]:
        """Give up consumers whose lease ran out, and take back a bounded number of messages."""
        taken: list[tuple[int, MemoryItem]] = []
        for holder in list(self._holders.values()):
            if holder.alive and holder.deadline <= tick:
                holder.die(f"{holder.name}: its lease ran out")
            if not holder.alive:
                taken += self._take_back(holder, MOVED_AT_MOST - len(taken))
        return taken

    def _take_back(self, holder: MemoryHolder, limit: int) -> list[tuple[int, MemoryItem]]:
        taken = holder.take_back(limit)
        if not holder.held:
            del self._holders[holder.grant.consumer]
        return taken

    def depth(self) -> dict[str, Depth]:
        with self._lock:
            held = Counter(
                item.envelope.queue
                for holder in self._holders.values()
                for item in holder.held.values()
            )
            depths = {
                name: Depth(
                    ready=queue.ready(),
                    delayed=len(queue.delayed),
                    held=held[name],
                    dead=len(queue.dead),
                )
                for name, queue in self._queues.items()
            }
            depths |= {name: Depth(held=held[name]) for name in held.keys() - depths.keys()}
            return {name: depth for name, depth in depths.items() if depth != Depth()}

    def purge(self, name: str) -> int:
        with self._lock:
            queue = self._queues.get(name)
            return queue.purge() if queue else 0

    def dead(self, name: str, limit: int, before: int) -> list[DeadLetter]:
        """Return dead letters with a number below `before`, the newest first."""
        with self._lock:
            queue = self._queues.get(name)
            return queue.dead_letters(limit, before) if queue else []

    def revive(self, name: str, letters: Sequence[tuple[str, Envelope]]) -> list[str]:
        """Store envelopes in place of dead letters; return the missing keys."""
        with self._lock:
            missing: list[str] = []
            for key, envelope in letters:
                queue = self._queues.get(name)
                if queue is None or queue.dead.pop(key, None) is None:
                    missing.append(key)
                    continue
                self._cancelled.pop(envelope.id, None)
                if envelope.unique:
                    self._claim(envelope.id, self._tick())
                self._add(envelope)
            return missing

    def discard(self, name: str, keys: Collection[str]) -> int:
        with self._lock:
            queue = self._queues.get(name)
            return sum(queue.dead.pop(key, None) is not None for key in keys) if queue else 0

    # --- schedules --------------------------------------------------------------------------------

    def load_schedules(self, ids: Collection[str] | None) -> list[StoredSchedule]:
        with self._lock:
            known = self._schedules
            wanted = known.keys() if ids is None else known.keys() & set(ids)
            return [known[name] for name in sorted(wanted)]

    def due_schedules(self, limit: int) -> DueSchedules:
        with self._lock:
            now = self.now()
            known = self._schedules
            times = [(one.due_at, one.id) for one in known.values() if one.due_at is not None]
            due = sorted((at, name) for at, name in times if at <= now)
            return DueSchedules(
                schedules=[known[name] for _, name in due[:limit]],
                now=now,
                next_at=min((at for at, _ in times if at > now), default=None),
            )

    def swap_schedule(
        self,
        name: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope],
    ) -> bool:
        with self._lock:
            there = self._schedules.get(name)
            if seen != (None if there is None else there.revision):
                return False
            if new is None:
                self._schedules.pop(name, None)
            else:
                self._schedules[name] = new
            for envelope in batch:
                self._add(envelope)
            return True
