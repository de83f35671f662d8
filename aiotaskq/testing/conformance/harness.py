"""Harnesses of the suites: one store, with control of its clock and its reachability.

The author of a driver writes them. A harness is made for one test, or for one history of the model,
on an empty store; the suite closes it at the end, whether the test passed or not.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.results import ResultBackend


class BrokerHarness(Protocol):
    """A store of messages, empty for each test, with control of its clock and reachability.

    Attributes:
        can_cut: Whether `cut` and `mend` work; tests that need them are skipped otherwise.
        can_stall: The same of `stall`.
    """

    can_cut: bool
    can_stall: bool

    async def broker(self) -> Broker:
        """Return another open driver, a client of its own, on the same store."""
        ...

    async def pass_time(self, seconds: float) -> None:
        """Bring every deadline of the store nearer, without sleeping where possible."""
        ...

    async def now(self) -> float:
        """Return the Unix time by the store's clock."""
        ...

    async def cut(self) -> None:
        """Make the store unreachable for all drivers."""
        ...

    async def mend(self) -> None:
        """Make it reachable again."""
        ...

    async def stall(self, seconds: float) -> None:
        """Pass time as when the server stands still: no lease can be renewed meanwhile."""
        ...

    async def leaks(self) -> list[str]:
        """Return descriptions of entries that would stay in the store for ever.

        Called when all consumers are closed, and no message waits, is held or is dead.
        """
        ...

    async def close(self) -> None:
        """Close all drivers, and empty the store."""
        ...


@runtime_checkable
class LethalHarness(Protocol):
    """The additional part of a harness of a broker without the trait `leases`."""

    async def kill(self, *consumers: Consumer) -> int:
        """End consumers as the death of their process would; return how many messages they held.

        The messages are back in their queues then; none was delivered to another of `consumers`.
        """
        ...


class ResultHarness(Protocol):
    """A store of outcomes, empty for each test, with control of its clock and reachability.

    Attributes:
        can_cut: Whether `cut` and `mend` work; tests that need them are skipped otherwise.
    """

    can_cut: bool

    async def backend(self) -> ResultBackend:
        """Return another open driver, a client of its own, on the same store."""
        ...

    async def pass_time(self, seconds: float) -> None:
        """Bring every deadline of the store nearer, without sleeping where possible."""
        ...

    async def cut(self) -> None:
        """Make the store unreachable for all drivers."""
        ...

    async def mend(self) -> None:
        """Make it reachable again."""
        ...

    async def close(self) -> None:
        """Close all drivers, and empty the store."""
        ...
