"""The sign of life of a consumer at the PostgreSQL broker, which any process can give, or end."""

from __future__ import annotations

from collections.abc import Callable

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.housekeeping import spare, take_back
from aiotaskq.drivers.postgres.link import Connection, Link
from aiotaskq.drivers.postgres.messages import BUDGET
from aiotaskq.drivers.postgres.repair import cleaned
from aiotaskq.drivers.postgres.waking import ALL, Bell


class PostgresLease:
    """See `aiotaskq.contract.broker.Lease`. It has a connection of its own.

    Args:
        link: For it alone.
        shift: Returns the seconds that the clock is ahead, for tests.
        grant: Whose.
    """

    def __init__(self, link: Link, shift: Callable[[], float], grant: Grant) -> None:
        self._link = link
        self._bell = Bell(link)
        self._shift = shift
        self._grant = grant

    async def renew(self) -> bool:
        await self._link.open()
        arguments = self._shift(), self._grant.consumer, self._grant.seconds
        if await self._link.fetch(sql.RENEW_IN_COMPANY, *arguments):
            return True

        async def renew(connection: Connection) -> bool:
            # Nobody judges before this is committed: the sign of life alone would say that the
            # others had time to give theirs.
            await connection.fetch(self._link.names.render(sql.SILENCE))
            rows = await connection.fetch(self._link.names.render(sql.RENEW), *arguments)
            # Nobody gave a sign of life for so long, and here is one who lives: it was the server
            # that stood still. The others are about to say that they live, too.
            if rows and rows[0]["silence"] > self._grant.seconds / 2:
                await spare(connection, self._link.names, self._shift())
            return bool(rows)

        return await self._link.transact(renew, repeat=True)

    async def end(self, note: str) -> int:
        await self._link.open()

        async def end(connection: Connection) -> tuple[int, dict[str, int]]:
            statement = self._link.names.render(sql.FENCE_ONE)
            rows = await connection.fetch(statement, self._grant.consumer, cleaned(note))
            if not rows:
                return 0, {}
            return await take_back(connection, self._link.names, rows[0]["number"], BUDGET)

        count, back = await self._link.transact(end, repeat=False)
        await self._bell.wake(dict.fromkeys(back, ALL))
        return count

    async def close(self) -> None:
        await self._link.close()
