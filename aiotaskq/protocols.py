"""What a driver must be: the seams between the core and the servers.

`aiotaskq.testing` ships the conformance suites: one test or more for each sentence below.

A driver object is cheap and closed when made. It belongs to the event loop that opened it;
`clone()` gives another one, of the same settings, for another loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import ClassVar, Protocol, Self

import msgspec

from aiotaskq.message import (
    DeadLetter,
    Delivery,
    Depth,
    Envelope,
    Outcome,
    Settlement,
    Tended,
)


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker can do beyond the floor that every driver reaches.

    The floor: batches, leases, fencing receipts, delays, dead letters, redelivery, cancelling
    what waits. A trait is data, read once; asking for what a broker lacks raises
    `Unsupported` where the message is sent, never inside a worker.
    """

    priorities: bool = True  # 0 to 9 within one queue
    unique: bool = True  # stores an id once when asked to
    durable: bool = True  # survives a restart of every process
    shared: bool = True  # reached by other processes


class Lease(Protocol):
    """The sign of life of one consumer, kept by a thread beside the event loop.

    Its methods run on an event loop of their own, so it shares no connection with the consumer.
    """

    async def renew(self) -> bool:
        """Prolong the lease by its full length; False if it was lost.

        A lost lease never comes back: what the consumer held was taken from it.

        Raises:
            BrokerUnavailable: The broker cannot be reached now; the lease still runs.
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

    async def open(self) -> None:
        """Begin the lease. Raises `BrokerUnavailable` if the broker cannot be reached."""
        ...

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        """Take up to `limit` due envelopes, waiting up to `wait` seconds for the first.

        Queues are drained in the order in which the consumer names them, within a queue by
        priority, then oldest first. Returns as soon as there is one, so a short batch means that
        the queues are short. Nothing delayed, cancelled, dead or held is returned. What has
        expired is handed out with a mark, so that its end can be told.
        Cancelling the call loses nothing: what it took comes back with the next
        call, or when the lease ends.

        Args:
            limit: The most to take; at least 1.
            wait: Seconds; 0 asks without waiting.

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

    async def cancelled(self) -> Collection[str]:
        """Return ids that were cancelled while this consumer may have held them."""
        ...

    def lease(self) -> Lease:
        """Return the object that a thread keeps this consumer alive with."""
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

    def consumer(self, queues: Sequence[str], *, name: str, lease: float) -> Consumer:
        """Return a new consumer of `queues`; it is not open yet.

        Args:
            queues: In the order in which they are to be drained.
            name: The worker's name, for people; it may be used again at once.
            lease: Seconds that a consumer is trusted without a sign of life.
        """
        ...

    async def cancel(self, ids: Collection[str]) -> None:
        """Never hand out the envelopes of these ids again, and tell those who hold one."""
        ...

    async def tend(self) -> Tended:
        """Do the housekeeping: promote what is due, take back what lapsed.

        A message that was held by a consumer whose lease lapsed goes back to the head of its
        queue, with `crashes` one higher, without limit: when there were too many, the worker
        that gets it next buries it, and tells whoever waits for its outcome.
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

    async def dead(self, queue: str, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest dead letters of a queue."""
        ...


class ResultBackend(Protocol):
    """Where outcomes rest."""

    wants_arguments: ClassVar[bool]
    """Whether outcomes should carry the task's arguments though `result_extended` is off."""

    @property
    def url(self) -> str:
        """Where it is, without the password: for banners and logs."""
        ...

    def clone(self) -> Self:
        """Return a closed driver of the same settings, for another event loop."""
        ...

    async def open(self) -> None:
        """Connect and make ready, tables included. Idempotent.

        Raises:
            BackendUnavailable: It cannot be reached now.
        """
        ...

    async def close(self) -> None:
        """Let go of everything. Idempotent, never raises."""
        ...

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        """Keep the outcomes for `ttl` seconds (None: for ever); return the ids refused.

        The first final outcome of an id stays, and whatever comes after it is refused; one
        that is not final is replaced by any later one. Storing the same batch again
        after an error is safe.

        Raises:
            BackendUnavailable: It cannot be reached now; any part may be stored.
        """
        ...

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        """Return those that are there now: absent means waiting, unknown or out of date."""
        ...

    def arrivals(self) -> AsyncIterator[Sequence[str]]:
        """Yield the ids of final outcomes as they are stored, by whatever process.

        The first item is empty and says that the subscription stands: what was stored before it
        is found by `load`, what is stored after it will be yielded. An empty item later
        says that something may have been missed (a reconnect), or that something
        arrived whose id the store cannot tell. Ends when the iterator is closed;
        waits out an unreachable server by itself.
        """
        ...

    async def forget(self, ids: Collection[str]) -> int:
        """Delete outcomes; return how many there were."""
        ...
