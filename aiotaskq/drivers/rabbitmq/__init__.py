"""RabbitMQ: a broker on its queues, and results that are sent to who waits for them."""

from __future__ import annotations

from aiotaskq.drivers.rabbitmq.broker import RabbitBroker
from aiotaskq.drivers.rabbitmq.results import RabbitBackend

__all__ = ["RabbitBackend", "RabbitBroker"]
