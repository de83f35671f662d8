"""What the drivers of one process share: messages and outcomes in plain containers.

The methods of a `MemoryStore` never wait. Each takes the store's lock for a moment, so that
any number of event loops in any number of threads can work on one store. Whoever has to wait
leaves a `Bell` in it, and whoever changes something rings the bells of those that it concerns.

How an envelope travels::

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
from aiotaskq.drivers.memory.outcomes import Bell, OutcomeStore
from aiotaskq.drivers.memory.queues import PRIORITIES, Holder, Item, Queue
from aiotaskq.errors import LeaseLost

UNIQUE_FOR = 86_400.0  # seconds
CALL_FOR = 120.0  # seconds; a minute is promised, from an error that may come late
CANCELLED_FOR = 7 * 86_400.0  # seconds
TEND_AT_MOST = 1000  # moves of each kind in one call of `maintain`


class MemoryStore(OutcomeStore):
    """What the drivers of one process share. Safe to use from any thread.

    It lives as long as somebody refers to it, and is gone with the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()  # of receipts and dead letters; the age of the delayed
        self._queues: dict[str, Queue] = {}
        self._holders: dict[str, Holder] = {}  # by the id of the consumer
        self._unique: dict[str, float] = {}  # id → when it is forgotten; soonest first
        self._cancelled: dict[str, float] = {}  # the same
        self._calls: dict[str, tuple[float, list[str]]] = {}  # the same, and the answer
        self._schedules: dict[str, StoredSchedule] = {}

    def _tick(self) -> float:
        # Leases run by a clock that nobody sets: a corrected wall clock must not end them.
        return time.monotonic() + self._time_shift

    # --- messages in ----------------------------------------------------------------------------

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
                self._calls[call_id] = tick + CALL_FOR, refused
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
        self._unique[name] = tick + UNIQUE_FOR

    def _add(self, envelope: Envelope) -> None:
        """Put an envelope behind all that waits, unless it is cancelled already."""
        if envelope.id in self._cancelled:
            return
        queue, now = self._queue(envelope.queue), self.now()
        item = Item(envelope, now)
        if item.due is not None and item.due > now:
            heapq.heappush(queue.delayed, (item.due, next(self._numbers), item))
        else:
            queue.level(item).append(item)
        queue.ring()  # for a delayed one too: whoever sleeps must sleep shorter

    def _queue(self, name: str) -> Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = Queue()
        return queue

    def _forget_old(self, tick: float) -> None:
        """Forget what was to be remembered for a time that is over; all in the order of that."""
        for ids in (self._unique, self._cancelled):
            while ids and ids[first := next(iter(ids))] <= tick:
                del ids[first]
        while self._calls and self._calls[first := next(iter(self._calls))][0] <= tick:
            del self._calls[first]

    # --- messages out ---------------------------------------------------------------------------

    def enter(self, holder: Holder) -> None:
        """Begin a lease. A second time changes nothing: what has ended stays so."""
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
        self, holder: Holder, limit: int, bell: Bell | None, order: Sequence[str] | None = None
    ) -> list[Delivery]:
        """Hand out what is due; if nothing is, hang up the bell."""
        queues = holder.queues if order is None else order
        with self._lock:
            if not holder.alive:
                raise LeaseLost("the lease of this consumer has ended")
            now = self.now()
            taken = [] if holder.held else self._take_suspect(holder, queues, now)
            if not taken:
                taken = self._take_plain(holder, queues, limit, now)
            if bell is not None and not taken:
                holder.bells.add(bell)
                for name in holder.queues:
                    self._queue(name).bells.add(bell)
            return taken

    def _take_suspect(self, holder: Holder, queues: Sequence[str], now: float) -> list[Delivery]:
        for name in queues:
            queue = self._queues.get(name)
            if queue and (item := queue.suspect()):
                return [self._hand(item, holder, now)]
        return []

    def _take_plain(
        self, holder: Holder, queues: Sequence[str], limit: int, now: float
    ) -> list[Delivery]:
        taken: list[Delivery] = []
        for name in queues:
            if queue := self._queues.get(name):
                queue.promote(now, TEND_AT_MOST)
                for priority in PRIORITIES:
                    level = queue.levels.get(priority)
                    while level and len(taken) < limit:
                        taken.append(self._hand(level.popleft(), holder, now))
            if len(taken) == limit:
                break
        return taken

    def _hand(self, item: Item, holder: Holder, now: float) -> Delivery:
        receipt = next(self._numbers)
        holder.held[receipt] = item
        return item.delivery(receipt, now)

    def take_down(self, holder: Holder, bell: Bell) -> None:
        """Take a bell down again."""
        with self._lock:
            holder.bells.discard(bell)
            for name in holder.queues:
                if queue := self._queues.get(name):
                    queue.bells.discard(bell)

    def next_due(self, holder: Holder) -> float | None:
        """Return in how many seconds something delayed falls due for a consumer."""
        with self._lock:
            queues = [queue for name in holder.queues if (queue := self._queues.get(name))]
            due = min((one.delayed[0][0] for one in queues if one.delayed), default=None)
            return None if due is None else max(0.0, due - self.now())

    def news(self, holder: Holder) -> News:
        with self._lock:
            return News(cancelled=holder.news(), suspects=self._suspects_wait(holder))

    def _suspects_wait(self, holder: Holder) -> bool:
        queues = map(self._queues.get, holder.queues)
        return any(queue is not None and queue.suspects for queue in queues)

    # --- messages settled -----------------------------------------------------------------------

    def settle(self, holder: Holder, batch: Sequence[Settlement]) -> list[Delivery]:
        with self._lock:
            gone: list[Delivery] = []
            back: list[tuple[int, Item]] = []
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
            # Its own fetch that waits may take what is handed out alone from now on.
            if holder.bells and not holder.held and self._suspects_wait(holder):
                holder.ring()
            return gone

    def _replace(self, item: Item, envelope: Envelope) -> None:
        if not (item.cancelled and item.envelope.id == envelope.id):
            self._add(envelope)

    def _bury(self, item: Item, one: Dead) -> None:
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

    def _give_back(self, items: Iterable[tuple[int, Item]]) -> None:
        """Put items at the head of their queues, in the order in which they were handed out."""
        for _, item in sorted(items, key=lambda pair: pair[0], reverse=True):
            if not item.cancelled:
                queue = self._queue(item.envelope.queue)
                queue.level(item).appendleft(item)
                queue.ring()

    def leave(self, holder: Holder) -> None:
        """End a lease in good order."""
        with self._lock:
            if holder.alive:
                del self._holders[holder.grant.consumer]
                holder.end()
                self._give_back(holder.held.items())
                holder.held.clear()

    # --- messages looked after ------------------------------------------------------------------

    def cancel(self, ids: Collection[str], *, running: bool) -> set[str]:
        """Drop what waits; return those left alone because they are held."""
        wanted = set(ids)
        with self._lock:
            spared = set() if running else wanted & self._held()
            for queue in self._queues.values():
                queue.drop(lambda item: item.envelope.id in wanted)
            if running:
                for holder in self._holders.values():
                    holder.cancel(wanted)
            until = self._tick() + CANCELLED_FOR
            for name in wanted - spared:
                self._cancelled.pop(name, None)  # so that it goes to the end
                self._cancelled[name] = until
            return spared

    def _held(self) -> set[str]:
        """Return the ids of what is held and may come back."""
        return {
            item.envelope.id
            for holder in self._holders.values()
            for item in holder.held.values()
            if not item.cancelled
        }

    def end(self, consumer: str, note: str) -> int:
        """Give a consumer up for dead, and take back what one round may take."""
        with self._lock:
            holder = self._holders.get(consumer)
            if holder is None or not holder.alive:
                return 0
            holder.die(note)
            taken = self._take_back(holder, TEND_AT_MOST)
            self._give_back(taken)
            return len(taken)

    def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        with self._lock:
            now, tick, promoted, trimmed = self.now(), self._tick(), 0, 0
            for name, queue in list(self._queues.items()):
                if moved := queue.promote(now, TEND_AT_MOST - promoted):
                    promoted += moved
                    queue.ring()
                trimmed += queue.trim(limits, now, TEND_AT_MOST - trimmed)
                if queue.idle():
                    del self._queues[name]
            lapsed = self._lapsed(tick)
            self._forget_old(tick)
            self._give_back(lapsed)
            return Maintained(promoted=promoted, reclaimed=len(lapsed), trimmed=trimmed)

    def _lapsed(self, tick: float) -> list[tuple[int, Item]]:
        """Give consumers up for dead, and take from them what one round may take."""
        taken: list[tuple[int, Item]] = []
        for holder in list(self._holders.values()):
            if holder.alive and holder.deadline <= tick:
                holder.die(f"{holder.name}: its lease ran out")
            if not holder.alive:
                taken += self._take_back(holder, TEND_AT_MOST - len(taken))
        return taken

    def _take_back(self, holder: Holder, limit: int) -> list[tuple[int, Item]]:
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

    def dead(self, name: str, limit: int, before: str | None) -> list[DeadLetter]:
        with self._lock:
            queue = self._queues.get(name)
            return queue.letters(limit, before) if queue else []

    def revive(self, name: str, letters: Sequence[tuple[str, Envelope]]) -> list[str]:
        """Store envelopes in place of dead letters; return the keys that were not there."""
        with self._lock:
            absent: list[str] = []
            for key, envelope in letters:
                queue = self._queues.get(name)
                if queue is None or queue.dead.pop(key, None) is None:
                    absent.append(key)
                    continue
                self._cancelled.pop(envelope.id, None)
                if envelope.unique:
                    self._claim(envelope.id, self._tick())
                self._add(envelope)
            return absent

    def discard(self, name: str, keys: Collection[str]) -> int:
        with self._lock:
            queue = self._queues.get(name)
            return sum(queue.dead.pop(key, None) is not None for key in keys) if queue else 0

    # --- schedules ------------------------------------------------------------------------------

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
