"""Connections of a caller's own, in whose transactions messages are stored."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import Any

import asyncpg

from aiotaskq.errors import ConfigError

_OPEN_ONE = (
    "no transaction is open on what connection= was given, so there is nothing to be a part of;"
    " open one: async with connection.transaction(): ..."
)

CALLERS_OWN = (asyncpg.TransactionRollbackError, asyncpg.InFailedSQLTransactionError)
"""What says something of the caller's transaction, who may wait for it to try again: a conflict
with others, a deadlock, an earlier statement that failed."""


async def enlist(given: Any) -> Any:
    """Return the asyncpg connection behind what a caller gave, with a transaction open on it.

    Args:
        given: A connection of asyncpg, or of a pool of it; or, from SQLAlchemy, an `AsyncSession`
            or an `AsyncConnection` on asyncpg.

    Raises:
        ConfigError: It is something else, or no transaction is open on it.
    """
    # A session of SQLAlchemy's; what has such a method that is none is one of the plain kind.
    if hasattr(given, "get_bind") and iscoroutinefunction(getattr(given, "connection", None)):
        given = await given.connection()
    if not hasattr(given, "get_raw_connection"):
        return _checked(given)
    raw = await given.get_raw_connection()
    driven = raw.driver_connection
    if hasattr(driven, "is_in_transaction") and not driven.is_in_transaction():
        # SQLAlchemy begins the transaction that it speaks of with the first statement.
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
        raise ConfigError(_OPEN_ONE)
    return connection
