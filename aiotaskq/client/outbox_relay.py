"""The outbox relay: passes tasks from the outbox in PostgreSQL on to the broker.

Each worker process has a relay, and any number of relays may take from one outbox. A crash between
two steps does no harm::

    fetch from the outbox ──▶ publish at the broker ──▶ settle in the outbox
             │                        │
             │                        └ crash: the tasks are published again, and the broker refuses
             │                          their ids, which are unique
             └ crash: the lease ends, and another relay fetches the tasks
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from msgspec.structs import replace

from aiotaskq.client.outbox import Outbox, disclose
from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.settlement import Again, Dead, Done, Settlement
from aiotaskq.errors import (
    AioTaskQError,
    BatchRefused,
    ConfigError,
    DecodeError,
    LeaseLost,
    Unavailable,
)
from aiotaskq.readable import get_logger, on_one_line

logger = get_logger("aiotaskq.outbox")

_FIRST = 10  # envelopes taken at first, while their size is unknown
_BATCH = 1000  # envelopes passed on in one call
_BATCH_BYTES = 8 * 1024 * 1024
_WAIT = 2.0  # seconds that an idle fetch waits; a commit wakes it earlier
_AGAIN = 60.0  # seconds until an envelope that the broker refused is offered to it again


class OutageNotes(Protocol):
    """The part of a worker, or of a scheduler, that hears of outages."""

    def pause(self, error: Exception) -> float:
        """Note a failure and return the seconds to wait, longer each time."""
        ...

    def over(self) -> None:
        """Note a success."""
        ...


class OutboxRelay:
    """Passes envelopes on, one batch at a time.

    Args:
        outbox: The closed outbox.
        broker: The open broker.
        outage: Hears of servers that are away.
        name: The name of the worker or the scheduler.
        lease: Seconds after which another relay takes the envelopes of one that died.
    """

    def __init__(
        self, outbox: Outbox, broker: Broker, outage: OutageNotes, *, name: str, lease: float
    ) -> None:
        self._outbox = outbox
        self._broker = broker
        self._name = name
        self._lease = lease
        self._limit = _FIRST
        self._outage = outage

    async def run(self) -> None:
        """Pass envelopes on, until cancelled."""
        try:
            while True:
                try:
                    await self._live()
                except LeaseLost:
                    continue
                except AioTaskQError as error:  # a wrong setting included: somebody may mend it
                    await self._rest(error)
                except Exception as error:  # a fault of a driver must not strand the other tasks
                    logger.exception("the relay failed, and goes on")
                    await self._rest(error)
        finally:
            await self._outbox.close()

    async def _rest(self, error: Exception) -> None:
        await asyncio.sleep(self._outage.pause(error))

    async def _live(self) -> None:
        """Pass envelopes on under one lease, until it is lost or a server is away."""
        consumer = self._outbox.consumer(name=self._name, lease=self._lease)
        lease = self._outbox.store.lease(consumer.grant)
        try:
            await self._outbox.open()
            await consumer.open()
            while True:
                await self._outbox.store.maintain()
                # Shorter than the relay may go without renewing its lease.
                deliveries = await consumer.fetch(self._limit, min(_WAIT, self._lease / 4))
                if deliveries:
                    await self._pass_on(consumer, deliveries)
                    self._adapt(deliveries)
                self._outage.over()
                if not await lease.renew():
                    return
        finally:
            await lease.close()
            await consumer.close()

    def _adapt(self, deliveries: Sequence[Delivery]) -> None:
        """Choose how many envelopes to take next: as many of this size as fit one call."""
        size = sum(len(one.body) for one in deliveries) // len(deliveries)
        self._limit = max(1, min(_BATCH, 2 * self._limit, _BATCH_BYTES // max(size, 1)))

    async def _pass_on(self, consumer: Consumer, deliveries: Sequence[Delivery]) -> None:
        settlements: list[Settlement] = []
        envelopes: list[tuple[Delivery, Envelope]] = []
        for delivery in deliveries:
            try:
                envelope = disclose(delivery)
            except DecodeError as error:
                name = on_one_line(delivery.id)
                logger.error("%s in the outbox goes to its dead letters: %s", name, error)
                settlements.append(Dead(delivery, str(error), b""))
            else:
                envelopes.append((delivery, replace(envelope, unique=self._broker.traits.unique)))
        settlements += await self._publish(envelopes)
        try:
            await consumer.settle(settlements)
        except BatchRefused as error:  # they stay held until the lease ends
            logger.error("envelopes in the outbox cannot be settled: %s", error)

    async def _publish(self, batch: Sequence[tuple[Delivery, Envelope]]) -> list[Settlement]:
        if not batch:
            return []
        if len(batch) > 1 and sum(len(one.body) for _, one in batch) > _BATCH_BYTES:
            middle = len(batch) // 2
            return [
                done
                for half in (batch[:middle], batch[middle:])
                for done in await self._publish(half)
            ]
        try:
            await self._broker.publish([envelope for _, envelope in batch])
        except BatchRefused as error:
            refused = error.errors
        except Unavailable:
            raise
        except Exception as error:  # any, and nothing of the batch is stored then
            if len(batch) > 1:  # the others are not to wait for one that the broker refuses
                return [done for one in batch for done in await self._publish([one])]
            refused = {0: error}
        else:
            refused = {}
        return [
            _refused(delivery, refused[at]) if at in refused else Done(delivery)
            for at, (delivery, _) in enumerate(batch)
        ]


def _refused(delivery: Delivery, why: Exception) -> Settlement:
    """Return the settlement of an envelope that the broker does not take."""
    name = on_one_line(delivery.id)
    # A broker that is full, or set up wrongly, may take it later.
    if isinstance(why, Unavailable) or type(why) is ConfigError:
        logger.error("%s cannot be passed on from the outbox now: %s", name, why)
        return Again(delivery, _put_off(delivery))
    logger.error("%s in the outbox goes to its dead letters: %s", name, why)
    return Dead(delivery, f"the broker does not take it: {why}")


def _put_off(delivery: Delivery) -> Envelope:
    return Envelope(
        id=delivery.id,
        queue=delivery.queue,
        body=delivery.body,
        delay=_AGAIN,
        expires_at=delivery.expires_at,
    )
