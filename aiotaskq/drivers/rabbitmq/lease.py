"""The sign of life of a consumer at RabbitMQ: its connection, which nobody else can end."""

from __future__ import annotations

from pamqp.commands import Basic

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.rabbitmq.address import Address
from aiotaskq.drivers.rabbitmq.channel import Disconnected, Publication, Refused, pack
from aiotaskq.drivers.rabbitmq.consumer import find
from aiotaskq.drivers.rabbitmq.ledger import encode
from aiotaskq.drivers.rabbitmq.link import Link
from aiotaskq.drivers.rabbitmq.names import Names
from aiotaskq.drivers.rabbitmq.roster import Question
from aiotaskq.errors import BrokerFull, BrokerUnavailable


class RabbitLease:
    """Tells whether a consumer's connection stands.

    Args:
        address: Where.
        names: What queues are called.
        grant: Whose.
    """

    def __init__(self, address: Address, names: Names, grant: Grant) -> None:
        self._grant = grant
        self._link = Link(address, names, BrokerUnavailable, BrokerFull)

    async def renew(self) -> bool:
        consumer = find(self._grant.consumer)
        if consumer is not None and consumer.lives:
            return True  # at no cost: the connection itself gives the sign of life
        return await self._is_there()

    async def end(self, note: str) -> int:
        # The server has seen the connection of a dead process end before anybody can say so.
        await self._link.ping()
        return 0

    async def close(self) -> None:
        await self._link.close()

    async def _is_there(self) -> bool:
        """Publish a question to its own queue, which is gone with it; nobody waits for answers."""
        link = self._link
        key = link.names.consumer(self._grant.consumer)
        properties = pack(Basic.Properties(reply_to="", correlation_id=""))
        try:
            confirmation = await link.start([Publication("", key, properties, encode(Question()))])
            await confirmation.done
        except (Disconnected, Refused) as error:
            link.explain(error)
        return not confirmation.returned
