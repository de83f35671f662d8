"""What a consumer loses with its connection: a crash to the server, though its process may live.

A process that lives on says so in the ledger, and the loss is no crash then. A dead one is silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping

from aiotaskq.drivers.rabbitmq.channel import Disconnected, Refused
from aiotaskq.drivers.rabbitmq.items import Item, Life
from aiotaskq.drivers.rabbitmq.ledger import Alive, encode
from aiotaskq.drivers.rabbitmq.wire import Wire
from aiotaskq.errors import ConfigError, Unavailable

_MOST = 100_000  # messages of which losses are remembered
_PAUSE = 0.1  # seconds between attempts to say that the process lives
_LAST_WORD = 5.0  # seconds that a consumer which is closed has for that


class Spared:
    """Which losses were no crashes, of the messages that were lost last."""

    def __init__(self) -> None:
        self._consumers: dict[Life, frozenset[str]] = {}

    def note(self, consumer: str, held: Collection[Life]) -> None:
        """Note that a consumer has lost these, and lives. Twice is as good as once."""
        for life in held:
            before = self._consumers.pop(life, frozenset())
            self._consumers[life] = before | {consumer}
        while len(self._consumers) > _MOST:
            del self._consumers[next(iter(self._consumers))]

    def count(self, life: Life) -> int:
        """Return how often a message was lost without a crash."""
        return len(self._consumers.get(life, ()))


class Losses:
    """Says that the process of a consumer lives when the connection is lost.

    Not where it stood still, so that the server had to give it up: what makes it do so again and
    again has to be found out as what kills it is.

    Args:
        consumer_id: Of the consumer.
        held: What it holds, by tag.
        write: Adds a record to the ledger, over another connection.
        heartbeat: Seconds; after more than that without a sign of life the server gives it up.
    """

    def __init__(
        self,
        consumer_id: str,
        held: Mapping[int, Item],
        write: Callable[[bytes], Awaitable[None]],
        heartbeat: float,
    ) -> None:
        self._id = consumer_id
        self._held = held
        self._write = write
        self._heartbeat = heartbeat
        self._beating: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._beat_at = 0.0
        self._stood_until = float("-inf")

    def watch(self, wire: Wire) -> None:
        """Begin: what is lost with this connection is told of."""
        self._beat_at = wire.loop.time()
        self._beating = wire.loop.create_task(self._beat())
        wire.closed.add_done_callback(lambda _: self._lose())

    async def told(self) -> None:
        """Wait until it is told, or cannot be told in time. At once if nothing was lost."""
        if self._telling is not None:
            await asyncio.wait([self._telling], timeout=_LAST_WORD)

    def close(self) -> None:
        """End: what is lost from now on counts as a crash."""
        for task in (self._beating, self._telling):
            if task is not None:
                task.cancel()
        self._beating = None

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._heartbeat / 4)
            if loop.time() - self._beat_at > self._heartbeat:
                self._stood_until = loop.time()
            self._beat_at = loop.time()

    def _lose(self) -> None:
        if self._beating is None:
            return
        loop = asyncio.get_running_loop()
        now, heartbeat = loop.time(), self._heartbeat
        stood = now - self._beat_at > heartbeat or now - self._stood_until < heartbeat
        held = {item.life for item in self._held.values()}
        if held and not stood:
            self._telling = loop.create_task(self._tell(encode(Alive(self._id, tuple(held)))))

    async def _tell(self, record: bytes) -> None:
        told = False
        while not told:
            try:
                await self._write(record)
                told = True
            except (Unavailable, Disconnected, Refused):
                await asyncio.sleep(_PAUSE)
            except ConfigError:  # whoever uses the broker is told of that
                return
