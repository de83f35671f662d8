"""What waits in a queue, and who holds what. Plain data, changed under the store's lock only."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import chain, islice

from aiotaskq.contract.message import SUSPECT, Delivery, Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Grant
from aiotaskq.drivers.memory.outcomes import Bell
from aiotaskq.errors import ConfigError

PRIORITIES = range(9, -1, -1)


class Item:
    """An envelope in the store.

    Args:
        envelope: As it was given.
        now: When it is stored, by the store's clock.
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
        """Return one hand-out of it."""
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


class Queue:
    """What waits in one queue, and its dead."""

    def __init__(self) -> None:
        self.levels: dict[int, deque[Item]] = {}  # by priority
        self.suspects: dict[int, deque[Item]] = {}  # the same, of what is handed out alone
        self.delayed: list[tuple[float, int, Item]] = []  # a heap by due time, then by age
        self.dead: dict[str, DeadLetter] = {}  # by key, the oldest first
        self.bells: set[Bell] = set()  # of consumers that wait for it

    def ready(self) -> int:
        return sum(map(len, chain(self.levels.values(), self.suspects.values())))

    def level(self, item: Item) -> deque[Item]:
        """Return where an item waits when it is ready."""
        priority = min(9, max(0, item.envelope.priority))
        levels = self.levels if item.crashes < SUSPECT else self.suspects
        return levels.setdefault(priority, deque())

    def suspect(self) -> Item | None:
        """Take the first of those that are handed out alone."""
        if not self.suspects:
            return None
        priority = max(self.suspects)
        item = self.suspects[priority].popleft()
        if not self.suspects[priority]:
            del self.suspects[priority]
        return item

    def promote(self, now: float, limit: int) -> int:
        """Move up to `limit` delayed items that fell due behind what is ready."""
        moved = 0
        while self.delayed and self.delayed[0][0] <= now and moved < limit:
            item = heapq.heappop(self.delayed)[2]
            self.level(item).append(item)
            moved += 1
        return moved

    def ring(self) -> None:
        for bell in self.bells:
            bell.ring()

    def drop(self, unwanted: Callable[[Item], bool]) -> None:
        """Drop what waits and is unwanted."""
        for levels in (self.levels, self.suspects):
            for priority, level in list(levels.items()):
                if any(map(unwanted, level)):
                    levels[priority] = deque(one for one in level if not unwanted(one))
                if not levels[priority]:
                    del levels[priority]
        self.delayed = [entry for entry in self.delayed if not unwanted(entry[2])]
        heapq.heapify(self.delayed)

    def purge(self) -> int:
        """Drop all that waits; return how many."""
        count = self.ready() + len(self.delayed)
        self.levels.clear()
        self.suspects.clear()
        self.delayed.clear()
        return count

    def letters(self, limit: int, before: str | None) -> list[DeadLetter]:
        """Return dead letters, the newest first."""
        letters = reversed(self.dead.values())
        if before is None:
            return list(islice(letters, limit))
        if not before.isdecimal() or len(before) > 20:
            raise ConfigError(f"{before!r} is no key of a dead letter: take one of those listed")
        edge = int(before)
        return list(islice((one for one in letters if int(one.key) < edge), limit))

    def trim(self, limits: DeadLimits, now: float, most: int) -> int:
        """Drop up to `most` dead letters beyond the limits, the oldest first; return how many."""
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
        """Whether nothing is in it, and nobody waits for it."""
        return not (self.ready() or self.delayed or self.dead or self.bells)


class Holder:
    """One incarnation of a consumer, as the store sees it.

    Args:
        grant: Its id, its queues in the order of draining, the length of its lease.
        name: Of its worker, for people.
        about: What it tells of itself.
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
        self.held: dict[int, Item] = {}  # by receipt, oldest first
        self.told: list[int] = []  # receipts of what was cancelled under it
        self.bells: set[Bell] = set()

    def ring(self) -> None:
        for bell in self.bells:
            bell.ring()

    def end(self) -> None:
        self.alive = False
        self.ring()

    def die(self, note: str) -> None:
        """Give it up for dead."""
        self.crash_note = note
        self.end()

    def take_back(self, limit: int) -> list[tuple[int, Item]]:
        """Take from the dead what one round may take, by receipt, and count its crash."""
        taken: list[tuple[int, Item]] = []
        while self.held and len(taken) < limit:
            # The newest first: what is left for the next round goes in front of it then.
            receipt, item = self.held.popitem()
            item.crashes += 1
            item.crash_note = self.crash_note
            taken.append((receipt, item))
        return taken

    def cancel(self, ids: Collection[str]) -> None:
        """See to it that what it holds of these ids does not come back, and is told of."""
        for receipt, item in self.held.items():
            if item.envelope.id in ids and not item.cancelled:
                item.cancelled = True
                self.told.append(receipt)

    def news(self) -> set[str]:
        """Return the ids of what was cancelled under it, each once."""
        told, self.told = self.told, []
        return {self.held[receipt].envelope.id for receipt in told if receipt in self.held}
