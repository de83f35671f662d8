"""How consumers that wait are woken.

Who is about to wait notes it in its row, looks once more, and sleeps. Who has stored something
looks, once that is committed, whether anybody waits, and sends a notice to as many as there is work
for. In this order one of both sees the other. A notice says nothing but "look": it may be in vain,
or be lost with a connection, and a slow look by oneself makes up for that. While everybody is busy
there are no notices at all: a commit with one holds up every other in the whole server.

Where messages are stored in a transaction of somebody else's, whose commit nobody sees, the notice
is part of it and goes to all (`messages.announce`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import asyncpg

from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.link import Connection, Link
from aiotaskq.errors import BrokerUnavailable

logger = logging.getLogger("aiotaskq.drivers.postgres")

_PING_EVERY = 15.0  # seconds of silence until the connection is checked
_PING_TIMEOUT = 5.0
_PROOF_TIMEOUT = 3.0  # seconds until a notice to oneself must have come
_MOST = 1000  # consumers woken by one statement

ALL = 1_000_000
"""Work enough for everybody who waits."""


class Ear:
    """What a consumer that waits hears.

    Attributes:
        event: Set where there is reason to look.
        called: Whether a notice was for it alone, and so nobody takes it to wait any more.
    """

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.called = False


class Bell:
    """Hears notices for all consumers of a broker object, over one connection; and sends them.

    Args:
        link: Of the broker.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = asyncio.Lock()
        self._connection: Connection | None = None
        self._ears: dict[str, Ear] = {}
        self._heard_at = 0.0
        self._proof = asyncio.Event()
        self._proving: asyncio.Task[None] | None = None

    async def listen(self, number: int, ear: Ear) -> None:
        """See to it that the ear hears every notice to this consumer from now on.

        Raises:
            BrokerUnavailable: The server cannot be reached now.
            ConfigError: It refuses the connection for good.
        """
        channel = self._link.names.channel(number)
        async with self._lock:
            if self._connection is not None:
                await self._check(self._connection)
            if self._connection is None:
                self._connection = await self._connect()
            if channel not in self._ears:
                with self._link.errors():
                    await self._connection.add_listener(channel, self._hear)
                self._ears[channel] = ear

    def forget(self, number: int) -> None:
        """Tell a consumer nothing more."""
        self._ears.pop(self._link.names.channel(number), None)

    async def wake(self, work: Mapping[str, int]) -> None:
        """Wake those who wait, as many as there is work in their queues. Never raises.

        Args:
            work: How many messages there are for each queue.
        """
        if not work:
            return
        count = min(sum(work.values()), _MOST)
        try:
            await self._link.fetch(sql.WAKE, list(work), count, self._link.names.channel(""))
        except BrokerUnavailable as error:  # what was stored is stored; others look by themselves
            logger.debug("nobody was woken: %s", error)

    async def close(self) -> None:
        """Let go of the connection. Never raises."""
        async with self._lock:
            await self._let_go()

    async def _connect(self) -> Connection:
        connection = await self._link.connect(listens=True)
        try:
            with self._link.errors():
                connection.add_termination_listener(self._end)
                await connection.add_listener(self._link.names.channel("wake"), self._hear_all)
                await connection.add_listener(self._own_channel, self._prove)
        except BaseException:
            await self._link.drop(connection)
            raise
        self._heard_at = asyncio.get_running_loop().time()
        if not self._proof.is_set() and self._proving is None:
            self._proving = asyncio.create_task(self._test())
        return connection

    @property
    def _own_channel(self) -> str:
        return self._link.names.channel(f"{id(self):x}")

    async def _test(self) -> None:
        """Say so where notices do not come: behind a pooler in transaction mode there are none."""
        try:
            await self._link.fetch(sql.ANNOUNCE, self._own_channel)
            async with asyncio.timeout(_PROOF_TIMEOUT):
                await self._proof.wait()
        except BrokerUnavailable as error:
            logger.debug("could not test whether notices come: %s", error)
        except TimeoutError:
            logger.warning(
                "No notices come from %s, so that tasks start late: behind PgBouncer, add"
                " listen=host:port of PostgreSQL itself to the URL",
                self._link.target.url,
                extra={"event": "postgres_no_notices", "url": self._link.target.url},
            )

    async def _check(self, connection: Connection) -> None:
        """Let go of a silent connection that is dead: a firewall may have forgotten it."""
        now = asyncio.get_running_loop().time()
        if connection.is_closed():
            await self._let_go()
        elif now > self._heard_at + _PING_EVERY:
            self._heard_at = now
            try:
                async with asyncio.timeout(_PING_TIMEOUT):
                    await connection.execute("SELECT 1")
            except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                logger.debug("listening on a new connection: %s", error)
                await self._let_go()

    async def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        proving, self._proving = self._proving, None
        if proving is not None:
            proving.cancel()
            await asyncio.gather(proving, return_exceptions=True)
        self._ring()
        self._ears.clear()
        if connection is not None:
            await self._link.drop(connection)

    def _ring(self) -> None:
        for ear in self._ears.values():
            ear.event.set()

    def _hear(self, _connection: object, _pid: int, channel: str, _payload: object) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if channel in self._ears:
            self._ears[channel].called = True
            self._ears[channel].event.set()

    def _hear_all(self, *_: object) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        self._ring()

    def _prove(self, *_: object) -> None:
        self._proof.set()

    def _end(self, _connection: object) -> None:
        self._ring()
