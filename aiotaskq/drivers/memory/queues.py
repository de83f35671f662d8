"""The queues of a store and the consumers that hold messages: plain data with its rules.

Theory of operation. Nothing here locks or waits: every method is called under the lock of the
store, which alone moves messages between the objects (see `aiotaskq.drivers.memory.store`).

A `MemoryItem` is a message in the store. It is in exactly one place: ready or suspect in a queue
(by priority), delayed in a queue, or held by a holder under a receipt. An item that is cancelled
leaves its queue at once; one that is held is marked instead, and is dropped when it would come
back.

A `MemoryHolder` is a consumer: new, alive (after `begun`), or dead for good. A dead holder hands
nothing out and accepts no settlement, but may still hold items, as they are taken back in bounded
portions. It is forgotten with the last of them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import chain, islice

from aiotaskq.contract.message import SUSPECT, Delivery, Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Grant
from aiotaskq.drivers.memory.notify import MemoryWaiter

PRIORITIES = range(9, -1, -1)


class MemoryItem:
    """A message in the store.

    Args:
        envelope: The envelope as it was published.
        now: The time of storing, by the store's clock.
    """

    __slots__ = ("cancelled", "crash_note", "crashes", "due", "envelope", "expires_at")

    def __init__(self, envelope: Envelope, now: float) -> None:
        delay, expires_in = envelope.delay, envelope.expires_in
        self.envelope = envelope
        self.due = envelope.not_before if delay is None else now + delay
        self.expires_at = envelope.expires_at if expires_in is None else now + expires_in
        self.crashes = 0
        self.crash_note = ""
        self.cancelled = False  # set while it is held: it must not come back

    def delivery(self, receipt: int, now: float) -> Delivery:
        """Return a hand-out of this message under a receipt."""
        envelope, expires_at = self.envelope, self.expires_at
        return Delivery(
            id=envelope.id,
            queue=envelope.queue,
            body=envelope.body,
            receipt=receipt,
            crashes=self.crashes,
            priority=envelope.priority,
            expired=expires_at is not None and expires_at <= now,
            expires_at=expires_at,
            crash_note=self.crash_note,
        )


class MemoryQueue:
    """The messages that wait in one queue, and its dead letters."""

    def __init__(self) -> None:
        self.levels: dict[int, deque[MemoryItem]] = {}  # by priority
        self.suspects: dict[
            int, deque[MemoryItem]
        ] = {}  # the same, of messages that are handed out alone
        self.delayed: list[tuple[float, int, MemoryItem]] = []  # a heap by due time, then by age
        self.dead: dict[str, DeadLetter] = {}  # by key, the oldest first
        self.waiters: set[MemoryWaiter] = set()  # of consumers that wait for messages

    def ready(self) -> int:
        """Return how many messages could be handed out now."""
        return sum(map(len, chain(self.levels.values(), self.suspects.values())))

    def level(self, item: MemoryItem) -> deque[MemoryItem]:
        """Return the deque in which an item waits when it is ready."""
        priority = min(9, max(0, item.envelope.priority))
        levels = self.levels if item.crashes < SUSPECT else self.suspects
        return levels.setdefault(priority, deque())

    def pop_suspect(self) -> MemoryItem | None:
        """Take the first of the messages that are handed out alone."""
        if not self.suspects:
            return None
        priority = max(self.suspects)
        item = self.suspects[priority].popleft()
        if not self.suspects[priority]:
            del self.suspects[priority]
        return item

    def promote(self, now: float, limit: int) -> int:
        """Move up to `limit` delayed items that have fallen due behind the ready ones."""
        moved = 0
        while self.delayed and self.delayed[0][0] <= now and moved < limit:
            item = heapq.heappop(self.delayed)[2]
            self.level(item).append(item)
            moved += 1
        return moved

    def wake_waiters(self) -> None:
        """Wake all that wait here."""
        for waiter in self.waiters:
            waiter.wake()

    def drop(self, unwanted: Callable[[MemoryItem], bool]) -> None:
        """Drop the unwanted ones of the messages that wait."""
        for levels in (self.levels, self.suspects):
            for priority, level in list(levels.items()):
                if any(map(unwanted, level)):
                    levels[priority] = deque(one for one in level if not unwanted(one))
                if not levels[priority]:
                    del levels[priority]
        self.delayed = [entry for entry in self.delayed if not unwanted(entry[2])]
        heapq.heapify(self.delayed)

    def purge(self) -> int:
        """Drop all messages that wait; return their number."""
        count = self.ready() + len(self.delayed)
        self.levels.clear()
        self.suspects.clear()
        self.delayed.clear()
        return count

    def dead_letters(self, limit: int, before: int) -> list[DeadLetter]:
        """Return dead letters with a number below `before`, the newest first."""
        newest_first = reversed(self.dead.values())
        return list(islice((one for one in newest_first if int(one.key) < before), limit))

    def trim(self, limits: DeadLimits, now: float, most: int) -> int:
        """Drop up to `most` dead letters beyond the limits, the oldest first; return the number."""
        edge = float("-inf") if limits.age is None else now - limits.age
        dropped = 0
        while self.dead and dropped < most:
            key, oldest = next(iter(self.dead.items()))
            if len(self.dead) <= limits.most and oldest.died_at > edge:
                break
            del self.dead[key]
            dropped += 1
        return dropped

    def idle(self) -> bool:
        """Return whether the queue is empty and no consumer waits for it."""
        return not (self.ready() or self.delayed or self.dead or self.waiters)


class MemoryHolder:
    """One incarnation of a consumer, as the store sees it.

    Args:
        grant: Its id, its queues in the order of draining, the length of its lease.
        name: The worker's name, for people.
        about: The text that `Broker.consumers` returns for this consumer.
    """

    def __init__(self, grant: Grant, name: str, about: bytes) -> None:
        self.grant = grant
        self.name = name
        self.info = ConsumerInfo(id=grant.consumer, queues=grant.queues, about=about)
        self.queues: Sequence[str] = grant.queues
        self.deadline = 0.0  # by the store's monotonic clock
        self.begun = False
        self.alive = False
        self.crash_note = ""  # how it died
        self.held: dict[int, MemoryItem] = {}  # by receipt, oldest first
        self.told: list[int] = []  # receipts of cancelled items that `news` has yet to report
        self.waiters: set[MemoryWaiter] = set()

    def wake_waiters(self) -> None:
        """Wake all that wait here."""
        for waiter in self.waiters:
            waiter.wake()

    def end(self) -> None:
        """End the lease for good."""
        self.alive = False
        self.wake_waiters()

    def die(self, note: str) -> None:
        """Give it up for dead."""
        self.crash_note = note
        self.end()

    def take_back(self, limit: int) -> list[tuple[int, MemoryItem]]:
        """Take items back from a dead holder, by receipt, and count its crash on each of them."""
        taken: list[tuple[int, MemoryItem]] = []
        while self.held and len(taken) < limit:
            # The newest first: the items left for the next round go in front of these then.
            receipt, item = self.held.popitem()
            item.crashes += 1
            item.crash_note = self.crash_note
            taken.append((receipt, item))
        return taken

    def cancel(self, ids: Collection[str]) -> None:
        """Mark held items of these ids: they must not come back, and `news` reports them."""
        for receipt, item in self.held.items():
            if item.envelope.id in ids and not item.cancelled:
                item.cancelled = True
                self.told.append(receipt)

    def news(self) -> set[str]:
        """Return the ids of items that were cancelled while held, each once."""
        told, self.told = self.told, []
        return {self.held[receipt].envelope.id for receipt in told if receipt in self.held}
