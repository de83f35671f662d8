"""The state of the model: each stored copy, each consumer, and the invariants.

One `publish`, `Again` or `revive` stores one copy. Its body is a number of its own, which tells
two copies of the same id apart. Time passes in whole units, and each deadline lies between two of
them, so that the seconds that a slow machine takes do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import SUSPECT, Delivery, Envelope
from aiotaskq.contract.records import Depth

UNIT = 1000.0  # seconds
LEASE = 2.5 * UNIT
QUEUES = ("q1", "q 2", "q:3")

State: TypeAlias = Literal["ready", "delayed", "held", "dead", "gone"]
Place: TypeAlias = Literal["head", "tail", "anywhere"]


@dataclass(eq=False)
class Copy:
    """A message as it was stored once."""

    number: int  # in the order of storing
    id: str
    queue: str
    priority: int
    delay: int = 0  # units from the storing
    life: int = 0  # units from the storing until it expires; 0: it never does
    due: float | None = None  # in units since the beginning
    expiry: float | None = None  # the same
    crashes: int = 0
    note: str | None = ""  # of the last crash; None: not known, but not empty
    state: State = "ready"
    place: Place = "tail"  # among the ready ones of its queue and priority
    holder: ModelWorker | None = None
    delivery: Delivery | None = None  # the latest one
    cancelled: bool = False
    key: str = ""  # of its dead letter, after that was read

    @property
    def suspect(self) -> bool:
        return self.crashes >= SUSPECT

    @property
    def waits(self) -> bool:
        return self.state in ("ready", "delayed")

    def envelope(self, now: float, *, relative: bool, unique: bool = False) -> Envelope:
        """Return the envelope to store, with absolute times or with times relative to now."""
        due = (self.delay - 0.5) * UNIT if self.delay else None
        end = (self.life - 0.5) * UNIT if self.life else None
        return Envelope(
            id=self.id,
            queue=self.queue,
            body=str(self.number).encode(),
            priority=self.priority,
            not_before=None if relative or due is None else now + due,
            delay=due if relative else None,
            expires_at=None if relative or end is None else now + end,
            expires_in=end if relative else None,
            unique=unique,
        )


@dataclass(eq=False)
class ModelWorker:
    """A consumer of the broker, with its state in the model."""

    broker: Broker
    consumer: Consumer
    queues: Sequence[str]
    renewed: int  # in units
    alive: bool = True
    deliveries: list[tuple[Delivery, Copy]] = field(default_factory=list)  # all deliveries so far


class ModelState:
    """The expected state of a store.

    Args:
        began: The Unix time of the store at the beginning.
        ordered: Whether the broker has the trait `order`.
    """

    def __init__(self, began: float, *, ordered: bool) -> None:
        self.began = began
        self.ordered = ordered
        self.units = 0  # of time that passed so far
        self.copies: list[Copy] = []
        self.dead_letters: list[Copy] = []  # in the order of their deaths
        self.unique: set[str] = set()  # ids that were stored as unique
        self.cancelled: set[str] = set()
        # Cancelled copies that a broker may still count, by queue, and their ids.
        self.cancelled_waiting: Counter[str] = Counter()
        self.cancelled_waiting_ids: set[str] = set()

    # --- queries --------------------------------------------------------------------------------

    def copies_of(self, name: str) -> list[Copy]:
        """Return the copies of an id."""
        return [one for one in self.copies if one.id == name]

    def held_by(self, worker: ModelWorker) -> list[Copy]:
        return [one for one in self.copies if one.state == "held" and one.holder is worker]

    def ready_for(self, worker: ModelWorker) -> Iterator[Copy]:
        return (one for one in self.copies if one.state == "ready" and one.queue in worker.queues)

    def expected(self, worker: ModelWorker, limit: int) -> set[int]:
        """Return the possible sizes of the batch that a fetch brings."""
        ready, held = list(self.ready_for(worker)), self.held_by(worker)
        if not held and any(one.suspect for one in ready):
            return {1}
        count = min(limit, sum(not one.suspect for one in ready))
        # The contract leaves open whether a consumer that holds a suspect gets more.
        return {0, count} if any(one.suspect for one in held) else {count}

    def lease_runs(self, worker: ModelWorker) -> bool:
        """Return whether the lease of a consumer still runs, by the time of its last renewal."""
        return (self.units - worker.renewed) * UNIT <= LEASE

    # --- changes --------------------------------------------------------------------------------

    def store(self, copy: Copy) -> None:
        """Add a copy that is stored now."""
        if copy.delay:
            copy.due, copy.state = self.units + copy.delay - 0.5, "delayed"
        if copy.life:
            copy.expiry = self.units + copy.life - 0.5
        self.copies.append(copy)
        if copy.id in self.cancelled:
            self.drop(copy)

    def drop(self, copy: Copy) -> None:
        """Remove a cancelled copy. A broker may keep and count it for a while."""
        copy.state = "gone"
        self.cancelled_waiting[copy.queue] += 1
        self.cancelled_waiting_ids.add(copy.id)

    def give_back(self, copy: Copy) -> None:
        """Put a held copy at the head again, or drop it if it was cancelled."""
        copy.state, copy.place = "ready", "head"
        if copy.cancelled:
            self.drop(copy)

    def add_dead_letter(self, copy: Copy) -> None:
        copy.state = "dead"
        self.dead_letters.append(copy)

    def remove_dead_letter(self, copy: Copy) -> None:
        copy.state = "gone"
        self.dead_letters.remove(copy)

    def give_up(self, worker: ModelWorker, note: str | None) -> list[Copy]:
        """End a dead consumer; return the copies that it held."""
        worker.alive = False
        lost = self.held_by(worker)
        for copy in lost:
            copy.crashes, copy.note = copy.crashes + 1, note
            self.give_back(copy)
        return lost

    def close(self, worker: ModelWorker) -> None:
        """Close a consumer, which releases the copies that it holds."""
        worker.alive = False
        for copy in self.held_by(worker):
            self.give_back(copy)

    def promote(self) -> None:
        """Make the delayed copies ready that are due by now."""
        for copy in self.copies:
            if copy.state == "delayed" and copy.due is not None and copy.due < self.units:
                copy.state, copy.place = "ready", "anywhere"

    # --- invariants -----------------------------------------------------------------------------

    def check_deliveries(
        self, worker: ModelWorker, got: Sequence[Delivery], order: Sequence[str] | None = None
    ) -> None:
        """Check deliveries one by one against the ready copies, and mark those as held."""
        queues = worker.queues if order is None else order
        busy = bool(self.held_by(worker))
        for delivery in got:
            copy = next(one for one in self.copies if one.number == int(delivery.body))
            assert copy.state == "ready", f"{copy.state}, and handed out"
            self._check_facts(copy, delivery)
            if copy.suspect:
                assert len(got) == 1, "a suspect, and not alone"
                assert not busy, "a suspect, to one that holds something"
            elif not busy and self.ordered:
                suspects = [one for one in self.ready_for(worker) if one.suspect]
                assert not suspects, f"{suspects[:1]} was passed over"
            for other in self.ready_for(worker):
                if self.ordered and other.suspect is copy.suspect:
                    assert not _goes_before(other, copy, queues), f"{other} before {copy}"
            copy.state, copy.holder, copy.delivery = "held", worker, delivery
            worker.deliveries.append((delivery, copy))

    def _check_facts(self, copy: Copy, delivery: Delivery) -> None:
        assert delivery.id == copy.id
        assert delivery.queue == copy.queue
        assert delivery.priority == copy.priority
        if not self.ordered and delivery.crashes > copy.crashes:
            # There, a delivery that came too late and was returned may count as a crash.
            copy.crashes, copy.note = delivery.crashes, delivery.crash_note
        assert delivery.crashes == copy.crashes
        assert delivery.expired is (copy.expiry is not None and copy.expiry < self.units)
        if copy.expiry is None:
            assert delivery.expires_at is None
        else:
            assert delivery.expires_at is not None
            assert abs(delivery.expires_at - self.began - copy.expiry * UNIT) < UNIT / 4
        if copy.note is None:
            assert delivery.crash_note
        else:
            assert delivery.crash_note == copy.note

    def check_depth(self, queue: str, depth: Depth) -> None:
        """Compare the counts of a broker for one queue."""
        states = Counter(one.state for one in self.copies if one.queue == queue)
        waits = states["ready"] + states["delayed"]
        assert depth.held == states["held"], queue
        assert depth.dead == states["dead"], queue
        assert depth.ready >= states["ready"], queue
        assert depth.delayed >= states["delayed"], queue
        assert waits <= depth.ready + depth.delayed <= waits + self.cancelled_waiting[queue], queue


def _goes_before(one: Copy, other: Copy, queues: Sequence[str]) -> bool:
    """Tell whether `one` must be handed out before `other`."""
    first = queues.index(one.queue), -one.priority
    second = queues.index(other.queue), -other.priority
    if first[0] == second[0] and one.suspect and other.suspect:
        return False  # suspects of one queue have no promised order among themselves
    if first != second:
        return first < second
    # Messages of two dead consumers come back in no promised order.
    if other.place == "tail":
        return one.place == "head" or (one.place == "tail" and one.number < other.number)
    return False
