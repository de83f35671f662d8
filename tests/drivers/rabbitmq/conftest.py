"""A RabbitMQ that runs, a prefix that no other test has, and a broker on both."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest

from aiotaskq.drivers.rabbitmq import RabbitBroker
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
