"""The connection of a caller, in whose open transaction messages are stored."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import Any

import asyncpg

from aiotaskq.errors import ConfigError

CALLER_ERRORS = (asyncpg.TransactionRollbackError, asyncpg.InFailedSQLTransactionError)
"""Errors of the caller's own transaction: a conflict with another one, a deadlock, an earlier
statement that failed. They are not translated, because the caller may catch them to try again."""


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
