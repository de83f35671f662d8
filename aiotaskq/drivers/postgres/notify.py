"""Notices that wake waiting consumers, sent and received over LISTEN and NOTIFY.

Theory of operation. A consumer that finds no message marks its row as waiting, looks once more, and
then waits for a notice. A process that has stored messages looks after the commit which consumers
are marked, clears the marks of as many as there are messages, and sends each of them a notice.

- Invariant: of a consumer that begins to wait and a process that stores a message, at least one
  sees the other. Either the second look of the consumer finds the message, or the process finds the
  mark.
- A notice says nothing but "look". It may come too late, for a message that another consumer has
  taken; or never, when a connection is lost, or the process that stored the message dies before it
  sends the notice. So a waiting consumer also looks at long intervals by itself.
- While all consumers are busy, none is marked, and no notices are sent. That matters: PostgreSQL
  lets one commit with a notice through at a time, in the whole server.
- Messages stored in a caller's transaction become visible at a commit that this driver does not
  see. There the notice is a part of the transaction and goes to all (`messages.notify_on_commit`).

One connection, outside the pool, receives the notices to all consumers of a broker object. When it
is lost, every waiting consumer is woken, and the next one that waits connects again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiotaskq.drivers.postgres.connection import PING_EVERY, Connection, PostgresPool
from aiotaskq.drivers.postgres.sql import consumers as consumers_sql
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.errors import AioTaskQError
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.drivers.postgres")

_TEST_TIMEOUT = 3.0  # seconds until a notice to this process itself must have arrived
_MOST_WOKEN = 1000  # consumers, by one statement

ALL = 1_000_000
"""Stands for enough messages to wake every waiting consumer."""


class PostgresListener:
    """The notices to one consumer.

    Attributes:
        event: Set when there is a reason to look for messages.
        notified: Whether a notice came for this consumer alone. Its row is then no longer marked
            as waiting.
    """

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.notified = False


class PostgresNotifier:
    """Sends notices, and receives those for all consumers of a broker object.

    Args:
        pool: The pool of the broker.
    """

    def __init__(self, pool: PostgresPool) -> None:
        self._pool = pool
        self._lock = asyncio.Lock()
        self._connection: Connection | None = None
        self._listeners: dict[str, PostgresListener] = {}
        self._received_at = 0.0
        self._tested = asyncio.Event()  # set when a notice to this process has arrived
        self._testing: asyncio.Task[None] | None = None
        self._told_deaf = False  # whether it was logged that there is no connection

    @property
    def listens(self) -> bool:
        """Return whether there is a connection that receives notices."""
        return self._connection is not None

    async def listen(self, number: int, listener: PostgresListener) -> bool:
        """Tell a listener of every notice to a consumer, and to all, from now on.

        Returns:
            Whether notices arrive. If not, there is no connection for them, though there are others
            (a role may have few): its consumers look at short intervals by themselves.
        """
        channel = self._pool.names.channel(number)
        async with self._lock:
            if self._connection is not None:
                await self._check(self._connection)
            try:
                if self._connection is None:
                    self._connection = await self._connect()
                if channel not in self._listeners:
                    with self._pool.errors():
                        await self._connection.add_listener(channel, self._receive)
                    self._listeners[channel] = listener
            except AioTaskQError as error:
                await self._disconnect()
                if not self._told_deaf:
                    self._told_deaf = True
                    logger.warning(
                        "no notices can be received, so consumers look twice a second: %s", error
                    )
                return False
            self._told_deaf = False
            return True

    def forget(self, number: int) -> None:
        """Tell the listener of a consumer nothing more."""
        self._listeners.pop(self._pool.names.channel(number), None)

    async def wake(self, work: Mapping[str, int]) -> None:
        """Notify waiting consumers, at most one for each message. Never raises.

        Args:
            work: The number of messages for each queue.
        """
        if not work:
            return
        count = min(sum(work.values()), _MOST_WOKEN)
        try:
            await self._pool.fetch(
                consumers_sql.NOTIFY_WAITING, list(work), count, self._pool.names.channel("")
            )
        except AioTaskQError as error:  # the messages are stored; consumers look by themselves
            logger.debug("no consumer was notified: %s", error)

    async def close(self) -> None:
        """Close the connection. Never raises."""
        async with self._lock:
            await self._disconnect()

    async def _connect(self) -> Connection:
        connection = await self._pool.listen(
            {
                self._pool.names.channel("wake"): self._receive_all,
                self._own_channel: self._pass_test,
            },
            ended=self._end,
        )
        self._received_at = asyncio.get_running_loop().time()
        if not self._tested.is_set() and self._testing is None:
            self._testing = asyncio.create_task(self._test())
        return connection

    @property
    def _own_channel(self) -> str:
        return self._pool.names.channel(f"{id(self):x}")

    async def _test(self) -> None:
        """Warn if notices do not arrive, as behind a pooler in transaction mode."""
        try:
            await self._pool.fetch(messages_sql.NOTIFY, self._own_channel)
            async with asyncio.timeout(_TEST_TIMEOUT):
                await self._tested.wait()
        except AioTaskQError as error:
            logger.debug("could not test whether notices arrive: %s", error)
        except TimeoutError:
            logger.warning(
                "No notices arrive from %s, so tasks start late: behind PgBouncer, add"
                " listen=host:port of PostgreSQL itself to the URL",
                self._pool.url.shown,
                extra={"event": "postgres_no_notices", "url": self._pool.url.shown},
            )

    async def _check(self, connection: Connection) -> None:
        """Close a connection that is dead."""
        now = asyncio.get_running_loop().time()
        if connection.is_closed():
            await self._disconnect()
        elif now > self._received_at + PING_EVERY:
            self._received_at = now
            try:
                await self._pool.ping(connection)
            except AioTaskQError as error:
                logger.debug("listening on a new connection: %s", error)
                await self._disconnect()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        testing, self._testing = self._testing, None
        if testing is not None:
            testing.cancel()
            await asyncio.gather(testing, return_exceptions=True)
        self._wake_listeners()
        self._listeners.clear()
        if connection is not None:
            await self._pool.disconnect(connection)

    def _wake_listeners(self) -> None:
        for listener in self._listeners.values():
            listener.event.set()

    def _receive(self, _connection: object, _pid: int, channel: str, _payload: object) -> None:
        self._received_at = asyncio.get_running_loop().time()
        if channel in self._listeners:
            self._listeners[channel].notified = True
            self._listeners[channel].event.set()

    def _receive_all(self, *_: object) -> None:
        self._received_at = asyncio.get_running_loop().time()
        self._wake_listeners()

    def _pass_test(self, *_: object) -> None:
        self._tested.set()

    def _end(self, _connection: object) -> None:
        self._wake_listeners()
