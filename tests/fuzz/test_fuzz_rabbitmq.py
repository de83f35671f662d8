"""The fuzzer on RabbitMQ."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.testing.fuzz import body_attacks, check_dead_commands, fuzz
from tests.fuzz import attacks_rabbitmq
from tests.fuzz.test_fuzz import SECONDS, seed
from tests.servers import RabbitServer

__all__ = ["seed"]

pytestmark = [pytest.mark.may_block, pytest.mark.timeout(240 + 10 * SECONDS)]


async def test_hostile_messages_in_rabbitmq_harm_nobody(
    rabbit_server: RabbitServer, seed: int, tmp_path: Path
) -> None:
    rabbit_server.start()
    url = rabbit_server.url()
    broker = RabbitBroker(url)
    await broker.open()
    attacks = [
        *attacks_rabbitmq.attacks(rabbit_server, seed),
        *body_attacks(broker.publish, seed),
    ]
    assert await fuzz(url, attacks, seconds=SECONDS, seed=seed)
    await broker.close()
    await asyncio.to_thread(check_dead_commands, url, tmp_path)
