"""A RabbitMQ that runs, a prefix that no other test has, and a broker on both."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest

from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq.channel import RabbitChannel
from aiotaskq.drivers.rabbitmq.transport import connect
from aiotaskq.drivers.rabbitmq.url import parse_url
from tests.servers import RabbitServer

_numbers = itertools.count()


@pytest.fixture
def prefix() -> str:
    return f"p{next(_numbers)}"


@pytest.fixture
def url(rabbit_server: RabbitServer) -> str:
    rabbit_server.start()
    return rabbit_server.url()


@pytest.fixture
async def broker(url: str, prefix: str) -> AsyncIterator[RabbitBroker]:
    broker = RabbitBroker(url, prefix=prefix)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def channel(url: str) -> AsyncIterator[RabbitChannel]:
    """A channel of an operator or a stranger, with confirms."""
    transport = await connect(parse_url(url))
    yield await transport.open_channel(confirms=True)
    await transport.close()
