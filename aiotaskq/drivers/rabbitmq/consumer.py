"""One incarnation of a worker at RabbitMQ, as the worker's event loop sees it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.rabbitmq.address import Address
from aiotaskq.drivers.rabbitmq.calls import FetchCall
from aiotaskq.drivers.rabbitmq.inside import Inside
from aiotaskq.drivers.rabbitmq.link import Link
from aiotaskq.drivers.rabbitmq.names import Names
from aiotaskq.drivers.rabbitmq.thread import LoopThread
from aiotaskq.errors import BrokerFull, BrokerUnavailable

_here: WeakValueDictionary[str, RabbitConsumer] = WeakValueDictionary()


def find(consumer_id: str) -> RabbitConsumer | None:
    """Return a consumer of this process; None if it is of another."""
    return _here.get(consumer_id)


class RabbitConsumer:
    """Fetches and settles over a connection that lives in a thread of its own.

    Attributes:
        id: Its own, never used again.
        grant: What names its lease.
    """

    def __init__(
        self,
        address: Address,
        names: Names,
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
    ) -> None:
        self.id = f"{name}:{uuid.uuid4().hex}"
        self.grant = Grant(self.id, tuple(queues), lease)
        self._url = address.url
        self._queues = list(queues)
        link = Link(address, names, BrokerUnavailable, BrokerFull)
        self._inside = Inside(link, self.id, queues, about)
        self._thread: LoopThread | None = None

    @property
    def lives(self) -> bool:
        """Whether it is open and its connection stands."""
        return self._thread is not None and not self._inside.lost

    @property
    def holds(self) -> Mapping[str, int]:
        """How many messages it holds, by queue. For test harnesses."""
        return self._inside.holds()

    async def open(self) -> None:
        if self._thread is not None:
            return
        thread = self._thread = LoopThread()
        thread.start()
        try:
            await thread.run(self._inside.open())
        except BaseException:
            await self.close()
            raise
        _here[self.id] = self

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        call = FetchCall(limit, wait, order or self._queues)
        inside = self._inside
        return await self._running().run(inside.fill(call), lambda: inside.interrupt(call))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        if not batch:
            return ()
        return await self._running().run(self._inside.settle(batch))

    async def news(self) -> News:
        return await self._running().run(self._inside.news())

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            _here.pop(self.id, None)
            try:
                await thread.run(self._inside.close())
            finally:
                await thread.stop()

    async def abort(self) -> None:
        """Drop the connection, as the death of the process does. For test harnesses."""

        async def abort() -> None:
            self._inside.abort()

        await self._running().run(abort())

    def _running(self) -> LoopThread:
        if self._thread is None:
            raise BrokerUnavailable(f"{self._url}: the consumer is not open")
        return self._thread
