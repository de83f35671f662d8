"""What the model of a broker remembers: every copy, every consumer, and what must hold of them.

A copy is what one `publish`, one `Again` or one `revive` stored; its body is a number that no
other has, so that two copies of one id are told apart. Time passes in whole units, and every
deadline lies between two of them, so that the seconds a slow machine takes do not matter.
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
    """What was stored once."""

    number: int  # in the order of storing
    id: str
    queue: str
    priority: int
    delay: int = 0  # units from the storing
    life: int = 0  # units from the storing until it expires; 0: it never does
    due: float | None = None  # in units since the beginning
    expiry: float | None = None  # the same
    crashes: int = 0
    note: str | None = ""  # of the last crash; None: any but an empty one
    state: State = "ready"
    place: Place = "tail"  # among the ready ones of its queue and priority
    holder: Player | None = None
    delivery: Delivery | None = None  # the latest
    cancelled: bool = False
    key: str = ""  # of its dead letter, once that was read

    @property
    def suspect(self) -> bool:
        return self.crashes >= SUSPECT

    @property
    def waits(self) -> bool:
        return self.state in ("ready", "delayed")

    def envelope(self, now: float, *, relative: bool, unique: bool = False) -> Envelope:
        """Return it as it is to be stored: by the store's clock, or in seconds from now."""
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
class Player:
    """A consumer, and what the model knows of it."""

    broker: Broker
    consumer: Consumer
    queues: Sequence[str]
    renewed: int  # in units
    alive: bool = True
    deliveries: list[tuple[Delivery, Copy]] = field(default_factory=list)  # all it ever got


class Shadow:
    """The state of a store, as it must be after what was done to it.

    Args:
        began: The Unix time of the store at the beginning.
        ordered: Whether the broker keeps the order, also of what is handed back.
    """

    def __init__(self, began: float, *, ordered: bool) -> None:
        self.began = began
        self.ordered = ordered
        self.units = 0  # passed so far
        self.copies: list[Copy] = []
        self.letters: list[Copy] = []  # the dead, in the order of their deaths
        self.unique: set[str] = set()  # ids stored under that demand
        self.cancelled: set[str] = set()
        self.ghosts: Counter[str] = Counter()  # cancelled and waiting: a broker may count them
        self.haunted: set[str] = set()  # their ids

    # --- what is there --------------------------------------------------------------------------

    def of(self, name: str) -> list[Copy]:
        """Return the copies of an id."""
        return [one for one in self.copies if one.id == name]

    def held_by(self, player: Player) -> list[Copy]:
        return [one for one in self.copies if one.state == "held" and one.holder is player]

    def ready_for(self, player: Player) -> Iterator[Copy]:
        return (one for one in self.copies if one.state == "ready" and one.queue in player.queues)

    def expected(self, player: Player, limit: int) -> set[int]:
        """Return how many deliveries a fetch may bring."""
        ready, held = list(self.ready_for(player)), self.held_by(player)
        if not held and any(one.suspect for one in ready):
            return {1}
        count = min(limit, sum(not one.suspect for one in ready))
        # Whether a broker gives more to one that holds a suspect is not said.
        return {0, count} if any(one.suspect for one in held) else {count}

    def trusts(self, player: Player) -> bool:
        """Whether the lease of a consumer that gives no sign of life still runs."""
        return (self.units - player.renewed) * UNIT <= LEASE

    # --- what is done ---------------------------------------------------------------------------

    def store(self, copy: Copy) -> None:
        """Note that a copy was stored now."""
        if copy.delay:
            copy.due, copy.state = self.units + copy.delay - 0.5, "delayed"
        if copy.life:
            copy.expiry = self.units + copy.life - 0.5
        self.copies.append(copy)
        if copy.id in self.cancelled:
            self.drop(copy)

    def drop(self, copy: Copy) -> None:
        """Forget what was cancelled. A broker may do it later, without handing it out."""
        copy.state = "gone"
        self.ghosts[copy.queue] += 1
        self.haunted.add(copy.id)

    def give_back(self, copy: Copy) -> None:
        """Put a held copy at the head again, or drop it if it was cancelled."""
        copy.state, copy.place = "ready", "head"
        if copy.cancelled:
            self.drop(copy)

    def bury(self, copy: Copy) -> None:
        copy.state = "dead"
        self.letters.append(copy)

    def unbury(self, copy: Copy) -> None:
        copy.state = "gone"
        self.letters.remove(copy)

    def die(self, player: Player, note: str | None) -> list[Copy]:
        """Give a consumer up for dead; return what it held."""
        player.alive = False
        lost = self.held_by(player)
        for copy in lost:
            copy.crashes, copy.note = copy.crashes + 1, note
            self.give_back(copy)
        return lost

    def leave(self, player: Player) -> None:
        """End a consumer in good order."""
        player.alive = False
        for copy in self.held_by(player):
            self.give_back(copy)

    def promote(self) -> None:
        """Note what has fallen due by now."""
        for copy in self.copies:
            if copy.state == "delayed" and copy.due is not None and copy.due < self.units:
                copy.state, copy.place = "ready", "anywhere"

    # --- what must hold -------------------------------------------------------------------------

    def handed(
        self, player: Player, got: Sequence[Delivery], order: Sequence[str] | None = None
    ) -> None:
        """Check what was handed out, one by one, against what was ready."""
        queues = player.queues if order is None else order
        busy = bool(self.held_by(player))
        for delivery in got:
            copy = next(one for one in self.copies if one.number == int(delivery.body))
            assert copy.state == "ready", f"{copy.state}, and handed out"
            self._check_facts(copy, delivery)
            if copy.suspect:
                assert len(got) == 1, "a suspect, and not alone"
                assert not busy, "a suspect, to one that holds something"
            elif not busy and self.ordered:
                suspects = [one for one in self.ready_for(player) if one.suspect]
                assert not suspects, f"{suspects[:1]} was passed over"
            for other in self.ready_for(player):
                if self.ordered and other.suspect is copy.suspect:
                    assert not _goes_before(other, copy, queues), f"{other} before {copy}"
            copy.state, copy.holder, copy.delivery = "held", player, delivery
            player.deliveries.append((delivery, copy))

    def _check_facts(self, copy: Copy, delivery: Delivery) -> None:
        assert delivery.id == copy.id
        assert delivery.queue == copy.queue
        assert delivery.priority == copy.priority
        if not self.ordered and delivery.crashes > copy.crashes:
            # What came when it was no longer asked for, and went back, may count as a crash there.
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
        """Compare what a broker counts in one queue."""
        states = Counter(one.state for one in self.copies if one.queue == queue)
        waits = states["ready"] + states["delayed"]
        assert depth.held == states["held"], queue
        assert depth.dead == states["dead"], queue
        assert depth.ready >= states["ready"], queue
        assert depth.delayed >= states["delayed"], queue
        assert waits <= depth.ready + depth.delayed <= waits + self.ghosts[queue], queue


def _goes_before(one: Copy, other: Copy, queues: Sequence[str]) -> bool:
    """Tell whether `one` must be handed out before `other`."""
    first = queues.index(one.queue), -one.priority
    second = queues.index(other.queue), -other.priority
    if first[0] == second[0] and one.suspect and other.suspect:
        return False  # among themselves, suspects of one queue are in no order that is promised
    if first != second:
        return first < second
    # Crashes are taken back in no order that is promised between two deaths.
    if other.place == "tail":
        return one.place == "head" or (one.place == "tail" and one.number < other.number)
    return False
