"""The lease of a consumer at RabbitMQ: its connection, which no other process can renew or end."""

from __future__ import annotations

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.consumer import find_consumer
from aiotaskq.drivers.rabbitmq.membership import RabbitMembership


class RabbitLease:
    """Reports whether a consumer's connection stands.

    Args:
        connection: A connection of its own, which it closes.
        grant: Names the consumer.
    """

    def __init__(self, connection: RabbitConnection, grant: Grant) -> None:
        self._grant = grant
        self._connection = connection
        self._membership = RabbitMembership(connection)

    async def renew(self) -> bool:
        consumer = find_consumer(self._grant.consumer)
        if consumer is not None and consumer.lives:
            return True  # without a call: the heartbeats of its connection are the sign of life
        return await self._membership.is_present(self._grant.consumer)

    async def end(self, note: str) -> int:
        # The server has seen the connection of a dead process end, before this call could be made.
        await self._connection.ping()
        return 0

    async def close(self) -> None:
        await self._membership.close()
        await self._connection.close()
