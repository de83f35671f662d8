"""The contract of a result backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from aiotaskq.contract.outcome import Outcome


@runtime_checkable
class ReplyBackend(Protocol):
    """A result backend that sends outcomes to whoever sent the task, and keeps none for others."""

    async def reply_address(self) -> str:
        """Return where outcomes for this client are to be sent, to travel with its messages.

        From then on they are heard by `ResultBackend.subscribe`, and found by `ResultBackend.load`.

        Raises:
            BackendUnavailable: It cannot be reached now.
        """
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

    def subscribe(self) -> AsyncIterator[Sequence[str | Outcome]]:
        """Yield final outcomes, or their ids, as they are stored, by whatever process.

        Outcomes where they come at no cost: it spares those who wait a look. The first item is
        empty and says that the subscription stands: what was stored before it is found by
        `load`, what is stored after it will be yielded. An empty item later says that something
        may have been missed (a reconnect), or that something arrived whose id the store cannot
        tell. Ends when the iterator is closed; waits out an unreachable server by itself.
        """
        ...

    async def forget(self, ids: Collection[str]) -> int:
        """Delete outcomes; return how many there were."""
        ...


class Transaction(Protocol):
    """A transaction that a task writes in, and that ends with the task's outcome."""

    connection: Any
    """The client library's own connection, for the task."""

    async def commit(self, outcome: Outcome, ttl: float | None) -> bool:
        """Store the outcome and commit, or roll back and return False if the id has one.

        Raises:
            BackendUnavailable: The server cannot be reached; it may have been committed.
        """
        ...

    async def roll_back(self) -> None:
        """Undo what was written, unless it was committed. Idempotent, never raises."""
        ...


@runtime_checkable
class TransactionalResults(Protocol):
    """A result backend in whose transactions a task's own writes commit with its outcome."""

    async def begin(self) -> Transaction:
        """Begin a transaction.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        ...
