"""Names of exchanges and queues at RabbitMQ, and the arguments that they are declared with."""

from __future__ import annotations

import hashlib
import re
from typing import Any, TypeAlias
from urllib.parse import quote

from pamqp.commands import Queue

from aiotaskq.errors import ConfigError

_LONGEST = 255  # bytes: AMQP's short string
_LONGEST_PREFIX = 80  # bytes
_LONGEST_KIND = "suspects"
_LEVEL = "+p"  # before a priority; a name that is quoted has two hexadecimal digits behind a +
_PLAIN = "-_.:@#,/ "  # beside letters and digits; pamqp takes these and + in a name
_LONGEST_HELD = 4_000_000_000  # milliseconds: 46 days; timers of Erlang end soon after that
_CLIENT = re.compile(r"[0-9a-f]{32}")
_NEVER = 1_000_000  # deliveries after which the server itself takes a message out of its queue

Declaration = Queue.Declare

Lane: TypeAlias = tuple[str, int]
"""A task queue and a priority: what one queue of the server holds."""

Source: TypeAlias = tuple[str, int | None]
"""The same, or None in place of the priority: the queue of suspects of a task queue."""


class RabbitNames:
    """Names that begin with a prefix, followed by a word for the kind of object.

    Args:
        prefix: The beginning of each name.
        queue_type: ``quorum`` or ``classic``: the type of every queue that holds messages.

    Names of task queues are quoted, and refused with a `ConfigError` if they are too long.

    Attributes:
        ledger: The stream of membership records.
        queue_list: The stream of queue names.
        dead_exchange: The exchange that leads to the queues of dead letters.
        making_lock: The queue that exists while somebody makes the first queues of a lane.
    """

    def __init__(self, prefix: str, queue_type: str) -> None:
        if len(prefix) > _LONGEST_PREFIX:
            raise ConfigError(
                f"the prefix {prefix[:30]!r}... has {len(prefix)} bytes; with RabbitMQ it may have"
                f" {_LONGEST_PREFIX}"
            )
        self.prefix = prefix
        self.queue_type = queue_type
        self.ledger = f"{prefix}.ledger"
        self.queue_list = f"{prefix}.queues"
        self.dead_exchange = f"{prefix}.dead"
        self.making_lock = f"{prefix}.lock"
        # The same for all kinds: a name that is too long for one of them is refused before any of
        # its queues exists. That of a priority is as long as that of the suspects.
        self._longest = _LONGEST - len(f"{prefix}.{_LONGEST_KIND}.")

    def ready(self, queue: str, priority: int = 0) -> str:
        """Return the queue that holds the messages of a task queue with a priority."""
        name = self._name("queue", queue)
        return f"{name}{_LEVEL}{priority}" if priority else name

    def suspects(self, queue: str) -> str:
        """Return the queue that holds those messages that are handed out alone."""
        return self._name("suspects", queue)

    def dead(self, queue: str) -> str:
        """Return the queue that holds the dead letters of a task queue."""
        return self._name("dead", queue)

    def mark(self, queue: str, priority: int = 0) -> str:
        """Return the exchange that exists while a lane is listed and its queues are made."""
        # pamqp takes no more than 127 bytes for an exchange.
        name = f"{queue}\0{priority}" if priority else queue
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return f"{self.prefix}.listed.{digest}"

    def can_name(self, queue: str) -> bool:
        """Return whether a task queue of this name can exist here."""
        try:
            self._name(_LONGEST_KIND, queue)
        except ConfigError:
            return False
        return bool(queue) and "," not in queue

    def lock(self, queue: str) -> str:
        """Return the queue that exists while somebody reads the dead letters."""
        return self._name("lock", queue)

    def delay_exchange(self, position: int) -> str:
        """Return the exchange for messages that have `position` digits of their delay left."""
        return f"{self.prefix}.delay.{position}"

    def delay_queue(self, position: int, digit: int) -> str:
        """Return the queue in which a message waits for one digit of its delay."""
        return f"{self.prefix}.delay.{position}.{digit:x}"

    def consumer(self, consumer_id: str) -> str:
        """Return the queue that exists while a consumer is connected."""
        return f"{self.prefix}.consumer.{consumer_id.rpartition(':')[2]}"

    def replies(self, name: str) -> str:
        """Return the queue of results for one client."""
        return f"{self.prefix}.reply.{name}"

    def is_replies(self, queue: str) -> bool:
        """Return whether this is the name of a queue of results."""
        start = self.replies("")
        return queue.startswith(start) and _CLIENT.fullmatch(queue, len(start)) is not None

    def declare_ready(self, queue: str, priority: int = 0) -> Declaration:
        """Return the declaration of `ready`."""
        return self._durable(
            self.ready(queue, priority), exchange=self.dead_exchange, key=self.dead(queue)
        )

    def declare_suspects(self, queue: str) -> Declaration:
        """Return the declaration of `suspects`."""
        return self._durable(
            self.suspects(queue), exchange=self.dead_exchange, key=self.dead(queue)
        )

    def declare_dead(self, queue: str) -> Declaration:
        """Return the declaration of `dead`."""
        return self._durable(self.dead(queue))

    def declare_delay(self, position: int, digit: int, milliseconds: int) -> Declaration:
        """Return the declaration of a `delay_queue`: every message waits there equally long."""
        onward = self.delay_exchange(position - 1) if position else ""
        declaration = self._durable(self.delay_queue(position, digit), exchange=onward)
        declaration.arguments["x-message-ttl"] = milliseconds
        return declaration

    def declare_stream(self, name: str, *, days: int | None = None) -> Declaration:
        """Return the declaration of a stream; it keeps records that many days, None: for ever."""
        arguments: dict[str, Any] = {
            "x-queue-type": "stream",
            "x-stream-max-segment-size-bytes": 1_000_000,  # old records go by whole segments
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
            # By default RabbitMQ 4 drops a message that was delivered twenty times.
            arguments["x-delivery-limit"] = _NEVER
            # By default RabbitMQ takes a message from a consumer that holds it for half an hour.
            arguments["x-consumer-timeout"] = _LONGEST_HELD
            if exchange is not None:
                # Without these, a message that the server moves on may be lost on its way.
                arguments["x-dead-letter-strategy"] = "at-least-once"
                arguments["x-overflow"] = "reject-publish"
        return Queue.Declare(queue=name, durable=True, arguments=arguments)

    def _name(self, kind: str, queue: str) -> str:
        try:
            quoted = quote(queue, safe=_PLAIN).replace("%", "+")
        except UnicodeEncodeError:
            raise ConfigError(
                f"the name of the queue {queue[:30]!r} has characters that are no text"
            ) from None
        if len(quoted) > self._longest:
            raise ConfigError(
                f"the name of the queue {queue[:30]!r}... is too long for RabbitMQ: written in"
                f" ASCII it has {len(quoted)} bytes, and may have {self._longest} behind the prefix"
                f" {self.prefix!r}. Choose a shorter one"
            )
        return f"{self.prefix}.{kind}.{quoted}"
