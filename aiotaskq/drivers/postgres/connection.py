"""Connections to a PostgreSQL server and the mapping of asyncpg's errors.

Theory of operation. A `PostgresPool` is closed, or open with an asyncpg pool that connects when a
connection is first needed. Each call borrows a connection, uses it, and returns it.

- Invariant: a connection in the pool runs no query and is in no transaction. A call that was
  cancelled or timed out terminates its connection, because waiting for the end of its query could
  take for ever; the server may still complete the query. An error that the server reported leaves
  the connection usable.
- A lost connection, or a lost answer, says nothing about the statement: it may have taken effect.
  The caller gets `Unavailable`. Connections that were idle when the server restarted fail in the
  same way at their next use, so a call marked ``repeat`` runs once more on a new connection. Only
  calls that may take effect twice without harm are marked so.
- Transactions have a time limit on the server: when this process is stopped in the middle of one,
  the server ends it and frees its locks.
- A firewall may drop connections without a word. When nothing was heard for `_QUIET` seconds, one
  connection is tested first, for a short time: a caller that gives up after some seconds still gets
  its answer over a new connection.
- Behind a pooler in transaction mode no session state is used: no SET, no LISTEN, no prepared
  statement. Listeners use `connect`, which can lead past the pooler.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import asyncpg

from aiotaskq.drivers.common.opening import OpenOnce
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.postgres.begin_session import begin_session
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.url import PostgresUrl
from aiotaskq.errors import AioTaskQError, ConfigError, Unavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.drivers.postgres")

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
_Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

STATEMENT_BYTES = 4 * 1024 * 1024
"""The most bytes of values in one statement: it is in memory as a whole, here and in the server."""

PING_EVERY = 15.0
"""Seconds without a notice until a connection that listens is checked."""

_PING_TIMEOUT = 5.0  # seconds
_QUIET = 5.0  # seconds without an answer after which a connection is tested before its next use
_TEST_TIMEOUT = 1.5  # seconds
_CONNECT_TIMEOUT = 5.0  # seconds, unless the URL has connect_timeout
_CLOSE_TIMEOUT = 2.0


# Errors of a call on a connection that ended while it was idle.
_STALE = (
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.InterfaceError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleSessionTimeoutError,
    ConnectionError,
)
UNSTORABLE_ERRORS = (
    asyncpg.DataError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.StatementTooComplexError,
)
"""Errors of asyncpg for a value that PostgreSQL cannot store: `UnstorableValue`."""

_PGBOUNCER = "behind PgBouncer, add statement_cache_size=0 to the URL"
# Errors that stay until somebody changes something, each with advice. The order matters: some are
# subclasses of others.
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (asyncpg.DuplicatePreparedStatementError, _PGBOUNCER),
    (asyncpg.InvalidSQLStatementNameError, _PGBOUNCER),
    (asyncpg.InvalidAuthorizationSpecificationError, "correct the user or password in the URL"),
    (asyncpg.InvalidCatalogNameError, "create the database (createdb), or correct the URL"),
    (asyncpg.InvalidSchemaNameError, "create the schema, or correct search_path in the URL"),
    (asyncpg.InsufficientPrivilegeError, "grant it to the user, or use another user in the URL"),
    (asyncpg.UndefinedTableError, "run `aiotaskq migrate tasks:app`"),
    (asyncpg.SyntaxOrAccessError, "correct the URL, or the table"),
    (asyncpg.CantChangeRuntimeParamError, "correct the URL"),
    (asyncpg.InvalidParameterValueError, "correct the URL"),
    (asyncpg.ClientConfigurationError, "correct the URL"),
)
# Classes of SQLSTATE whose errors may be over with the next attempt: connections, states of a
# transaction, constraints, conflicts, resources, locks, an operator, the system, a fault of the
# server's own.
_PASSING = ("08", "23", "25", "2D", "40", "53", "55", "57", "58", "XX")


# asyncpg prepares statements, and PostgreSQL keeps their plans. A plan made while a table is nearly
# empty must not read the whole table when it has grown, so the planner may use nothing but indexes.
# Behind PgBouncer, where no setting of a session is possible, each statement is planned anew. The
# isolation level is set because the statements are written for READ COMMITTED.
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


class PostgresPool:
    """A pool of connections for one event loop, and the statements that run on them.

    Args:
        url: The server.
        names: The names that statements are rendered with.
        unavailable: The error to raise when the server cannot be reached.
        full: The error to raise when its disk is full; None: `unavailable`.
        pool_size: The largest number of connections.
        timeout: The time limit of a call in seconds; None: no limit.
        by_index: Let the planner use indexes only.
        own_isolation: Use the isolation level READ COMMITTED, for which the driver's statements are
            written, and not the default of the database.
    """

    def __init__(
        self,
        url: PostgresUrl,
        names: PostgresNames,
        unavailable: type[Unavailable],
        *,
        full: type[Unavailable] | None = None,
        pool_size: int,
        timeout: float | None,
        by_index: bool = False,
        own_isolation: bool = True,
    ) -> None:
        self.url = url
        self.names = names
        self._unavailable = unavailable
        self._full = full or unavailable
        self._by_index = by_index and not url.is_pooled
        self._own_isolation = own_isolation
        self._heard_at = float("-inf")  # when the server last answered, by the event loop's clock
        self._pool_size = pool_size
        self._timeout = timeout
        self._connections = OpenOnce[_Pool](lambda: unavailable(f"{url.shown} is not open"))

    async def open(self, prepare: Callable[[Connection], Awaitable[None]] | None = None) -> None:
        """Make the pool, and prepare the database first. Does nothing if it is open.

        Args:
            prepare: Prepares the database over a connection of its own.

        Raises:
            ConfigError: The server refuses the connection for good.
            Unavailable: The server cannot be reached now.
        """

        async def make() -> _Pool:
            await self.url.files.check(self.url.shown)
            if prepare is not None:
                await self.once(prepare)
            return await self._make_pool()

        await self._connections.open(make)

    async def once(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` on a connection of its own; the pool need not be open.

        Raises:
            ConfigError: The server refuses it for good.
            Unavailable: The server cannot be reached now.
        """
        connection = await self.connect()
        try:
            with self.errors():
                async with asyncio.timeout(self._timeout):
                    return await work(connection)
        finally:
            await self.disconnect(connection)

    async def close(self) -> None:
        """Close every connection. Never raises."""
        connections = self._connections.release()
        if connections is not None:
            await _close(connections)

    async def fetch(
        self, template: str, *arguments: Any, repeat: bool = True
    ) -> list[asyncpg.Record]:
        """Run a statement and return its rows.

        Cancelling the call terminates its connection; the server may still complete the statement.

        Args:
            template: The statement, for `PostgresNames.render`.
            *arguments: The parameters of the statement.
            repeat: Whether to run the statement again if the connection was stale.

        Raises:
            ConfigError: The server refuses the statement for good.
            UnstorableValue: PostgreSQL cannot store one of the values.
            Unavailable: The server cannot be reached now; the statement may have taken effect.
        """
        return await self.query(self.names.render(template), *arguments, repeat=repeat)

    async def query(
        self, statement: str, *arguments: Any, repeat: bool = True
    ) -> list[asyncpg.Record]:
        """Run a statement that is rendered already; otherwise like `fetch`."""

        async def work(connection: Connection) -> list[asyncpg.Record]:
            return await connection.fetch(statement, *arguments)

        return await self._run(work, repeat)

    async def transact(self, work: Callable[[Connection], Awaitable[T]], *, repeat: bool) -> T:
        """Run `work` in a transaction at the isolation level READ COMMITTED.

        Args:
            work: Runs statements on the connection that it is given.
            repeat: Whether to run the transaction again if the connection was stale.

        Raises:
            ConfigError: The server refuses it for good.
            UnstorableValue: PostgreSQL cannot store one of the values.
            Unavailable: The server cannot be reached now; the transaction may be committed.
        """
        # If this process is stopped in the middle, the server ends the transaction: other
        # processes wait for its locks.
        milliseconds = round((self._timeout or 0.0) * 1000)  # 0 means "never" in PostgreSQL too
        begin = (
            "BEGIN ISOLATION LEVEL READ COMMITTED;"
            f" SET LOCAL idle_in_transaction_session_timeout = {milliseconds}"
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
            if asyncio.get_running_loop().time() > self._heard_at + _QUIET:
                await self._test()
            try:
                return await self._attempt(work)
            except (*_STALE, asyncpg.ReadOnlySQLTransactionError) as error:
                # Most likely the server was restarted, or a standby was promoted, while the
                # connections were idle. New connections may work.
                connections = self._connections.resource
                if connections is not None:
                    await connections.expire_connections()
                if not repeat:
                    raise
                logger.debug("trying again on a new connection: %s", error)
                return await self._attempt(work)

    async def _attempt(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._acquired() as connection:
            try:
                made = await work(connection)
            except asyncpg.PostgresError:
                raise  # reported by the server; the connection is still usable
            except BaseException:
                # Waiting for the end of a cancelled query could take for ever.
                _terminate(connection)
                raise
            self._heard_at = asyncio.get_running_loop().time()
            return made

    async def _test(self) -> None:
        """Give up connections that do not answer any more."""
        connections = self._connections.get()
        if not connections.get_idle_size():
            return
        try:
            async with asyncio.timeout(_TEST_TIMEOUT):
                await self._attempt(lambda connection: connection.execute("SELECT 1"))
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            logger.debug("connecting again after a quiet time: %r", error)
            await connections.expire_connections()

    @asynccontextmanager
    async def _acquired(self) -> AsyncIterator[Connection]:
        connections = self._connections.get()
        async with asyncio.timeout(self._timeout):
            connection = await connections.acquire()
            try:
                # A proxy, which only the pool can tell from a connection.
                yield connection  # type: ignore[misc]  # see above
            finally:
                await connections.release(connection)

    async def acquire(self) -> Connection:
        """Wait for a free connection and return it. It has to be released.

        Raises:
            ConfigError: The server refuses the connection for good.
            Unavailable: The server cannot be reached now, or the pool is closed.
        """
        with self.errors():
            # A proxy, which only the pool can tell from a connection.
            return await self._connections.get().acquire()  # type: ignore[return-value]  # see above

    async def release(self, connection: Connection, *, usable: bool) -> None:
        """Return a connection to the pool, after terminating it if it is not usable.

        Never raises.
        """
        if not usable:
            _terminate(connection)
        connections = self._connections.resource
        if connections is not None:
            await connections.release(connection)  # type: ignore[arg-type]  # from `acquire`

    async def connect(self, *, listens: bool = False) -> Connection:
        """Return a new connection outside the pool, to be closed by `disconnect`.

        Args:
            listens: Whether it is for LISTEN, and has to lead to the server itself.

        Raises:
            ConfigError: The server refuses the connection for good.
            Unavailable: The server cannot be reached now.
        """
        arguments = self._arguments
        if listens and self.url.listen is not None:
            arguments |= self.url.listen.arguments
        with self.errors():
            connection: Connection = await asyncpg.connect(**arguments)
        await begin_session(connection, isolate=False)
        return connection

    async def listen(
        self, callbacks: Mapping[str, Callable[..., None]], *, ended: Callable[[object], None]
    ) -> Connection:
        """Return a new connection that receives notices, to be closed by `disconnect`.

        Args:
            callbacks: The functions that receive the notices, by channel.
            ended: Called when the connection ends.

        Raises:
            ConfigError: The server refuses the connection for good.
            Unavailable: The server cannot be reached now.
        """
        connection = await self.connect(listens=True)
        try:
            with self.errors():
                connection.add_termination_listener(ended)
                for channel, callback in callbacks.items():
                    await connection.add_listener(channel, callback)
        except BaseException:
            await self.disconnect(connection)
            raise
        return connection

    async def ping(self, connection: Connection) -> None:
        """Check a connection outside the pool: one that a firewall has dropped looks usable.

        Raises:
            ConfigError: The server refuses the statement for good.
            Unavailable: The server does not answer.
        """
        with self.errors():
            async with asyncio.timeout(_PING_TIMEOUT):
                await connection.execute("SELECT 1")

    async def disconnect(self, connection: Connection) -> None:
        """Close a connection in any state. Never raises."""
        await _close(connection)

    async def _make_pool(self) -> _Pool:
        async def nothing(_: object) -> None:
            """Replace the query that undoes SET and LISTEN, which are not used here."""

        with self.errors():
            return await asyncpg.create_pool(
                min_size=0,
                max_size=self._pool_size,
                reset=nothing,
                init=self._begin_session,
                **self._arguments,
            )

    async def _begin_session(self, connection: Connection) -> None:
        # With `_SETTINGS` the level is set already.
        await begin_session(connection, isolate=self._own_isolation and not self._by_index)

    @property
    def _arguments(self) -> dict[str, Any]:
        arguments = {
            "timeout": _CONNECT_TIMEOUT,
            "command_timeout": self._timeout,
            **self.url.arguments,
        }
        if self._by_index:
            arguments["server_settings"] = _SETTINGS
        return arguments

    @contextmanager
    def errors(self, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Translate errors of asyncpg into errors of aiotaskq.

        Args:
            but: Errors that are not translated.
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
            return ConfigError(f"PostgreSQL at {self.url.shown} says: {text}; {_PGBOUNCER}")
        if isinstance(error, asyncpg.DiskFullError):
            return self._full(f"the disk of PostgreSQL at {self.url.shown} is full: {text}")
        if is_notify_full(error):
            return self._full(f"PostgreSQL at {self.url.shown} has no room for notices: {text}")
        for kind, advice in _ADVICE:
            if isinstance(error, kind):
                return ConfigError(f"PostgreSQL at {self.url.shown} says: {text}; {advice}")
        if isinstance(error, UNSTORABLE_ERRORS):
            return UnstorableValue(text)
        if isinstance(error, ValueError) and not isinstance(error, asyncpg.InterfaceError):
            return ConfigError(f"PostgreSQL at {self.url.shown}: {text}; correct the URL")
        if isinstance(error, asyncpg.PostgresError) and not _may_pass(error):
            return ConfigError(f"PostgreSQL at {self.url.shown} says: {text}; correct the set-up")
        return self._unavailable(f"PostgreSQL at {self.url.shown} cannot be reached: {text}")


def is_notify_full(error: Exception) -> bool:
    """Return whether the server's queue of notices is full: room is made when a session reads it.

    PostgreSQL gives this error the same code as to a value that is too large.
    """
    return isinstance(error, asyncpg.ProgramLimitExceededError) and "NOTIFY" in str(error)


def _may_pass(error: asyncpg.PostgresError) -> bool:
    state: str | None = getattr(error, "sqlstate", None)
    return state is None or state.startswith(_PASSING)


async def _close(connections: Connection | _Pool) -> None:
    """Close a connection or a pool in any state. Never raises."""
    try:
        # `Connection.close` has a timeout of its own, but some releases of asyncpg wait for the end
        # of a cancelled query in spite of it.
        async with asyncio.timeout(_CLOSE_TIMEOUT):
            await connections.close()
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        logger.debug("terminated connections that did not close: %s", error)
        connections.terminate()


def _terminate(connection: Connection) -> None:
    """End a connection at once. Does nothing if the pool has taken it back already."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()
