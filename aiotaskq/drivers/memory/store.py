"""What the drivers of one process share: messages and outcomes in plain containers.

The methods of a `MemoryStore` never wait. Each takes the store's lock for a moment, so that
any number of event loops in any number of threads can work on one store. Whoever has to wait
leaves a `Bell` in it, and whoever changes something rings the bells of those that it concerns.

How an envelope travels::

    publish ──▶ delayed ──▶ ready ──fetch──▶ held ──Done────▶ gone
                  due,      ▲  ▲              │││
                 to the     │  └──head────────┘│└──Dead────▶ dead letters
                  tail      │  Release, close, │                  ▲
                            │  lease lapsed ───┼──── too often ───┘
                            └──tail────────────┘
                               Again
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress

from aiotaskq.errors import LeaseLost
from aiotaskq.message import (
    Again,
    Dead,
    DeadLetter,
    Delivery,
    Depth,
    Envelope,
    Outcome,
    Release,
    Settlement,
    Tended,
)

PRIORITIES = range(9, -1, -1)
UNIQUE_FOR = 86_400.0  # seconds
CALL_FOR = 120.0  # seconds; a minute is promised, from an error that may come late
TEND_AT_MOST = 1000  # moves of each kind in one call of `tend`
UNHEARD_AT_MOST = 100_000  # arrivals kept for one subscriber that does not listen


class Bell:
    """Wakes one waiting coroutine, once, from any thread. Rung under the store's lock only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.create_future()
        self._rung = False

    def ring(self) -> None:
        if self._rung:
            return
        self._rung = True
        # A loop that was closed has nobody left to wake.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._heard.set_result, None)

    async def wait(self, seconds: float | None) -> None:
        """Return when it is rung, or after some seconds."""
        await asyncio.wait([self._heard], timeout=seconds)


class _Item:
    """An envelope in the store."""

    __slots__ = ("cancelled", "crashes", "envelope")

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.crashes = 0
        self.cancelled = False  # set while it is held: it must not come back


class _Queue:
    """What waits in one queue, and its dead."""

    def __init__(self) -> None:
        self.levels: dict[int, deque[_Item]] = {}  # by priority
        self.delayed: list[tuple[float, int, _Item]] = []  # a heap by due time, then by age
        self.dead: list[DeadLetter] = []
        self.bells: set[Bell] = set()  # of consumers that wait for it

    def ready(self) -> int:
        return sum(map(len, self.levels.values()))

    def level(self, item: _Item) -> deque[_Item]:
        priority = min(9, max(0, item.envelope.priority))
        return self.levels.setdefault(priority, deque())

    def ring(self) -> None:
        for bell in self.bells:
            bell.ring()

    def drop(self, unwanted: Callable[[_Item], bool]) -> None:
        """Drop what waits and is unwanted."""
        for priority, level in self.levels.items():
            if any(map(unwanted, level)):
                self.levels[priority] = deque(one for one in level if not unwanted(one))
        self.delayed = [entry for entry in self.delayed if not unwanted(entry[2])]
        heapq.heapify(self.delayed)


class Holder:
    """One incarnation of a consumer, as the store sees it."""

    def __init__(self, queues: Sequence[str], lease: float) -> None:
        self.queues = queues
        self.lease = lease
        self.deadline = 0.0  # by the store's monotonic clock
        self.begun = False
        self.alive = False
        self.held: dict[int, _Item] = {}  # by receipt, oldest first
        self.told: set[str] = set()  # ids that were cancelled under it
        self.bells: set[Bell] = set()

    def end(self) -> None:
        self.alive = False
        for bell in self.bells:
            bell.ring()


class Ear:
    """One subscriber to arrivals. Changed under the store's lock only."""

    def __init__(self) -> None:
        self.bell = Bell()
        self._unheard: list[str] = []
        self._missed = False

    def tell(self, ids: list[str]) -> None:
        self._unheard += ids
        if len(self._unheard) > UNHEARD_AT_MOST:
            self._unheard.clear()
            self._missed = True
        self.bell.ring()

    def empty(self) -> list[str] | None:
        heard, missed = self._unheard, self._missed
        self._unheard, self._missed = [], False
        if missed:
            # Told first: what is left behind it is told next time.
            self._unheard = heard
            return []
        return heard or None


class MemoryStore:
    """What the drivers of one process share. Safe to use from any thread.

    It lives as long as somebody refers to it, and is gone with the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._time_shift = 0.0
        self._numbers = itertools.count()  # of receipts, and the age of what is delayed
        self._queues: dict[str, _Queue] = {}
        self._holders: set[Holder] = set()
        self._unique: dict[str, float] = {}  # id → when it is forgotten; soonest first
        self._calls: dict[str, tuple[float, list[str]]] = {}  # the same, and the answer
        self._outcomes: dict[str, tuple[float, Outcome]] = {}  # with the end of its time
        self._ends: list[tuple[float, str]] = []  # a heap of these
        self._ears: set[Ear] = set()

    def now(self) -> float:
        """Return the Unix time that the store goes by."""
        return time.time() + self._time_shift

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
            self._unique.pop(envelope.id, None)
            self._unique[envelope.id] = tick + UNIQUE_FOR
        self._add(_Item(envelope))
        return True

    def _add(self, item: _Item) -> None:
        """Put an item that is new behind all that waits."""
        queue = self._queue(item.envelope.queue)
        due = item.envelope.not_before
        if due is not None and due > self.now():
            heapq.heappush(queue.delayed, (due, next(self._numbers), item))
        else:
            queue.level(item).append(item)
        queue.ring()  # for a delayed one too: whoever sleeps must sleep shorter

    def _queue(self, name: str) -> _Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue()
        return queue

    def _forget_old(self, tick: float) -> None:
        """Forget ids and calls whose window is over; both dicts are in the order of that."""
        while self._unique and self._unique[first := next(iter(self._unique))] <= tick:
            del self._unique[first]
        while self._calls and self._calls[first := next(iter(self._calls))][0] <= tick:
            del self._calls[first]

    # --- messages out ---------------------------------------------------------------------------

    def enter(self, holder: Holder) -> None:
        """Begin a lease. A second time changes nothing: what has ended stays so."""
        with self._lock:
            if not holder.begun:
                holder.begun = holder.alive = True
                holder.deadline = self._tick() + holder.lease
                self._holders.add(holder)

    def renew(self, holder: Holder) -> bool:
        with self._lock:
            holder.deadline = self._tick() + holder.lease
            return holder.alive

    def take(self, holder: Holder, limit: int, bell: Bell | None) -> list[Delivery]:
        """Hand out what is due; if nothing is, hang up the bell."""
        with self._lock:
            if not holder.alive:
                raise LeaseLost("the lease of this consumer has ended")
            now = self.now()
            taken: list[Delivery] = []
            for name in holder.queues:
                if queue := self._queues.get(name):
                    self._promote(queue, now, TEND_AT_MOST)
                    self._take_from(queue, holder, limit - len(taken), now, taken)
                if len(taken) == limit:
                    break
            if bell is not None and not taken:
                holder.bells.add(bell)
                for name in holder.queues:
                    self._queue(name).bells.add(bell)
            return taken

    def _take_from(
        self, queue: _Queue, holder: Holder, room: int, now: float, taken: list[Delivery]
    ) -> None:
        for priority in PRIORITIES:
            level = queue.levels.get(priority)
            while level and room:
                item = level.popleft()
                envelope = item.envelope
                expires_at = envelope.expires_at
                receipt = next(self._numbers)
                holder.held[receipt] = item
                room -= 1
                taken.append(
                    Delivery(
                        id=envelope.id,
                        queue=envelope.queue,
                        body=envelope.body,
                        receipt=receipt,
                        crashes=item.crashes,
                        priority=envelope.priority,
                        expired=expires_at is not None and expires_at <= now,
                    )
                )

    def _promote(self, queue: _Queue, now: float, limit: int) -> int:
        """Move up to `limit` delayed items that fell due behind what is ready."""
        moved = 0
        while queue.delayed and queue.delayed[0][0] <= now and moved < limit:
            item = heapq.heappop(queue.delayed)[2]
            queue.level(item).append(item)
            moved += 1
        return moved

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

    # --- messages settled -----------------------------------------------------------------------

    def settle(self, holder: Holder, batch: Sequence[Settlement]) -> list[Delivery]:
        with self._lock:
            gone: list[Delivery] = []
            back: list[tuple[int, _Item]] = []
            for one in batch:
                receipt = one.delivery.receipt
                item = holder.held.pop(receipt, None) if holder.alive else None
                if item is None:
                    gone.append(one.delivery)
                elif isinstance(one, Release):
                    back.append((receipt, item))
                elif isinstance(one, Dead):
                    self._bury(item, one.reason)
                elif isinstance(one, Again):
                    self._replace(item, one.envelope)
            self._give_back(back)
            return gone

    def _replace(self, item: _Item, envelope: Envelope) -> None:
        if not (item.cancelled and item.envelope.id == envelope.id):
            self._add(_Item(envelope))

    def _bury(self, item: _Item, reason: str) -> None:
        envelope = item.envelope
        self._queue(envelope.queue).dead.append(
            DeadLetter(
                id=envelope.id,
                queue=envelope.queue,
                body=envelope.body,
                reason=reason,
                crashes=item.crashes,
                died_at=self.now(),
            )
        )

    def _give_back(self, items: Iterable[tuple[int, _Item]]) -> None:
        """Put items at the head of their queues, in the order in which they were handed out."""
        for _, item in sorted(items, key=lambda pair: pair[0], reverse=True):
            if not item.cancelled:
                queue = self._queue(item.envelope.queue)
                queue.level(item).appendleft(item)
                queue.ring()

    def leave(self, holder: Holder) -> None:
        """End a lease in good order."""
        with self._lock:
            self._holders.discard(holder)
            if holder.alive:
                holder.end()
                self._give_back(holder.held.items())
                holder.held.clear()

    def told(self, holder: Holder) -> set[str]:
        with self._lock:
            told, holder.told = holder.told, set()
            return told

    # --- messages looked after ------------------------------------------------------------------

    def cancel(self, ids: Collection[str]) -> None:
        wanted = frozenset(ids)
        with self._lock:
            for queue in self._queues.values():
                queue.drop(lambda item: item.envelope.id in wanted)
            for holder in self._holders:
                for item in holder.held.values():
                    if item.envelope.id in wanted:
                        item.cancelled = True
                        holder.told.add(item.envelope.id)

    def tend(self) -> Tended:
        with self._lock:
            now, tick, promoted = self.now(), self._tick(), 0
            for name, queue in list(self._queues.items()):
                if moved := self._promote(queue, now, TEND_AT_MOST - promoted):
                    promoted += moved
                    queue.ring()
                if not (queue.ready() or queue.delayed or queue.dead or queue.bells):
                    del self._queues[name]
            lapsed = self._lapsed(tick)
            self._forget_old(tick)
            for _, item in lapsed:
                item.crashes += 1
            self._give_back(lapsed)
            return Tended(promoted=promoted, reclaimed=len(lapsed))

    def _lapsed(self, tick: float) -> list[tuple[int, _Item]]:
        """Give consumers up for dead, and take from them what one round may take."""
        taken: list[tuple[int, _Item]] = []
        for holder in [one for one in self._holders if one.deadline <= tick or not one.alive]:
            holder.end()
            while holder.held and len(taken) < TEND_AT_MOST:
                # The newest first: what is left for the next round goes in front of it then.
                taken.append(holder.held.popitem())
            if not holder.held:
                self._holders.discard(holder)
        return taken

    def depth(self) -> dict[str, Depth]:
        with self._lock:
            held = Counter(
                item.envelope.queue for holder in self._holders for item in holder.held.values()
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
            if (queue := self._queues.get(name)) is None:
                return 0
            count = queue.ready() + len(queue.delayed)
            queue.levels.clear()
            queue.delayed.clear()
            return count

    def dead(self, name: str, limit: int) -> list[DeadLetter]:
        with self._lock:
            queue = self._queues.get(name)
            return queue.dead[: -limit - 1 : -1] if queue else []

    # --- outcomes -------------------------------------------------------------------------------

    def store(self, batch: Sequence[Outcome], ttl: float | None) -> list[str]:
        with self._lock:
            now = self.now()
            self._drop_old(now)
            end = float("inf") if ttl is None else now + ttl
            refused: list[str] = []
            arrived: list[str] = []
            for outcome in batch:
                name = outcome.task_id
                kept = self._outcomes.get(name)
                if kept is not None and kept[1].status.final:
                    refused.append(name)
                    continue
                self._outcomes[name] = end, outcome
                if ttl is not None:
                    heapq.heappush(self._ends, (end, name))
                if outcome.status.final:
                    arrived.append(name)
            if arrived:
                for ear in self._ears:
                    ear.tell(arrived)
            return refused

    def load(self, ids: Collection[str]) -> dict[str, Outcome]:
        with self._lock:
            self._drop_old(self.now())
            return {name: self._outcomes[name][1] for name in ids if name in self._outcomes}

    def forget(self, ids: Collection[str]) -> int:
        with self._lock:
            self._drop_old(self.now())
            return sum(self._outcomes.pop(name, None) is not None for name in ids)

    def _drop_old(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            end, name = heapq.heappop(self._ends)
            kept = self._outcomes.get(name)
            # A later outcome may have brought a later end.
            if kept is not None and kept[0] <= end:
                del self._outcomes[name]

    def listen(self, ear: Ear, *, on: bool) -> None:
        """Begin or end a subscription."""
        with self._lock:
            (self._ears.add if on else self._ears.discard)(ear)

    def hear(self, ear: Ear) -> list[str] | None:
        """Return what arrived, [] if something was missed, None if there is nothing new."""
        with self._lock:
            return ear.empty()
