"""The connection of a caller, in whose open transaction messages are stored.

It has to lead to the database of the broker. Another one may have tables of the same names, and a
task that is stored in them would never run where it should.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import iscoroutinefunction
from typing import Any

import asyncpg

from aiotaskq.drivers.postgres.connection import PostgresPool
from aiotaskq.errors import ConfigError

CALLER_ERRORS = (asyncpg.TransactionRollbackError, asyncpg.InFailedSQLTransactionError)
"""Errors of the caller's own transaction: a conflict with another one, a deadlock, an earlier
statement that failed. They are not translated, because the caller may catch them to try again."""


# Identifies a table, also among the databases of other servers, until the server is restarted.
_IDENTITY = """
SELECT current_database() AS database, pg_postmaster_start_time() AS started, (
    SELECT oid FROM pg_database WHERE datname = current_database()
) AS database_oid, to_regclass($1)::oid AS table_oid
"""


class PostgresDatabaseCheck:
    """Compares the database of a caller's connection with the broker's own.

    Args:
        pool: The pool of the broker.
    """

    def __init__(self, pool: PostgresPool) -> None:
        self._pool = pool
        self._own: tuple[Any, ...] | None = None

    async def check(self, fetch_row: Callable[..., Awaitable[Any]]) -> None:
        """Check a connection.

        Args:
            fetch_row: Runs a statement on the connection and returns its row.

        Raises:
            ConfigError: It leads to another database or schema, or our tables are not there.
        """
        table = self._pool.names.table("messages")
        given = await fetch_row(_IDENTITY, table)
        if given["table_oid"] is None:
            raise ConfigError(
                f"connection= leads to the database {given['database']!r}, which has no table"
                f" {table}: give a connection to that of the broker, {self._pool.url.shown}"
            )
        if tuple(given) != self._own:
            [own] = await self._pool.query(_IDENTITY, table)  # the server may have been restarted
            self._own = tuple(own)
        if tuple(given) != self._own:
            raise ConfigError(
                f"connection= leads to other tables (database {given['database']!r}) than those of"
                f" the broker, {self._pool.url.shown}: no worker would find the task there"
            )


async def connection_in_transaction(given: Any) -> Any:
    """Return the asyncpg connection of a caller, with a transaction open on it.

    Args:
        given: A connection of asyncpg, alone or from its pool; or an `AsyncSession` or an
            `AsyncConnection` of SQLAlchemy with its asyncpg driver.

    Raises:
        ConfigError: It is another kind of object, or no transaction is open on it.
    """
    # A session of SQLAlchemy; other objects may have a `connection` that is not a coroutine.
    if hasattr(given, "get_bind") and iscoroutinefunction(getattr(given, "connection", None)):
        given = await given.connection()
    if not hasattr(given, "get_raw_connection"):
        return _checked(given)
    raw = await given.get_raw_connection()
    driven = raw.driver_connection
    if hasattr(driven, "is_in_transaction") and not driven.is_in_transaction():
        # SQLAlchemy begins its transaction on the server with the first statement.
        await given.exec_driver_sql("SELECT 1")
    return _checked(driven)


def _checked(connection: Any) -> Any:
    if not (hasattr(connection, "fetch") and hasattr(connection, "is_in_transaction")):
        kind = f"{type(connection).__module__}.{type(connection).__qualname__}"
        raise ConfigError(
            f"connection= is a {kind}; it takes a connection of asyncpg, or an AsyncSession or"
            " AsyncConnection of SQLAlchemy with its asyncpg driver"
        )
    if not connection.is_in_transaction():
        raise ConfigError(
            "no transaction is open on the given connection=, so there is no transaction to join;"
            " open one: async with connection.transaction(): ..."
        )
    return connection
