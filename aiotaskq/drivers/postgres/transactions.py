"""Transactions in which a task writes, and which end with its outcome.

Theory of operation. A transaction has a connection of the pool for itself. The task writes through
that connection; then `commit` stores the task's outcome on it, and commits. The outcome has the
task's id as its key, so of two runs of one task, even at the same time, one can store it: the other
waits for the row, finds it taken, and is rolled back.

- Invariant: rows of the task are committed if and only if its outcome is.
- The transaction is open, or over. It is over once its connection is released, which happens once,
  whatever ends it: a commit, a rollback, an error, or a cancelled call.
- Before the commit, a crash or a lost connection makes the server undo everything. If it happens
  during the commit, the transaction may be committed or not, and the worker gets
  `BackendUnavailable`. If it is committed, the outcome is there, and later ones are refused.
- A connection in an unknown state is terminated and not returned to the pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeAlias

import asyncpg

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.drivers.postgres")

StoreOutcome: TypeAlias = Callable[[Connection, Outcome, "float | None"], Awaitable[bool]]
"""Stores an outcome on a connection, for some seconds; returns False if the id has an outcome."""


class PostgresTransaction:
    """A transaction of a task; see `aiotaskq.contract.results.Transaction`.

    Args:
        pool: The pool that the connection belongs to.
        connection: A connection of it, in no transaction yet.
        store: Stores the outcome.
        timeout: The time limit in seconds of its beginning and of its end. What the task does in
            between has no limit here.
    """

    def __init__(
        self, pool: PostgresPool, connection: Connection, store: StoreOutcome, *, timeout: float
    ) -> None:
        self.connection: Any = connection
        self._pool = pool
        self._store = store
        self._timeout = timeout
        self._transaction = connection.transaction()
        self._over = False

    @classmethod
    async def begin(cls, pool: PostgresPool, store: StoreOutcome, *, timeout: float) -> Self:
        """Wait for a free connection, and begin a transaction on it.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        transaction = cls(pool, await pool.acquire(), store, timeout=timeout)
        try:
            with pool.errors():
                async with asyncio.timeout(timeout):
                    await transaction._transaction.start()
        except BaseException:
            await transaction._release(usable=False)
            raise
        return transaction

    async def commit(self, outcome: Outcome, ttl: float | None) -> bool:
        try:
            stored = await self._store_and_commit(outcome, ttl)
        except asyncpg.InFailedSQLTransactionError as error:
            raise UnstorableValue(
                "a statement of the task failed, and PostgreSQL has aborted the whole transaction;"
                " to go on after an error, put the statement into"
                " `async with connection.transaction()`"
            ) from error
        if stored:
            await self._release(usable=True)
        else:
            await self.roll_back()
        return stored

    async def _store_and_commit(self, outcome: Outcome, ttl: float | None) -> bool:
        try:
            async with asyncio.timeout(self._timeout):
                stored = await self._store(self.connection, outcome, ttl)
                if stored:
                    await self._transaction.commit()
        except (
            asyncpg.InFailedSQLTransactionError,
            asyncpg.IntegrityConstraintViolationError,  # a deferred constraint on the task's rows
            asyncpg.TransactionRollbackError,  # a conflict of the task's statements with others
        ):
            raise  # the task's own errors; the worker rolls back
        except Exception as error:
            await self._release(usable=False)  # its state is unknown
            with self._pool.errors():
                raise error
        return stored

    async def roll_back(self) -> None:
        if self._over:
            return
        try:
            async with asyncio.timeout(self._timeout):
                await self._transaction.rollback()
        except Exception as error:  # the server rolls back when the connection ends
            logger.debug("terminated a connection that did not roll back: %s", error)
            await self._release(usable=False)
        except BaseException:
            await self._release(usable=False)
            raise
        else:
            await self._release(usable=True)

    async def _release(self, *, usable: bool) -> None:
        if not self._over:
            self._over = True
            await self._pool.release(self.connection, usable=usable)
