"""The connections to a PostgreSQL server, and what its client library's errors mean here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import asyncpg

from aiotaskq.drivers.postgres.names import Names
from aiotaskq.drivers.postgres.target import Target
from aiotaskq.errors import AioTaskQError, ConfigError, EncodeError, Unavailable

logger = logging.getLogger("aiotaskq.drivers.postgres")

T = TypeVar("T")
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
REJECTED = (
    asyncpg.DataError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.StatementTooComplexError,
)
"""What the client library raises where the server cannot keep a value: `Rejected`."""

_PGBOUNCER = "behind PgBouncer, add statement_cache_size=0 to the URL"
# In this order, since some are kinds of others.
_MENDS: tuple[tuple[type[Exception], str], ...] = (
    (asyncpg.DuplicatePreparedStatementError, _PGBOUNCER),
    (asyncpg.InvalidSQLStatementNameError, _PGBOUNCER),
    (asyncpg.InvalidAuthorizationSpecificationError, "mend the user or the password in the URL"),
    (asyncpg.InvalidCatalogNameError, "create the database (createdb), or mend the URL"),
    (asyncpg.InsufficientPrivilegeError, "grant it to the user, or name another one in the URL"),
    (asyncpg.UndefinedTableError, "run `aiotaskq migrate tasks:app`"),
    (asyncpg.SyntaxOrAccessError, "mend the URL, or the table"),
    (asyncpg.CantChangeRuntimeParamError, "mend the URL"),
    (asyncpg.InvalidParameterValueError, "mend the URL"),
    (asyncpg.ClientConfigurationError, "mend the URL"),
)


# For statements whose plans are kept: one that was made while a table was nearly empty must not
# read all of it when it has grown. Behind PgBouncer, where no setting of a session is possible,
# each statement is planned anew. And no statement is made for a stricter level than the usual one.
_SETTINGS = {"default_transaction_isolation": "read committed"} | dict.fromkeys(
    (
        "enable_seqscan",
        "enable_bitmapscan",
        "enable_sort",
        "enable_hashjoin",
        "enable_mergejoin",
        "jit",
    ),
    "off",
)


class Link:
    """A pool of connections on one event loop, and the statements of one prefix on them.

    Args:
        target: Where the server is.
        names: What `fetch` and others put into statements.
        unavailable: What to raise when it cannot be reached.
        full: What to raise instead when its disk is full.
        pool_size: The most connections at once.
        timeout: Seconds until a call is given up; None: never.
        by_index: Have the planner go by indexes alone.
    """

    def __init__(
        self,
        target: Target,
        names: Names,
        unavailable: type[Unavailable],
        *,
        full: type[Unavailable] | None = None,
        pool_size: int,
        timeout: float | None,
        by_index: bool = False,
    ) -> None:
        self.target = target
        self.names = names
        self._unavailable = unavailable
        self._full = full or unavailable
        self._by_index = by_index and not target.is_pooled
        self._pool_size = pool_size
        self._timeout = timeout
        self._pool: _Pool | None = None
        self._opening = asyncio.Lock()

    async def open(self, prepare: Callable[[Connection], Awaitable[None]] | None = None) -> None:
        """Connect, and prepare what is in the database; does nothing if it is open.

        Raises:
            ConfigError: The server refuses what the URL says.
            Unavailable: It cannot be reached now.
        """
        async with self._opening:
            if self._pool is None:
                if prepare is not None:
                    await self.once(prepare)
                self._pool = await self._make_pool()

    async def once(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do something on a connection that is closed afterwards; `open` is not needed.

        Raises:
            ConfigError: The server refuses it for good.
            Unavailable: It cannot be reached now.
        """
        connection = await self.connect()
        try:
            with self.errors():
                async with asyncio.timeout(self._timeout):
                    return await work(connection)
        finally:
            await self.drop(connection)

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

    async def fetch(
        self, template: str, *arguments: Any, repeat: bool = True
    ) -> list[asyncpg.Record]:
        """Run a statement and return its rows.

        Cancelling it closes its connection; the server may run the statement all the same.

        Args:
            template: As `Names.render` takes it.
            *arguments: Its parameters.
            repeat: It may safely run twice, and does where the connection was stale.

        Raises:
            ConfigError: The server refuses it for good.
            Rejected: The server cannot keep one of the values.
            Unavailable: It cannot be reached now; the statement may have taken effect.
        """
        return await self.query(self.names.render(template), *arguments, repeat=repeat)

    async def query(
        self, statement: str, *arguments: Any, repeat: bool = True
    ) -> list[asyncpg.Record]:
        """Do as `fetch` does with a statement that is rendered."""

        async def work(connection: Connection) -> list[asyncpg.Record]:
            return await connection.fetch(statement, *arguments)

        return await self._run(work, repeat)

    async def transact(self, work: Callable[[Connection], Awaitable[T]], *, repeat: bool) -> T:
        """Do something in a transaction, at the level READ COMMITTED.

        Raises:
            ConfigError: The server refuses it for good.
            Rejected: The server cannot keep one of the values.
            Unavailable: It cannot be reached now; the transaction may have been committed.
        """
        # The server is to end it for us where this process stands still in the middle: others
        # wait for the locks.
        longest = round((self._timeout or 0.0) * 1000)  # PostgreSQL takes 0 for "never" as well
        begin = (
            "BEGIN ISOLATION LEVEL READ COMMITTED;"
            f" SET LOCAL idle_in_transaction_session_timeout = {longest}"
        )

        async def transaction(connection: Connection) -> T:
            await connection.execute(begin)
            try:
                made = await work(connection)
            except asyncpg.PostgresError:
                await connection.execute("ROLLBACK")
                raise
            await connection.execute("COMMIT")
            return made

        return await self._run(transaction, repeat)

    async def _run(self, work: Callable[[Connection], Awaitable[T]], repeat: bool) -> T:
        with self.errors():
            try:
                return await self._attempt(work)
            except (*_STALE, asyncpg.ReadOnlySQLTransactionError) as error:
                # Most likely the server was restarted, or another one took over, while the
                # connections lay idle: new ones may be fine.
                if self._pool is not None:
                    await self._pool.expire_connections()
                if not repeat:
                    raise
                logger.debug("trying again on a new connection: %s", error)
                return await self._attempt(work)

    async def _attempt(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._acquired() as connection:
            try:
                return await work(connection)
            except asyncpg.PostgresError:
                raise  # the server's answer; the connection is in order
            except BaseException:
                # To await the end of a query that was given up could take for ever.
                _terminate(connection)
                raise

    @property
    def _opened(self) -> _Pool:
        if self._pool is None:
            raise self._unavailable(f"{self.target.url} is not open")
        return self._pool

    @asynccontextmanager
    async def _acquired(self) -> AsyncIterator[Connection]:
        pool = self._opened
        async with asyncio.timeout(self._timeout):
            connection = await pool.acquire()
            try:
                # To all but the pool it is a connection.
                yield connection  # type: ignore[misc]  # a proxy of one
            finally:
                await pool.release(connection)

    async def take(self) -> Connection:
        """Return a connection of the pool, to be given to `give_back`; wait until one is free.

        Raises:
            ConfigError: The server refuses what the URL says.
            Unavailable: It cannot be reached now, or this is closed.
        """
        with self.errors():
            # To all but the pool it is a connection.
            return await self._opened.acquire()  # type: ignore[return-value]  # a proxy of one

    async def give_back(self, connection: Connection, *, sound: bool) -> None:
        """Return a connection to the pool, or end it. Never raises."""
        if not sound:
            _terminate(connection)
        pool = self._pool
        if pool is not None:
            await pool.release(connection)  # type: ignore[arg-type]  # it is what `take` gave

    async def connect(self, *, listens: bool = False) -> Connection:
        """Return a connection of its own, to be given to `drop`.

        Args:
            listens: It is for LISTEN, and so has to lead to the server itself.

        Raises:
            ConfigError: The server refuses what the URL says.
            Unavailable: It cannot be reached now.
        """
        arguments = self._arguments
        if listens and self.target.listen is not None:
            arguments |= self.target.listen.arguments
        with self.errors():
            return await asyncpg.connect(**arguments)

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
        arguments = {
            "timeout": CONNECT_TIMEOUT,
            "command_timeout": self._timeout,
            **self.target.arguments,
        }
        if self._by_index:
            arguments["server_settings"] = _SETTINGS
        return arguments

    @contextmanager
    def errors(self, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Turn the errors of the client library into those of aiotaskq.

        Args:
            but: Those that stay what they are.
        """
        try:
            yield
        except but:
            raise
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
        if isinstance(error, asyncpg.ProtocolViolationError) and "startup parameter" in text:
            return ConfigError(f"PostgreSQL at {self.target.url} says: {text}; {_PGBOUNCER}")
        if isinstance(error, asyncpg.DiskFullError):
            return self._full(f"the disk of PostgreSQL at {self.target.url} is full: {text}")
        for kind, mend in _MENDS:
            if isinstance(error, kind):
                return ConfigError(f"PostgreSQL at {self.target.url} says: {text}; {mend}")
        if isinstance(error, REJECTED):
            return Rejected(text)
        if isinstance(error, ValueError) and not isinstance(error, asyncpg.InterfaceError):
            return ConfigError(f"PostgreSQL at {self.target.url}: {text}; mend the URL")
        return self._unavailable(f"PostgreSQL at {self.target.url} cannot be reached: {text}")


def _terminate(connection: Connection) -> None:
    """End a connection at once; one that has ended by itself is the pool's again."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()
