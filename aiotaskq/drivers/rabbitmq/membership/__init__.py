"""Facts that all processes at one RabbitMQ server share, and that the server does not report.

The rest of the driver uses `RabbitMembership`, and the `ConsumerMember` that it makes for a
consumer. The membership knows the consumers that live and the messages that they hold, the messages
that are cancelled, the losses of connections that were no crashes, and the queues.

The decision behind it. AMQP lists neither queues nor consumers, cannot find a message in a queue,
and counts every lost connection alike. There were two ways:

- Promise less. A driver without these facts has a fifth less code. It has no `Broker.consumers`, no
  held messages in `Broker.depth`, no `Broker.cancel` and no `Consumer.news`, and it takes a long
  task for a killer of workers after three restarts of the server.
- Keep the facts in two streams at the server, which every process reads from the beginning.

The second was chosen. The contract promises these things for every broker, applications rely on
cancelling, and operators on lists of workers and on counts. The price is paid in one place, this
package.

Theory of operation
-------------------
- `ledger.py` is the shared state: records in a stream (`stream.py`, `records.py`), and the state
  that follows from those that were read.
- `survey.py` asks the consumers that live. Their answers are not shared state: they are true at the
  moment of the answer.
- `member.py` is one consumer's part in this, and `losses.py` its report of a lost connection.

There is no leader, no election, and no timeout after which a consumer counts as dead: the server
deletes the queue of a consumer with its connection, and nothing else decides it.

Between any two steps a process may die, lose its connection, or be cancelled, and others may write
records. Three invariants hold:

1. A process that writes a record and reads to the end of the ledger knows all records before its
   own. So of a cancellation and a consumer that joins, at least one side knows of the other.
2. A call of `cancel` returns when every consumer that lives has read the record, or did not answer
   in time. With ``running=False`` it first marks the ids and then restores those that are held. If
   it fails or is cancelled in between, this process goes on restoring in the background: otherwise
   the retry of a held message would be dropped, and its caller would wait for ever. If this process
   dies in between, that can happen.
3. A queue is on the list before it is declared (`topology.py`). An exchange marks that it is there:
   a sender need not read the list. `forget_queue` removes the mark first and looks at it again at
   the end, so a queue that somebody lists meanwhile stays listed. Each priority of a queue that is
   in use is on the list as well, with a mark of its own. It stays there: a delayed message may
   arrive at any time, and consumers look only where the list leads them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

from pamqp.commands import Exchange

from aiotaskq.contract.records import ConsumerInfo
from aiotaskq.drivers.rabbitmq.channel import AmqpRefused
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.membership.ledger import Ledger
from aiotaskq.drivers.rabbitmq.membership.member import ConsumerMember, HeldMessages
from aiotaskq.drivers.rabbitmq.membership.records import (
    ConsumerQuestion,
    MessagesCancelled,
    MessagesRestored,
    new_record_name,
)
from aiotaskq.drivers.rabbitmq.membership.stream import RabbitStream
from aiotaskq.drivers.rabbitmq.membership.survey import ConsumerSurvey
from aiotaskq.errors import Unavailable
from aiotaskq.readable import get_logger

__all__ = ["ConsumerMember", "RabbitMembership"]

logger = get_logger("aiotaskq.rabbitmq")

_FORGOTTEN = b"\0"  # before a name on the list: the queue is taken off
# Before a priority and a name: it is in use. Versions without priorities take off a name that is
# not on the list, and so do nothing.
_LEVEL = b"\0\0"
_RESTORE_PAUSE = 0.5  # seconds between attempts to restore messages in the background


class RabbitMembership:
    """Consumers, cancellations and queues, as far as all processes agree on them.

    Every process may ask. A consumer also joins, with a `member` of its own.

    Args:
        connection: The connection to write and ask on; it is used and not closed.

    Attributes:
        cancelled: The ids of messages that must not be handed out. A consumer that has joined has
            all of them; they arrive without another call.
        harmless_losses: Returns how often a message was lost with a connection though the process
            lived.
        on_level: Called with the name of a queue when another priority of it is in use.
        on_made_again: Called with the name of a queue when it, or a priority of it, was put on the
            list though it was there: somebody has found it deleted, and has made it again.
    """

    def __init__(self, connection: RabbitConnection) -> None:
        self._connection = connection
        self._ledger = Ledger(connection)
        self.cancelled = self._ledger.cancelled
        self.harmless_losses = self._ledger.harmless.count
        self._survey = ConsumerSurvey(connection, self._ledger)
        self._queues: dict[str, None] = {}
        self._levels: dict[str, list[int]] = {}  # priorities above 0, the highest first
        self.on_level: Callable[[str], None] = lambda _: None
        self.on_made_again: Callable[[str], None] = lambda _: None
        self._odd_queue_logged = False
        self._queue_list = RabbitStream(
            connection,
            connection.names.declare_stream(connection.names.queue_list),
            self._read_queue,
            b"",
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    # --- questions ------------------------------------------------------------------------------

    async def consumers(self) -> Sequence[ConsumerInfo]:
        """Return the consumers that live.

        Raises:
            Unavailable: The server cannot be reached.
        """
        answers = await self._survey.ask(ConsumerQuestion())
        return [info for info, _ in answers.values()]

    async def held(self) -> Mapping[str, int]:
        """Return the number of messages that consumers hold, by queue.

        Raises:
            Unavailable: The server cannot be reached.
        """
        held: dict[str, int] = {}
        for _, answer in (await self._survey.ask(ConsumerQuestion())).values():
            for queue, count in answer.counts.items() if answer else ():
                held[queue] = held.get(queue, 0) + count
        return held

    async def is_present(self, consumer_id: str) -> bool:
        """Return whether the connection of a consumer stands.

        Raises:
            Unavailable: The server cannot be reached.
        """
        return await self._survey.is_present(consumer_id)

    async def queues(self) -> Collection[str]:
        """Return the names of all queues that were used and not forgotten.

        Raises:
            Unavailable: The server cannot be reached.
        """
        await self._queue_list.catch_up()
        return self._queues

    def levels(self, queue: str) -> Sequence[int]:
        """Return the priorities above 0 of a queue that are in use, the highest first.

        They are known as far as the list was read: by `queues`, or by a member that has joined.
        """
        return self._levels.get(queue, ())

    # --- statements -----------------------------------------------------------------------------

    async def add_queue(self, queue: str, priority: int = 0) -> None:
        """Put a queue on the list of queues, or a priority of it that is used.

        Once is enough, twice does no harm.

        Raises:
            Unavailable: The server cannot be reached.
        """
        await self._queue_list.declare()
        level = b"%b%d" % (_LEVEL, priority) if priority else b""
        await self._queue_list.write(level + queue.encode())

    async def mark_queue(self, queue: str, priority: int = 0) -> None:
        """Mark a queue, or a priority of it, as listed and made: it is not put on the list again.

        Raises:
            Unavailable: The server cannot be reached.
        """
        mark = self._connection.names.mark(queue, priority)
        await self._connection.declare(
            Exchange.Declare(exchange=mark, exchange_type="direct", durable=True)
        )

    async def forget_queue(self, queue: str) -> None:
        """Take a queue off the list of queues; its next use puts it there again.

        Raises:
            Unavailable: The server cannot be reached.
        """
        mark = self._connection.names.mark(queue)
        await self._connection.declare(Exchange.Delete(exchange=mark))
        await self._queue_list.write(_FORGOTTEN + queue.encode())
        try:
            await self._connection.call(Exchange.Declare(exchange=mark, passive=True))
        except AmqpRefused:
            self._queues.pop(queue, None)
        else:
            await self.add_queue(queue)  # somebody has begun to use it

    def _read_queue(self, body: bytes) -> None:
        """Apply a record of the list of queues. Others may have written it: it may be anything."""
        if body.startswith(_LEVEL):
            self._read_level(body[len(_LEVEL) :])
            return
        try:
            queue = body.removeprefix(_FORGOTTEN).decode()
        except UnicodeDecodeError:
            queue = ""
        if body.startswith(_FORGOTTEN):
            self._queues.pop(queue, None)
        elif queue in self._queues:
            self.on_made_again(queue)
        elif self._connection.names.can_name(queue):
            self._queues[queue] = None
        elif body and not self._odd_queue_logged:
            self._odd_queue_logged = True
            logger.warning(
                "The list of queues has a name that no queue can have; it is skipped",
                extra={"event": "rabbitmq_odd_queue", "queue": ascii(body[:100])},
            )

    def _read_level(self, record: bytes) -> None:
        try:
            level, queue = int(record[:1]), record[1:].decode()
        except ValueError:
            return  # not ours
        known = self._levels.get(queue, [])
        if level in known:
            self.on_made_again(queue)
        elif level and self._connection.names.can_name(queue):
            self._levels[queue] = sorted([*known, level], reverse=True)
            self.on_level(queue)

    async def cancel(self, ids: Collection[str], *, running: bool) -> Collection[str]:
        """Cancel messages, as `Broker.cancel` does.

        Raises:
            Unavailable: The server cannot be reached; it may have been done.
        """
        await self._ledger.stream.declare()
        name, wanted = new_record_name(), tuple(ids)
        if running:
            await self._ledger.write(MessagesCancelled(name, wanted, running))
            # Done when every consumer has read it.
            await self._survey.ask(ConsumerQuestion(name, wanted))
            return ()
        # A message that was cancelled before stays so, though somebody may still hold it.
        await self._ledger.stream.catch_up()
        wanted = tuple(one for one in dict.fromkeys(wanted) if one not in self._ledger.cancelled)
        if not wanted:
            return ()
        question = ConsumerQuestion(name, wanted)
        try:
            await self._ledger.write(MessagesCancelled(name, wanted, running))
            return await self._restore_held(question)
        except (Unavailable, asyncio.CancelledError):
            # The record may be written. See invariant 2 above.
            if not self._closed:
                self._start(self._restore_held_later(question))
            raise

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        """Return those of these ids that are cancelled.

        Raises:
            Unavailable: The server cannot be reached.
        """
        await self._ledger.stream.catch_up()
        return {one for one in ids if one in self._ledger.cancelled}

    async def restore(self, ids: Collection[str]) -> None:
        """Undo the cancellation of those of these messages that are cancelled.

        Raises:
            Unavailable: The server cannot be reached; it may have been done.
        """
        await self._ledger.stream.catch_up()
        cancelled = {one for one in ids if one in self._ledger.cancelled}
        if cancelled:
            await self._restore(cancelled)

    async def _restore(self, ids: Collection[str]) -> None:
        name = new_record_name()
        await self._ledger.write(MessagesRestored(name, tuple(ids)))
        await self._survey.ask(ConsumerQuestion(name))

    async def _restore_held(self, question: ConsumerQuestion) -> set[str]:
        """Restore those of the cancelled messages that are held; return their ids."""
        answers = await self._survey.ask(question)
        held = {one for _, answer in answers.values() if answer for one in answer.held}
        if held:
            await self._restore(held)
        return held

    async def _restore_held_later(self, question: ConsumerQuestion) -> None:
        while True:
            await asyncio.sleep(_RESTORE_PAUSE)
            with contextlib.suppress(Unavailable):  # the caller of `cancel` got that error already
                await self._restore_held(question)
                return

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- consumers and the end ------------------------------------------------------------------

    def member(self, consumer: ConsumerInfo, held: HeldMessages) -> ConsumerMember:
        """Return a consumer's part in this; it has yet to join.

        Args:
            consumer: The consumer, as others see it.
            held: Its messages.
        """
        return ConsumerMember(self._connection, self._ledger, self._queue_list, consumer, held)

    async def close(self) -> None:
        """End all background work. Never raises."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
