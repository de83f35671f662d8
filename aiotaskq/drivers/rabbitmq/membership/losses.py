"""Lost connections that were no crashes, though the server counts all of them alike.

A process that lives on records the messages that its consumer has lost, and all processes subtract
these losses. A dead process records nothing, and its losses stay crashes.

Theory of operation
-------------------
A `LossReporter` watches one connection. It is idle until the connection fails; then it writes one
record with everything that was held, again and again until the ledger has it or the consumer is
closed. Writing it twice is harmless: losses are counted by consumer, and a consumer loses each
message once.

Another consumer may get a message before it has read the record. It counts one crash too many for
that delivery; the next delivery of the message is counted right.

A process that stood still for longer than the heartbeat records nothing, because the server was
right to give it up: a message that makes its process stand still must be recognized like one that
kills it. `_beat` notices that by its own delay. `close` stops the reporter: losses count as crashes
from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from aiotaskq.drivers.rabbitmq.membership.records import ConsumerSurvived, LedgerRecord
from aiotaskq.drivers.rabbitmq.messages import Lineage
from aiotaskq.drivers.rabbitmq.transport import RabbitTransport
from aiotaskq.errors import ConfigError, Unavailable

_MOST = 100_000  # messages whose losses are remembered
_RETRY_PAUSE = 0.1  # seconds between attempts to write the record
_CLOSING_WAIT = 5.0  # seconds that closing a consumer waits for that


class HarmlessLosses:
    """The number of losses without a crash, of the messages that were lost last."""

    def __init__(self) -> None:
        self._consumers: dict[Lineage, frozenset[str]] = {}

    def note(self, consumer: str, held: Collection[Lineage]) -> None:
        """Note that a consumer has lost these messages and lives. Idempotent."""
        for lineage in held:
            before = self._consumers.pop(lineage, frozenset())
            self._consumers[lineage] = before | {consumer}
        while len(self._consumers) > _MOST:
            del self._consumers[next(iter(self._consumers))]

    def count(self, lineage: Lineage) -> int:
        """Return how often a message was lost without a crash."""
        return len(self._consumers.get(lineage, ()))


class LossReporter:
    """Records that the process of a consumer lives when its connection is lost.

    Args:
        consumer_id: The consumer.
        held: Returns the messages that it holds.
        write: Appends a record to the ledger, over another connection.
        heartbeat: Seconds; the server gives up a connection that is silent for longer.
    """

    def __init__(
        self,
        consumer_id: str,
        held: Callable[[], Collection[Lineage]],
        write: Callable[[LedgerRecord], Awaitable[None]],
        heartbeat: float,
    ) -> None:
        self._id = consumer_id
        self._held = held
        self._write = write
        self._heartbeat = heartbeat
        self._beating: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._beat_at = 0.0
        self._stood_still_until = float("-inf")

    def watch(self, transport: RabbitTransport) -> None:
        """Begin to watch a connection."""
        self._beat_at = transport.loop.time()
        self._beating = transport.loop.create_task(self._beat())
        transport.closed.add_done_callback(lambda _: self._report_loss())

    async def reported(self) -> None:
        """Wait until a loss is recorded, for a limited time. Returns at once if there was none."""
        if self._reporting is not None:
            await asyncio.wait([self._reporting], timeout=_CLOSING_WAIT)

    def close(self) -> None:
        """Stop: a loss counts as a crash from now on, unless it is recorded."""
        for task in (self._beating, self._reporting):
            if task is not None:
                task.cancel()
        self._beating = None

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._heartbeat / 4)
            if loop.time() - self._beat_at > self._heartbeat:
                self._stood_still_until = loop.time()
            self._beat_at = loop.time()

    def _report_loss(self) -> None:
        if self._beating is None:
            return
        loop = asyncio.get_running_loop()
        now, heartbeat = loop.time(), self._heartbeat
        # Either it stands still just now, or `_beat` has run since and has noticed.
        stood_still = now - self._beat_at > heartbeat or now - self._stood_still_until < heartbeat
        held = self._held()
        if held and not stood_still:
            record = ConsumerSurvived(self._id, tuple(held))
            self._reporting = loop.create_task(self._report(record))

    async def _report(self, record: ConsumerSurvived) -> None:
        while True:
            try:
                await self._write(record)
            except Unavailable:
                await asyncio.sleep(_RETRY_PAUSE)
            except ConfigError:  # the users of the broker get it, too
                return
            else:
                return
