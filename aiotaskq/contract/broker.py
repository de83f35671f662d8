"""Contract of a broker: the protocols that a driver for a message store implements.

A driver implements `Broker`, `Consumer` and `Lease`, and may implement `Transactional`. The
conformance suites in `aiotaskq.testing` test every sentence below.

Making a driver object is cheap and opens no connection. The object belongs to the event loop that
opens it. `clone` returns another object with the same settings, for another event loop.

States of a message, and what changes them::

    publish ──▶ delayed
                   │ it is due
                   ▼        fetch           Done
    publish ──▶ ready ─────────────▶ held ────────▶ deleted
                 ▲ ▲                 │ │ │
                 │ └── given back ───┘ │ └─ Dead ─▶ dead letter ── revive ──▶ ready, delayed
                 │                     │                      └── discard ──▶ deleted
                 └──── Again ──────────┘

A message is given back by `Release`, by `Consumer.close`, or because its consumer was given up.
`cancel` and `purge` delete messages that are ready or delayed.

A message is held by one consumer, under the lease of that consumer. A consumer is *given up* when
its lease lapses, or when `Lease.end` ends it. Every message that it held then goes back with
`crashes` one higher, and the consumer can settle none of them any more. So each delivery is settled
once, even if a consumer that was given up goes on working.

Preconditions. The core of the package keeps to these; a driver need not check them, and drivers
differ in what they do otherwise:

- Names of queues and ids are 1 to 200 printable characters; names of queues have no commas.
- A limit is 1 or more. Lengths of time are finite and not negative; priorities are 0 to 9.
- Of `not_before` and `delay` at most one is given, and of `expires_at` and `expires_in`.
- A consumer has one queue or more, each named once; `order` names the same queues, or some of them
  where a call does not wait.
- A batch of settlements has one for each delivery at most, and only deliveries of this consumer.
- A `call_id` is not empty, and comes again only with the same batch.
- A schedule in `compare_and_swap` has the id that is given beside it.
- A driver is used between its `open` and its `close`, a lease before its `close`. A consumer that
  was closed or given up is not opened again. `close` itself may be called at any time.

Data that comes from the server is another matter: another program may have written it, so a driver
trusts nothing in it. An entry that it cannot read is set aside, logged once, and stops nothing
else: a message becomes a delivery that the worker refuses or a dead letter, a consumer or a notice
is skipped. A value that comes from the server never makes a call raise, or repeat without end.

Refusals. An entry of a batch that can never be stored (a delay, a name or a body beyond the limits
of the server) is not an outage. `publish`, `settle`, `revive` and `ResultBackend.store` apply all
the other entries of the batch and then raise `BatchRefused`, which has the reason of each. A
`ConfigError` of these calls says that the set-up does not work any more (a password was changed, a
table dropped); it holds for every entry.
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
    """Optional abilities of a broker. Each is a constant of the driver's class.

    Every broker has these abilities: batches, receipts that become void, delays, dead letters,
    redelivery after a crash, and cancelling of waiting messages. A broker without one of the traits
    need not keep the promises below that depend on it. A message that needs a missing trait is
    refused with `Unsupported` where it is sent, never inside a worker.
    """

    priorities: bool = True  # priorities 0 to 9 within a queue
    unique: bool = True  # stores a message with `Envelope.unique` once a day
    schedules: bool = True  # stores schedules, and sends each due run once
    durable: bool = True  # messages survive a restart of every process
    shared: bool = True  # other processes can reach the broker
    leases: bool = True  # a consumer outlives its connection, and others may renew or end its lease
    order: bool = True  # messages handed back go to the head of their queue, suspects before others
    atomic: bool = True  # a retry or a dead letter replaces its message in one step
    idempotent: bool = True  # `publish`, repeated with its `call_id`, stores nothing twice
    clock: bool = True  # delays and expiry go by one clock, and a message is ready when it is due
    counts_delayed: bool = True  # counts the delayed messages of each queue, and can purge them
    transactional: bool = False  # stores messages in a transaction of the caller: `Transactional`


class Lease(Protocol):
    """Lease of one consumer, seen from a thread or a process other than the consumer's.

    A worker renews its lease in a thread, so that a blocked event loop does not lose it. Another
    process renews it as well. The object connects when it is first used, on the event loop that
    uses it, and shares no connection with the consumer.
    """

    async def renew(self) -> bool:
        """Extend the lease to its full length from now; return False if it was lost.

        A lost lease never comes back: the messages of the consumer were taken from it.

        Raises:
            BrokerUnavailable: The broker cannot be reached now; the lease still runs.
        """
        ...

    async def end(self, note: str) -> int:
        """Give the consumer up now. For a caller that saw the consumer's process die.

        The messages that the consumer held are taken back as by `Broker.maintain`, with `crashes`
        one higher. They can be fetched when the call returns. If there are very many, a bounded
        number of them can; the next calls of `maintain` take the others back. Nothing happens
        to a consumer that was closed or given up before.

        Args:
            note: How it died, for people. Later deliveries of its messages carry the note as
                `crash_note`.

        Returns:
            The number of messages that were taken back.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def close(self) -> None:
        """Close the connection. This does not end the lease; the consumer's `close` does."""
        ...


class Consumer(Protocol):
    """A client that takes messages: one lease, and the messages held under it.

    A consumer that was given up never becomes valid again. The worker makes a new one.
    """

    id: str

    @property
    def grant(self) -> Grant:
        """The name of the lease, for `Broker.lease` in another thread or process."""
        ...

    async def open(self) -> None:
        """Begin the lease.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        """Take up to `limit` ready messages; wait up to `wait` seconds for the first one.

        Order: the queues are emptied one after the other. Within a queue higher priorities come
        first, then older messages.

        The call returns as soon as it has a message, and takes all that are ready, up to `limit`.
        So a batch with fewer messages means that no more were ready, unless it is a suspect (see
        below). It never returns messages that are delayed, cancelled, dead or held. An expired
        message is returned with the mark `Delivery.expired`, so that a worker can store its end.

        A waiting call is woken when a message becomes ready: by any process, at the moment
        at which a delayed one is due, and also if a message with an earlier due time is stored
        while the call waits. Polling may only cover notifications that were lost.

        A message with `SUSPECT` crashes or more is a *suspect*. It is delivered before all other
        messages and alone: as the only one of its batch, to a consumer that holds nothing. Other
        consumers do not get it; their `news` says that it waits. Suspects of one queue come in
        no particular order.

        If the call is cancelled, no message is lost: the next call returns the messages that this
        one took, or they become ready when the lease ends.

        Args:
            limit: The largest number of messages to take; at least 1.
            wait: Seconds; 0 returns at once.
            order: The queues of the consumer, in the order in which this call empties them; None:
                the order in which the consumer was made. A call that does not wait may leave queues
                out, and takes nothing from them. Messages that an earlier, cancelled call took come
                first all the same.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
            LeaseLost: This consumer was given up.
        """
        ...

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        """Apply every settlement; return the deliveries that this consumer did not hold any more.

        Each settlement takes effect once or not at all. It changes nothing if its delivery was
        settled, released or taken back before. The same call may be repeated after an error.

        Raises:
            BatchRefused: These settlements can never take effect, and their deliveries are still
                held. The others took effect; `answer` has the deliveries that were not held.
            BrokerUnavailable: The broker cannot be reached now. Some of the settlements may have
                taken effect.
        """
        ...

    async def news(self) -> News:
        """Return the ids cancelled since the last call, and whether suspects wait in the queues.

        The ids may include messages that this consumer does not hold.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
            LeaseLost: This consumer was given up. A driver need not check this here.
        """
        ...

    async def close(self) -> None:
        """End the lease and hand back the messages held, without counting a crash. Idempotent.

        Does not raise if the broker cannot be reached: the lease lapses then.
        """
        ...


class Broker(Protocol):
    """Store of messages: queues, delayed messages, dead letters, and the leases of consumers."""

    traits: ClassVar[Traits]

    @property
    def url(self) -> str:
        """The URL without the password, for banners and logs."""
        ...

    def clone(self) -> Self:
        """Return a closed driver with the same settings, for another event loop."""
        ...

    def backend(self) -> ResultBackend | None:
        """Return a closed result backend on this broker's own store; None if there is none."""
        ...

    async def open(self) -> None:
        """Connect, and create tables or queues that are missing. Idempotent.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def close(self) -> None:
        """Close all connections. Idempotent, never raises."""
        ...

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        """Store every envelope; return the ids that were refused as duplicates.

        An id is refused only if its envelope is `unique`. When the call returns, all other
        envelopes are stored. Their order is kept within a queue and a priority. An empty batch
        needs no connection.

        Args:
            batch: Any number of envelopes.
            call_id: Makes it safe to repeat the call after an error: envelopes that a call with
                this id stored within the last minute are not stored again.

        Raises:
            BatchRefused: These envelopes can never be stored, or (`BrokerFull`) there is no room
                for them. All others are stored; `answer` has the ids refused as duplicates.
            BrokerFull: There is no room for any of them, and none is stored.
            BrokerUnavailable: The broker cannot be reached now. Some envelopes may be stored.
            Exception: Any other error; none of the envelopes is stored.
        """
        ...

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> Consumer:
        """Return a new consumer, which is not open yet.

        Args:
            queues: Its queues, in the order in which it empties them.
            name: The name of the worker, for people. Another consumer may have the same name.
            lease: Length of the lease: seconds without a renewal after which it lapses.
            about: Data that `consumers` returns. No driver reads it.
        """
        ...

    def schedules(self) -> ScheduleStore:
        """Return the schedule store of this broker; usable while the broker is open.

        Raises:
            Unsupported: The broker stores no schedules; see `traits`.
        """
        ...

    def lease(self, grant: Grant) -> Lease:
        """Return the lease of a consumer, which may belong to another process."""
        ...

    async def consumers(self) -> Sequence[ConsumerInfo]:
        """Return the consumers whose leases run."""
        ...

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        """Never deliver the messages with these ids again; tell the consumers that hold them.

        Args:
            ids: The ids. One that is unknown stays cancelled, and a message that is published
                with it later is not delivered either.
            running: Whether this includes messages that are held now. If not, they are left alone
                and may be delivered again.

        Returns:
            With ``running=False`` the ids that are held now. Otherwise the value has no meaning.
        """
        ...

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        """Return those of the ids that stay cancelled, so that a message with one is dropped.

        An id stays cancelled for a week, unless its message is revived.

        Raises:
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        """Do the maintenance: deliver due messages, take back messages of dead consumers.

        1. Delayed messages that are due become ready.
        2. Consumers whose leases lapsed are given up. Their messages go to the head of their
           queues, with `crashes` one higher. There is no limit here: the worker that gets a message
           with too many crashes moves it to the dead letters, because only a worker can store its
           outcome.
        3. Dead letters beyond `limits` are deleted, the oldest first.

        All workers may call it at the same time. One call does a bounded amount of work.
        """
        ...

    async def depth(self) -> Mapping[str, Depth]:
        """Count the messages by state, for each queue that has any."""
        ...

    async def purge(self, queue: str) -> int:
        """Delete the ready and the delayed messages of a queue; return their number.

        Messages that are held and dead letters stay.
        """
        ...

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        """Return dead letters of a queue, the newest first.

        Args:
            queue: The name of the queue.
            limit: The largest number to return.
            before: The key of a dead letter; only older ones are returned. The dead letter itself
                may be gone by now.

        Raises:
            ConfigError: `before` is not a key that this broker gives to its dead letters.
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        """Replace each dead letter, given by its key, with an envelope; one step for each.

        The envelope counts as new, even if its id was stored or cancelled before: it has no
        crashes, and is no longer cancelled.

        Returns:
            The keys for which there is no dead letter. Their envelopes are not stored.

        Raises:
            BatchRefused: These envelopes can never be stored, and their dead letters stay. The
                others are stored; `answer` has the keys for which there is no dead letter.
            BrokerUnavailable: The broker cannot be reached now.
        """
        ...

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        """Delete dead letters; return the number of those that existed."""
        ...


@runtime_checkable
class Transactional(Protocol):
    """A broker that can store messages in a transaction of the caller. The outbox is one, too."""

    async def publish_in(self, connection: object, batch: Sequence[Envelope]) -> Collection[str]:
        """Store every envelope if and only if the caller's transaction commits.

        Args:
            connection: The caller's connection, with an open transaction.
            batch: Any number of envelopes.

        Returns:
            The ids that were refused as duplicates.

        Raises:
            ConfigError: This is not a connection to such a store, or its tables are missing.
            Exception: The error of the caller's client library if the transaction cannot go on,
                for example after a conflict with another transaction.
        """
        ...
