"""The connections to a PostgreSQL server, and what its client library's errors mean here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import asyncpg

from aiotaskq.drivers.postgres.target import Target
from aiotaskq.errors import AioTaskQError, ConfigError, EncodeError, Unavailable

logger = logging.getLogger("aiotaskq.drivers.postgres")

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
_Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

CONNECT_TIMEOUT = 5.0  # seconds, unless the URL says connect_timeout
_CLOSE_TIMEOUT = 2.0


class Rejected(EncodeError):
    """The server cannot keep a value that it was sent; the reason is the message."""


# What a call on a connection says that ended while it lay idle.
_STALE = (
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.InterfaceError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleSessionTimeoutError,
    ConnectionError,
)
_REJECTED = (
    asyncpg.DataError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.StatementTooComplexError,
)
# In this order, since some are kinds of others.
_MENDS: tuple[tuple[type[Exception], str], ...] = (
    (
        asyncpg.DuplicatePreparedStatementError,
        "behind PgBouncer, add statement_cache_size=0 to the URL",
    ),
    (
        asyncpg.InvalidSQLStatementNameError,
        "behind PgBouncer, add statement_cache_size=0 to the URL",
    ),
    (asyncpg.InvalidAuthorizationSpecificationError, "mend the user or the password in the URL"),
    (asyncpg.InvalidCatalogNameError, "create the database (createdb), or mend the URL"),
    (asyncpg.InsufficientPrivilegeError, "grant it to the user, or name another one in the URL"),
    (asyncpg.SyntaxOrAccessError, "mend the URL, or the table"),
    (asyncpg.CantChangeRuntimeParamError, "mend the URL"),
    (asyncpg.InvalidParameterValueError, "mend the URL"),
    (asyncpg.ClientConfigurationError, "mend the URL"),
)


class Link:
    """A pool of connections on one event loop.

    Args:
        target: Where the server is.
        unavailable: What to raise when it cannot be reached.
        pool_size: The most connections at once.
        timeout: Seconds until a call is given up.
    """

    def __init__(
        self, target: Target, unavailable: type[Unavailable], *, pool_size: int, timeout: float
    ) -> None:
        self.target = target
        self._unavailable = unavailable
        self._pool_size = pool_size
        self._timeout = timeout
        self._pool: _Pool | None = None
        self._opening = asyncio.Lock()

    async def open(self, prepare: Callable[[Connection], Awaitable[None]]) -> None:
        """Connect, and prepare what is in the database; does nothing if it is open.

        Raises:
            ConfigError: The server refuses what the URL says.
            Unavailable: It cannot be reached now.
        """
        async with self._opening:
            if self._pool is not None:
                return
            connection = await self.connect()
            try:
                with self.errors():
                    async with asyncio.timeout(self._timeout):
                        await prepare(connection)
            finally:
                await self.drop(connection)
            self._pool = await self._make_pool()

    async def close(self) -> None:
        """End every connection. Never raises."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            logger.debug("closed the hard way: %s", error)
            pool.terminate()

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run a statement that may safely run twice, and return its rows.

        Cancelling it closes its connection.

        Raises:
            ConfigError: The server refuses it for good.
            Rejected: The server cannot keep one of the values.
            Unavailable: It cannot be reached now; the statement may have taken effect.
        """
        with self.errors():
            try:
                return await self._fetch(statement, arguments)
            except _STALE as error:
                # Most likely the server was restarted while the connections lay idle. It may be
                # back already, so there is nothing to tell the caller yet.
                logger.debug("trying again on a new connection: %s", error)
                if self._pool is not None:
                    await self._pool.expire_connections()
                return await self._fetch(statement, arguments)

    async def _fetch(self, statement: str, arguments: tuple[Any, ...]) -> list[asyncpg.Record]:
        pool = self._pool
        if pool is None:
            raise self._unavailable(f"{self.target.url} is not open")
        async with asyncio.timeout(self._timeout):
            connection = await pool.acquire()
            try:
                return await connection.fetch(statement, *arguments)
            except asyncpg.PostgresError:
                raise  # the server's answer; the connection is in order
            except BaseException:
                # To await the end of a query that was given up could take for ever.
                connection.terminate()
                raise
            finally:
                await pool.release(connection)

    async def connect(self) -> Connection:
        """Return a connection of its own, to be given to `drop`.

        Raises:
            ConfigError: The server refuses what the URL says.
            Unavailable: It cannot be reached now.
        """
        with self.errors():
            return await asyncpg.connect(**self._arguments)

    async def drop(self, connection: Connection) -> None:
        """Close a connection, whatever state it is in. Never raises."""
        try:
            # Not by the method's own timeout: some releases of asyncpg wait without end all the
            # same for the answer to a query that was given up.
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await connection.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            logger.debug("closed the hard way: %s", error)
            connection.terminate()

    async def _make_pool(self) -> _Pool:
        async def nothing(_: object) -> None:
            """Stands for the query that undoes SET and LISTEN: none of them is used here."""

        with self.errors():
            return await asyncpg.create_pool(
                min_size=0, max_size=self._pool_size, reset=nothing, **self._arguments
            )

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "timeout": CONNECT_TIMEOUT,
            "command_timeout": self._timeout,
            **self.target.arguments,
        }

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the errors of the client library into those of aiotaskq."""
        try:
            yield
        except (
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
            OSError,
            TimeoutError,
            ValueError,
        ) as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> AioTaskQError:
        text = str(error) or type(error).__name__
        for kind, mend in _MENDS:
            if isinstance(error, kind):
                return ConfigError(f"PostgreSQL at {self.target.url} says: {text}; {mend}")
        if isinstance(error, _REJECTED):
            return Rejected(text)
        if isinstance(error, ValueError) and not isinstance(error, asyncpg.InterfaceError):
            return ConfigError(f"PostgreSQL at {self.target.url}: {text}; mend the URL")
        return self._unavailable(f"PostgreSQL at {self.target.url} cannot be reached: {text}")
