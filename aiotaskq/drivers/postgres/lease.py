"""The lease of a consumer, which any process can renew or end."""

from __future__ import annotations

from collections.abc import Callable

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.common.clock import is_stall
from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.drivers.postgres.maintenance import STEP_ROWS, extend_leases, take_back
from aiotaskq.drivers.postgres.notify import ALL, PostgresNotifier
from aiotaskq.drivers.postgres.sql import consumers as consumers_sql
from aiotaskq.drivers.postgres.storable import storable_text


class PostgresLease:
    """The lease of a consumer over a connection of its own; see `aiotaskq.contract.broker.Lease`.

    Args:
        pool: A pool for this lease alone.
        shift: Returns the offset of the clock in seconds, for tests.
        grant: The grant of the consumer.
    """

    def __init__(self, pool: PostgresPool, shift: Callable[[], float], grant: Grant) -> None:
        self._pool = pool
        self._notifier = PostgresNotifier(pool)
        self._shift = shift
        self._grant = grant

    async def renew(self) -> bool:
        await self._pool.open()
        arguments = self._shift(), self._grant.consumer, self._grant.seconds
        if await self._pool.fetch(consumers_sql.RENEW_UNLESS_SILENT, *arguments):
            return True

        async def renew(connection: Connection) -> bool:
            # Until this is committed nobody is fenced: this sign of life alone would say that the
            # other consumers had the time to give theirs.
            await connection.fetch(self._pool.names.render(consumers_sql.LOCK_SILENCE))
            rows = await connection.fetch(self._pool.names.render(consumers_sql.RENEW), *arguments)
            # Nobody gave a sign of life for that long, and this consumer lives: so it was the
            # server that stood still, and the others are about to give their signs.
            if rows and is_stall(rows[0]["silence"], self._grant.seconds):
                await extend_leases(connection, self._pool.names, self._shift())
            return bool(rows)

        return await self._pool.transact(renew, repeat=True)

    async def end(self, note: str) -> int:
        await self._pool.open()

        async def end(connection: Connection) -> tuple[int, dict[str, int]]:
            statement = self._pool.names.render(consumers_sql.FENCE_ONE)
            rows = await connection.fetch(statement, self._grant.consumer, storable_text(note))
            if not rows:
                return 0, {}
            return await take_back(connection, self._pool.names, rows[0]["number"], STEP_ROWS)

        count, back = await self._pool.transact(end, repeat=False)
        # All consumers, because not each of them may be given a suspect.
        await self._notifier.wake(dict.fromkeys(back, ALL))
        return count

    async def close(self) -> None:
        await self._pool.close()
