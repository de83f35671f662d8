"""What a driver must be: the seams between the core and the servers.

`aiotaskq.testing` ships the conformance suites: one test or more for each sentence below.

A driver object is cheap and closed when made. It belongs to the event loop that opened it;
`clone()` gives another one, of the same settings, for another loop.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Protocol, Self, runtime_checkable

import msgspec

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import (
    ConsumerInfo,
    DeadLetter,
    DeadLimits,
    Depth,
    Grant,
    Maintained,
    News,
)
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.contract.settlement import Settlement


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker can do beyond the floor that every driver reaches.

    The floor: batches, fencing receipts, delays, dead letters, redelivery, cancelling what waits.
    Where a broker lacks a trait, what the protocols below promise by it is not promised. A trait
    is data, read once; asking for what a broker lacks raises `Unsupported` where the message is
    sent, never inside a worker.
    """

    priorities: bool = True  # 0 to 9 within one queue
    unique: bool = True  # stores an id once when asked to
    schedules: bool = True  # keeps schedules, and sends each due run once
    durable: bool = True  # survives a restart of every process
    shared: bool = True  # reached by other processes
    leases: bool = True  # a consumer outlives its connection, and others may renew or end its lease
    order: bool = True  # what is handed back goes to the head of its queue, suspects before all
    atomic: bool = True  # a retry or a dead letter replaces its message in one step
    idempotent: bool = True  # a call that is repeated under its id stores nothing twice
    clock: bool = True  # what is due or out of date goes by one clock, and is there at the moment
    counts_delayed: bool = True  # counts the delayed messages of each queue, and can purge them
    transactional: bool = False  # stores messages in a transaction of the caller's: `Transactional`


class Lease(Protocol):
    """The sign of life of one consumer, kept beside the event loop in which the consumer works.

    By a thread of the same process, or by another process. It connects when first used, on the
    event loop that uses it, and shares no connection with the consumer.
    """

    async def renew(self) -> bool:
        """Prolong the lease by its full length; False if it was lost.

        A lost lease never comes back: what the consumer held was taken from it.

        Raises:
            BrokerUnavailable: The broker cannot be reached now; the lease still runs.
        """
        ...

    async def end(self, note: str) -> int:
        """Give the consumer up for dead now: for whoever saw its process die.

        What it held is taken back as `Broker.maintain` does it, `crashes` one higher, and is there
        to be fetched when the call returns, up to a bounded number; the rest follows with the
        next rounds of `maintain`. A consumer that was closed or given up before is left as it is.

        Args:
            note: How it died, for people; deliveries bring it along as `crash_note`.

        Returns:
            How many messages were taken back.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection. The lease itself ends with the consumer's `close`."""
        ...


class Consumer(Protocol):
    """One incarnation of a worker at a broker: a lease, and what is held under it.

    An incarnation that was given up for dead never lives again; a worker makes a new one.
    """

    id: str

    @property
    def grant(self) -> Grant:
        """What `Broker.lease` takes to keep this consumer alive."""
        ...

    async def open(self) -> None:
        """Begin the lease. Raises `BrokerUnavailable` if the broker cannot be reached."""
        ...

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        """Take up to `limit` due envelopes, waiting up to `wait` seconds for the first.

        Queues are drained one after the other, within a queue by priority, then oldest first.
        Returns as soon as there is one, so a short batch means that the queues are short. Nothing
        delayed, cancelled, dead or held is returned. What has expired is handed out with a mark,
        so that its end can be told.

        A call that waits is woken by what is stored, and at the moment at which something falls
        due, whoever stored it and in whatever order. Looking from time to time is only for what
        a lost message should have told.

        A message that crashed `SUSPECT` times or more is handed out alone, and before all
        others: as the only one of a batch, to a consumer that holds nothing. One that holds
        something is passed over it, and hears in `news` that it is there. Among themselves, those
        of one queue are in no particular order.

        Cancelling the call loses nothing: what it took comes back with the next
        call, or when the lease ends.

        Args:
            limit: The most to take; at least 1.
            wait: Seconds; 0 asks without waiting.
            order: The order in which this call drains the queues, all of the consumer's and each
                once; None: as the consumer names them. It says nothing of other calls: what an
                earlier one took, and was cancelled, comes first.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
            LeaseLost: This incarnation was given up for dead.
        """
        ...

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        """Apply every settlement; return the deliveries that were no longer held.

        Each takes effect once or not at all, and one whose delivery was settled, released or
        taken back before changes nothing. The same call may be made again after an error.

        Raises:
            BrokerUnavailable: The broker cannot be reached now; any part may have taken effect.
        """
        ...

    async def news(self) -> News:
        """Return what has been cancelled since the last call, and whether suspects wait.

        Ids may be among them that this consumer does not hold.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
            LeaseLost: This incarnation was given up for dead, where that costs nothing to see.
        """
        ...

    async def close(self) -> None:
        """End the lease and hand back what is still held, nothing counted. Idempotent.

        Does not raise when the broker is away: the lease lapses by itself.
        """
        ...


class Broker(Protocol):
    """Where messages wait."""

    traits: ClassVar[Traits]

    @property
    def url(self) -> str:
        """Where it is, without the password: for banners and logs."""
        ...

    def clone(self) -> Self:
        """Return a closed driver of the same settings, for another event loop."""
        ...

    def backend(self) -> ResultBackend | None:
        """Return a closed result backend on this broker's own store; None if it has none."""
        ...

    async def open(self) -> None:
        """Connect and make ready. Idempotent.

        Raises:
            BrokerUnavailable: It cannot be reached now.
        """
        ...

    async def close(self) -> None:
        """Let go of everything. Idempotent, never raises."""
        ...

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        """Store every envelope; return the ids refused because they were stored before.

        On return all are stored. Order is kept within a queue and priority. An empty batch is
        free. On an error some may be stored.

        Args:
            batch: Of any size.
            call_id: Makes the call safe to repeat after an error: what a call of this id
                has stored within the last minute is not stored again.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> Consumer:
        """Return a new consumer of `queues`; it is not open yet.

        Args:
            queues: In the order in which they are to be drained.
            name: The worker's name, for people; it may be used again at once.
            lease: Seconds that a consumer is trusted without a sign of life.
            about: What `consumers` tells of it; no driver reads it.
        """
        ...

    def schedules(self) -> ScheduleStore:
        """Return the schedules of this broker's store, to be used while the broker is open.

        Raises:
            Unsupported: The store keeps none; see `traits`.
        """
        ...

    def lease(self, grant: Grant) -> Lease:
        """Return what keeps a consumer alive, or ends it: one of any process."""
        ...

    async def consumers(self) -> Sequence[ConsumerInfo]:
        """Return the consumers whose leases run."""
        ...

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        """Never hand out the envelopes of these ids again, and tell those who hold one.

        Args:
            ids: Unknown ones do no harm, and stay cancelled if they are published later.
            running: Whether those that are held now are meant as well. If not, they are left
                alone, and may come back.

        Returns:
            With ``running=False`` the ids that are held now; otherwise nothing of interest.
        """
        ...

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        """Do the housekeeping: promote what is due, take back what lapsed.

        A message that was held by a consumer whose lease lapsed goes back to the head of its
        queue, with `crashes` one higher, without limit: when there were too many, the worker
        that gets it next buries it, and tells whoever waits for its outcome. Dead letters
        beyond `limits` are dropped, the oldest first.
        Safe to run in every worker at once; a bounded amount of work per call.
        """
        ...

    async def depth(self) -> Mapping[str, Depth]:
        """Count the messages of each queue that has any, by state."""
        ...

    async def purge(self, queue: str) -> int:
        """Drop what waits in a queue, delayed ones included; return how many.

        What is held is not touched, dead letters stay.
        """
        ...

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        """Return dead letters of a queue, the newest first.

        Args:
            queue: Its name.
            limit: The most to return.
            before: The key of a letter: only older letters are returned. The letter itself may be
                gone by now.

        Raises:
            ConfigError: `before` is not a key that this broker gives to its letters.
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        """Store an envelope in place of each dead letter, given by its key, in one step each.

        Whether the envelope's id was stored or cancelled before does not matter: it counts as
        new, without crashes, and is no longer cancelled.

        Returns:
            The keys of those that were not there; their envelopes are not stored.
        """
        ...

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        """Drop dead letters; return how many there were."""
        ...


@runtime_checkable
class Transactional(Protocol):
    """A broker, or what stands for one, that stores messages in a transaction of the caller's."""

    async def publish_in(self, connection: object, batch: Sequence[Envelope]) -> Collection[str]:
        """Store every envelope if and only if the caller's transaction commits.

        Args:
            connection: The caller's own, with a transaction open on it.
            batch: Of any size.

        Returns:
            The ids refused because they were stored before.

        Raises:
            ConfigError: It is no connection to such a store, or there are no tables behind it.
            Exception: What the caller's own client raises where his transaction cannot go on, as
                after a conflict with another one.
        """
        ...
