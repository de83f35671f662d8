"""RabbitMQ: a broker on its queues, and a result backend that sends results to the callers.

The driver is built in layers, each file using those above it:

- `url.py`, `names.py`, `frames.py`, `properties.py`, `channel.py`, `transport.py`: AMQP.
- `connection.py`: a connection that comes back after a failure.
- `messages.py`, `delays.py`: the form of messages at rest.
- `membership/`: facts that all processes share, and that the server does not report.
- `topology.py`, `queue_watch.py`: the queues and exchanges, declared when they are needed, counted
  and forgotten.
- `unacked.py`, `consumer_loop.py`, `consumer_thread.py`, `consumer.py`: a consumer.
- `dead_letters.py`, `lease.py`, `broker.py`, `outcomes.py`, `results.py`: the rest of the contract.
"""

from __future__ import annotations

from aiotaskq.drivers.rabbitmq.broker import RabbitBroker
from aiotaskq.drivers.rabbitmq.results import RabbitBackend

__all__ = ["RabbitBackend", "RabbitBroker"]
