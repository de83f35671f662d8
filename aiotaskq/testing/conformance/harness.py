"""The harnesses of the suites: one store, the handle on its clock and on its reachability."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.results import ResultBackend


class BrokerHarness(Protocol):
    """One store, fresh for each test, and the handle on its clock and its reachability."""

    can_cut: bool
    can_stall: bool

    async def broker(self) -> Broker:
        """Return another open driver, a client of its own, on the same store."""
        ...

    async def pass_time(self, seconds: float) -> None:
        """Bring every deadline of the store nearer, without sleeping where possible."""
        ...

    async def now(self) -> float:
        """Return the Unix time that the store goes by."""
        ...

    async def cut(self) -> None:
        """Make the store unreachable for all drivers."""
        ...

    async def mend(self) -> None:
        """Make it reachable again."""
        ...

    async def stall(self, seconds: float) -> None:
        """Let time pass as it does when the server stands still: nobody can renew meanwhile."""
        ...

    async def leaks(self) -> list[str]:
        """Name what is in the store that will stay for ever though every message is gone.

        Asked when all consumers are closed, and nothing waits, is held or is dead.
        """
        ...

    async def close(self) -> None:
        """Close every driver, and remove what the test left in the store."""
        ...


@runtime_checkable
class LethalHarness(Protocol):
    """What the harness of a broker without the trait `leases` is as well."""

    async def kill(self, *consumers: Consumer) -> int:
        """Let consumers die as their processes would; return how many messages were taken back.

        None of these messages comes to another of them.
        """
        ...


class ResultHarness(Protocol):
    """One result store, fresh for each test."""

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
        """Close every driver, and remove what the test left in the store."""
        ...
