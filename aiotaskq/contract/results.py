"""Contract of a result backend: the protocols that a driver for a store of outcomes implements.

As for brokers, making a driver object opens no connection, the object belongs to the event loop
that opens it, and `clone` returns another one for another event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from aiotaskq.contract.outcome import Outcome


@runtime_checkable
class ReplyBackend(Protocol):
    """A result backend that sends an outcome to the sender of the task, and to nobody else."""

    async def reply_address(self) -> str:
        """Return the address of this client, for the messages that it sends: `Message.reply_to`.

        From then on `ResultBackend.subscribe` and `ResultBackend.load` return the outcomes that
        are sent to it.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        ...


class ResultBackend(Protocol):
    """Store of outcomes."""

    wants_arguments: ClassVar[bool]
    """The wish for the task's arguments in every outcome, even if `result_extended` is off."""

    @property
    def url(self) -> str:
        """The URL without the password, for banners and logs."""
        ...

    def clone(self) -> Self:
        """Return a closed driver with the same settings, for another event loop."""
        ...

    async def open(self) -> None:
        """Connect, and create tables that are missing. Idempotent.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        ...

    async def close(self) -> None:
        """Close all connections. Idempotent, never raises."""
        ...

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        """Store the outcomes for `ttl` seconds (None: for ever); return the ids that were refused.

        The first final outcome of an id stays: later outcomes of the id are refused. An outcome
        that is not final is replaced by any later one. The same batch may be stored again after
        an error.

        Raises:
            BatchRefused: These outcomes can never be stored. The others are; `answer` has the ids
                that were refused.
            BackendUnavailable: The server cannot be reached now, or has no room. Some of the
                outcomes may be stored.
        """
        ...

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        """Return the outcomes that are stored now, by id.

        An id is missing if its task has stored no outcome yet, if nothing is known of the id, or if
        the outcome has expired.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        ...

    def subscribe(self) -> AsyncIterator[Sequence[str | Outcome]]:
        """Yield final outcomes, or their ids, when any process stores them.

        A whole outcome is yielded where the driver has it anyway; that saves callers a `load`.

        The first item is empty: the subscription has begun. Outcomes stored before it are found by
        `load`, outcomes stored after it are yielded. A later empty item means that some may have
        been missed, for example during a reconnect, or that one was stored whose id the store
        cannot tell: callers have to `load` what they wait for.

        The iterator ends when it is closed. While the server cannot be reached, it waits.
        """
        ...

    async def forget(self, ids: Collection[str]) -> int:
        """Delete outcomes; return the number of those that existed.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        ...


class Transaction(Protocol):
    """A database transaction of a task, which commits together with the outcome of the task."""

    connection: Any
    """The connection of the client library, for the task to write with."""

    async def commit(self, outcome: Outcome, ttl: float | None) -> bool:
        """Store the outcome and commit; roll back and return False if the id has an outcome.

        Raises:
            BackendUnavailable: The server cannot be reached. The transaction may be committed.
        """
        ...

    async def roll_back(self) -> None:
        """Roll back, unless it was committed. Idempotent, never raises."""
        ...


@runtime_checkable
class TransactionalResults(Protocol):
    """A result backend that stores an outcome in the transaction in which its task writes."""

    async def begin(self) -> Transaction:
        """Begin a transaction.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        ...
