"""Transactions in which a task writes, and in which its outcome is stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeAlias

import asyncpg

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.postgres.link import Connection, Link, Rejected

logger = logging.getLogger("aiotaskq.drivers.postgres")

Store: TypeAlias = Callable[[Connection, Outcome, "float | None"], Awaitable[bool]]


class PostgresTransaction:
    """A transaction on a connection of its own; see `aiotaskq.contract.results.Transaction`.

    Args:
        link: Where the connection came from.
        connection: In no transaction yet.
        store: What stores an outcome on a connection; False if the id has one.
        timeout: Seconds until its beginning and its end are given up; what the task does in it
            takes the time that it takes.
    """

    def __init__(self, link: Link, connection: Connection, store: Store, *, timeout: float) -> None:
        self.connection: Any = connection
        self._link = link
        self._store = store
        self._timeout = timeout
        self._around = connection.transaction()
        self._over = False

    @classmethod
    async def begin(cls, link: Link, store: Store, *, timeout: float) -> Self:
        """Wait for a free connection, and begin.

        Raises:
            BackendUnavailable: The server cannot be reached now.
        """
        transaction = cls(link, await link.take(), store, timeout=timeout)
        try:
            with link.errors():
                async with asyncio.timeout(timeout):
                    await transaction._around.start()
        except BaseException:
            await transaction._give_back(sound=False)
            raise
        return transaction

    async def commit(self, outcome: Outcome, ttl: float | None) -> bool:
        try:
            stored = await self._store_and_commit(outcome, ttl)
        except asyncpg.InFailedSQLTransactionError as error:
            raise Rejected(
                "a statement of the task failed, and with it PostgreSQL has aborted the whole"
                " transaction; to go on after an error, put the statement into"
                " `async with connection.transaction()`"
            ) from error
        if stored:
            await self._give_back(sound=True)
        else:
            await self.roll_back()
        return stored

    async def _store_and_commit(self, outcome: Outcome, ttl: float | None) -> bool:
        try:
            async with asyncio.timeout(self._timeout):
                stored = await self._store(self.connection, outcome, ttl)
                if stored:
                    await self._around.commit()
        except (
            asyncpg.InFailedSQLTransactionError,
            asyncpg.IntegrityConstraintViolationError,  # a deferred one, of the task's own rows
            asyncpg.TransactionRollbackError,  # a conflict with others, of the task's making
        ):
            raise
        except Exception as error:
            await self._give_back(sound=False)  # who knows what state it is in
            with self._link.errors():
                raise error
        return stored

    async def roll_back(self) -> None:
        if self._over:
            return
        try:
            async with asyncio.timeout(self._timeout):
                await self._around.rollback()
        except Exception as error:  # the server undoes it in any case, when the connection ends
            logger.debug("rolled back the hard way: %s", error)
            await self._give_back(sound=False)
        except BaseException:
            await self._give_back(sound=False)
            raise
        else:
            await self._give_back(sound=True)

    async def _give_back(self, *, sound: bool) -> None:
        if not self._over:
            self._over = True
            await self._link.give_back(self.connection, sound=sound)
