"""The consumer as the worker's event loop sees it: each call is passed on to its thread.

Theory of operation
-------------------
A consumer is closed, open, or closed for good. `open` starts the thread and opens the consumer in
it (`consumer_loop.py`); if that fails or is cancelled, the thread ends. A call that is cancelled
runs on in the thread, and a fetch is made to end soon. `close` hands back the held messages and
ends the thread, also when it is cancelled.

Open consumers of this process are found by id, so that a lease of the same process checks the
connection itself. The table holds no consumer alive.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import ConsumerInfo, Grant, News
from aiotaskq.contract.settlement import Settlement
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.consumer_loop import ConsumerLoop
from aiotaskq.drivers.rabbitmq.consumer_thread import ConsumerThread, FetchCall
from aiotaskq.errors import BrokerUnavailable

_open_consumers: WeakValueDictionary[str, RabbitConsumer] = WeakValueDictionary()


def find_consumer(consumer_id: str) -> RabbitConsumer | None:
    """Return an open consumer of this process; None if there is none of this id."""
    return _open_consumers.get(consumer_id)


class RabbitConsumer:
    """Fetches and settles over a connection that lives in a thread of its own.

    Args:
        connection: A connection to publish on, of its own, which it closes.
        queues: The queues in the order of draining.
        name: The name of the worker.
        lease: Seconds.
        about: A description of the worker, for others.

    Attributes:
        id: Its id, never used again.
        grant: Names its lease.
    """

    def __init__(
        self,
        connection: RabbitConnection,
        queues: Sequence[str],
        *,
        name: str,
        lease: float,
        about: bytes,
    ) -> None:
        self.id = f"{name}:{uuid.uuid4().hex}"
        self.grant = Grant(self.id, tuple(queues), lease)
        self._url = connection.address.url
        self._queues = list(queues)
        self._loop = ConsumerLoop(
            connection, ConsumerInfo(id=self.id, queues=tuple(queues), about=about)
        )
        self._thread: ConsumerThread | None = None
        self._closed = False  # for good: its messages were given back

    @property
    def lives(self) -> bool:
        """Return whether it is open and its connection stands."""
        return self._thread is not None and not self._loop.lost

    @property
    def holds(self) -> Mapping[str, int]:
        """The number of messages that it holds, by queue. For test harnesses."""
        return self._loop.unacked.counts()

    async def open(self) -> None:
        if self._thread is not None:
            return
        thread = self._thread = ConsumerThread()
        thread.start()
        try:
            await thread.run(self._loop.open())
        except BaseException:
            await self.close()
            raise
        _open_consumers[self.id] = self

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        call = FetchCall(limit, wait, order or self._queues)
        loop = self._loop
        return await self._running().run(loop.fetch(call), lambda: loop.end_fetch(call))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        if not batch:
            return ()
        if self._closed:
            return [one.delivery for one in batch]
        return await self._running().run(self._loop.settle(batch))

    async def news(self) -> News:
        return await self._running().run(self._loop.news())

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._closed = _open_consumers.pop(self.id, None) is not None
            try:
                await thread.run(self._loop.close())
            finally:
                await thread.stop()

    async def abort(self) -> None:
        """Drop the connection, as the death of the process does. For test harnesses."""
        await self._running().run(self._loop.abort())

    def _running(self) -> ConsumerThread:
        if self._thread is None:
            raise BrokerUnavailable(f"{self._url}: the consumer is not open")
        return self._thread
