"""What exchanges and queues are called, and what they are made of."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from pamqp.commands import Queue

from aiotaskq.errors import ConfigError

_LONGEST = 255  # bytes: AMQP's short string
_PLAIN = "-_.:@#,/ "  # and letters and digits; pamqp takes these and + in a name
_LONGEST_HELD = 4_000_000_000  # milliseconds: 46 days; timers of Erlang end soon after that
_NEVER = 1_000_000  # hand-outs after which the server itself takes a message out of its queue

Declaration = Queue.Declare


class Names:
    """Every name begins with the prefix, and then says what it is of.

    Args:
        prefix: What all names begin with.
        queue_type: ``quorum`` or ``classic``: of everything that holds messages.
    """

    def __init__(self, prefix: str, queue_type: str) -> None:
        self.prefix = prefix
        self.queue_type = queue_type
        self.ledger = f"{prefix}.ledger"
        self.queues = f"{prefix}.queues"
        self.graves = f"{prefix}.dead"

    def ready(self, queue: str) -> str:
        """Return what holds the messages of a queue."""
        return self._fit("queue", queue)

    def suspects(self, queue: str) -> str:
        """Return what holds those messages of a queue that are to be handed out alone."""
        return self._fit("suspects", queue)

    def dead(self, queue: str) -> str:
        """Return what holds the dead letters of a queue."""
        return self._fit("dead", queue)

    def lock(self, queue: str) -> str:
        """Return the queue that is there while somebody looks through the dead letters."""
        return self._fit("lock", queue)

    def level(self, position: int) -> str:
        """Return the exchange that sends on what has `position` digits of its delay left."""
        return f"{self.prefix}.delay.{position}"

    def delay(self, position: int, digit: int) -> str:
        """Return the queue in which a message waits for one digit of its delay."""
        return f"{self.prefix}.delay.{position}.{digit:x}"

    def consumer(self, consumer_id: str) -> str:
        """Return the queue that is there while a consumer is."""
        return f"{self.prefix}.consumer.{consumer_id.rpartition(':')[2]}"

    def replies(self, name: str) -> str:
        """Return the queue of results for one client."""
        return f"{self.prefix}.reply.{name}"

    def declare_ready(self, queue: str) -> Declaration:
        """Return how to make what holds the messages of a queue."""
        return self._durable(self.ready(queue), exchange=self.graves, key=self.dead(queue))

    def declare_suspects(self, queue: str) -> Declaration:
        """Return how to make what holds the suspects of a queue."""
        return self._durable(self.suspects(queue), exchange=self.graves, key=self.dead(queue))

    def declare_dead(self, queue: str) -> Declaration:
        """Return how to make what holds the dead letters of a queue."""
        return self._durable(self.dead(queue))

    def declare_delay(self, position: int, digit: int, milliseconds: int) -> Declaration:
        """Return how to make a queue in which messages wait, each for the same time."""
        onward = self.level(position - 1) if position else ""
        declaration = self._durable(self.delay(position, digit), exchange=onward)
        declaration.arguments["x-message-ttl"] = milliseconds
        return declaration

    def declare_stream(self, name: str, *, days: int | None = None) -> Declaration:
        """Return how to make a stream."""
        arguments: dict[str, Any] = {
            "x-queue-type": "stream",
            "x-stream-max-segment-size-bytes": 1_000_000,  # a segment goes as a whole
        }
        if days is not None:
            arguments["x-max-age"] = f"{days}D"
        return Queue.Declare(queue=name, durable=True, arguments=arguments)

    def _durable(
        self, name: str, *, exchange: str | None = None, key: str | None = None
    ) -> Declaration:
        arguments: dict[str, Any] = {}
        if exchange is not None:
            arguments["x-dead-letter-exchange"] = exchange
        if key is not None:
            arguments["x-dead-letter-routing-key"] = key
        if self.queue_type == "quorum":
            arguments["x-queue-type"] = "quorum"
            # RabbitMQ 4 drops what was handed out twenty times, unless told otherwise.
            arguments["x-delivery-limit"] = _NEVER
            # RabbitMQ 3.12 and later would take a message from whoever holds it for half an hour.
            arguments["x-consumer-timeout"] = _LONGEST_HELD
            if exchange is not None:
                # Without, what is sent on may be lost on its way.
                arguments["x-dead-letter-strategy"] = "at-least-once"
                arguments["x-overflow"] = "reject-publish"
        return Queue.Declare(queue=name, durable=True, arguments=arguments)

    def _fit(self, kind: str, queue: str) -> str:
        name = f"{self.prefix}.{kind}.{quote(queue, safe=_PLAIN).replace('%', '+')}"
        if len(name) > _LONGEST:
            raise ConfigError(
                f"the name of the queue {queue[:30]!r}... is too long for RabbitMQ, which takes"
                f" {_LONGEST} bytes with the prefix: choose a shorter one"
            )
        return name
