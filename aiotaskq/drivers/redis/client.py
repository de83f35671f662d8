"""What a broker and its consumers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from aiotaskq.drivers.redis.items import Serials
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.link import Link
from aiotaskq.drivers.redis.server import Address
from aiotaskq.errors import BrokerFull, BrokerUnavailable

Value = TypeVar("Value")

MOST = 1000
"""Entries in one call of a script: Lua's stack has room for some 8000 values."""

MOST_BYTES = 4 * 2**20
"""Bytes in one call of a script, about: nobody else is served meanwhile."""


class Client:
    """One client of a store.

    Attributes:
        address: Where the store is.
        keys: What its keys are called.
        serials: For what is delayed.
        time_shift: Seconds added to the server's clock. Only a test harness changes it.
    """

    def __init__(self, address: Address, keys: Keys) -> None:
        self.address = address
        self.keys = keys
        self.serials = Serials()
        self.time_shift = 0.0
        self._link: Link | None = None

    @property
    def link(self) -> Link:
        """The connection for ordinary commands.

        Raises:
            BrokerUnavailable: The broker is not open.
        """
        if self._link is None:
            raise BrokerUnavailable(f"{self.address.url}: the broker is not open")
        return self._link

    @property
    def is_open(self) -> bool:
        """Whether there is a link."""
        return self._link is not None

    async def open(self) -> None:
        """Connect, and see that the server will do."""
        link = self.shared_link()
        try:
            await link.open()
        except BaseException:
            await link.close()
            raise
        if self._link is None:
            self._link = link
        else:  # two tasks opened it at once
            await link.close()

    async def close(self) -> None:
        """Disconnect."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    def shared_link(self) -> Link:
        """Return a link for ordinary commands, whose connection others may share."""
        return self.new_link()

    def new_link(self) -> Link:
        """Return a link with a connection of its own, for one that blocks."""
        return Link(self.address, BrokerUnavailable, full=BrokerFull)


def portions(values: Sequence[Value], sizes: Sequence[int]) -> Iterator[Sequence[Value]]:
    """Split values, given their sizes in bytes, into what a script takes in one call."""
    if len(values) <= MOST and sum(sizes) <= MOST_BYTES:
        if values:
            yield values
        return
    portion: list[Value] = []
    total = 0
    for value, size in zip(values, sizes, strict=True):
        if len(portion) == MOST or (portion and total + size > MOST_BYTES):
            yield portion
            portion, total = [], 0
        portion.append(value)
        total += size
    if portion:
        yield portion
