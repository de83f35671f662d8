"""The lease of a consumer at RabbitMQ: its connection, which no other process can renew or end."""

from __future__ import annotations

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.consumer import find_consumer
from aiotaskq.drivers.rabbitmq.membership import RabbitMembership
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.url import RabbitAddress
from aiotaskq.errors import BrokerFull, BrokerUnavailable


class RabbitLease:
    """Reports whether a consumer's connection stands.

    Args:
        address: The server.
        names: The names of queues.
        grant: Names the consumer.
    """

    def __init__(self, address: RabbitAddress, names: RabbitNames, grant: Grant) -> None:
        self._grant = grant
        self._connection = RabbitConnection(address, names, BrokerUnavailable, BrokerFull)
        self._membership = RabbitMembership(self._connection)

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
