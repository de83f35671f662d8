"""What any worker does for all: promote, take back, trim, sweep; and who is given up at all.

A lease that ran out says that its consumer is dead, or that the server stood still, or was away, so
that nobody could renew. What tells the latter is that nobody at all gave a sign of life for long.
Then everybody gets another lease, but once only until anybody gives a sign of life, or there is
another silence before that.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from aiotaskq.contract.records import DeadLimits, Maintained
from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.link import Connection, Link
from aiotaskq.drivers.postgres.messages import BUDGET
from aiotaskq.drivers.postgres.names import Names

_SWEEP_EVERY = 10.0  # seconds
_SWEPT = 10_000  # rows, small ones


class Housekeeper:
    """One round at a time, each a bounded amount of work.

    Args:
        link: Of the broker.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._counted: tuple[int | None, int] = (None, -1)  # the newest letter then, and `most`
        self._sweep_at = 0.0

    async def maintain(
        self, limits: DeadLimits, shift: float, now: float
    ) -> tuple[Maintained, dict[str, int], set[str]]:
        """Do what `Broker.maintain` says.

        Args:
            limits: Of dead letters.
            shift: Seconds that the clock is ahead, for tests.
            now: By the monotonic clock, shifted as well.

        Returns:
            What was done; how many messages of which queues have fallen due; and the queues of
            what was taken back.
        """
        [seen] = await self._link.fetch(sql.OUTLOOK, shift, limits.age)
        promoted: dict[str, int] = {}
        if seen["is_due"]:
            promoted = await promote(self._link, shift)
        reclaimed, back = await self._reclaim(seen["lapsed"], shift)
        if seen["is_spared"]:
            await self._link.fetch(sql.NOTE_LOOK)
        trimmed = await self._trim(seen, limits, shift)
        if now >= self._sweep_at:
            full = [await self._sweep(statement, shift) for statement in sql.SWEEPS]
            self._sweep_at = now if any(full) else now + _SWEEP_EVERY
        tended = Maintained(promoted=sum(promoted.values()), reclaimed=reclaimed, trimmed=trimmed)
        return tended, promoted, back

    async def _sweep(self, statement: str, shift: float) -> bool:
        [row] = await self._link.fetch(statement, shift, _SWEPT)
        return bool(row["count"] == _SWEPT)

    # --- the dead -------------------------------------------------------------------------------

    async def _reclaim(self, lapsed: Sequence[int], shift: float) -> tuple[int, set[str]]:
        if not lapsed:
            return 0, set()
        fenced = await self._link.transact(
            lambda connection: _judge(connection, self._link.names, lapsed, shift), repeat=True
        )
        count, queues = 0, set[str]()
        for number in fenced:
            if count >= BUDGET:
                break  # the next round goes on with it

            async def take(
                connection: Connection, number: int = number, left: int = BUDGET - count
            ) -> tuple[int, dict[str, int]]:
                return await take_back(connection, self._link.names, number, left)

            taken, back = await self._link.transact(take, repeat=False)
            count += taken
            queues |= back.keys()
        return count, queues

    # --- dead letters ---------------------------------------------------------------------------

    async def _trim(self, seen: asyncpg.Record, limits: DeadLimits, shift: float) -> int:
        # Counting takes a look at every letter, so it is done only where there is a new one since
        # the count that found nothing to drop.
        newest, dropped = seen["newest_dead"], 0
        if seen["any_outdated"]:
            [row] = await self._link.fetch(sql.TRIM_OLD, shift, limits.age, BUDGET)
            dropped = row["count"]
        if newest is None or self._counted == (newest, limits.most):
            return dropped
        excess = await self._link.fetch(sql.COUNT_DEAD, limits.most)
        for queue in excess:
            most = min(queue["count"] - limits.most, BUDGET - dropped)
            [row] = await self._link.fetch(sql.TRIM_QUEUE, queue["queue"], most)
            dropped += row["count"]
        if not excess:
            self._counted = newest, limits.most
        return dropped


async def promote(link: Link, shift: float) -> dict[str, int]:
    """Put what has fallen due at the end of its line; return how much of which queue."""

    async def work(connection: Connection) -> dict[str, int]:
        await connection.fetch(link.names.render(sql.TAKE_TURNS))
        rows = await connection.fetch(link.names.render(sql.PROMOTE), shift, BUDGET)
        return {row["queue"]: row["count"] for row in rows}

    return await link.transact(work, repeat=True)


async def take_back(
    connection: Connection, names: Names, number: int, limit: int
) -> tuple[int, dict[str, int]]:
    """Take back what a fenced consumer held, counting the crash; in a transaction.

    If that was all, the consumer is forgotten.

    Returns:
        How many were taken back; and how many of which queue can be fetched again.
    """
    rows = await connection.fetch(names.render(sql.TAKE_BACK), number, limit)
    count = sum(row["count"] for row in rows)
    if count < limit:
        await connection.fetch(names.render(sql.REMOVE_FENCED), number)
    return count, {row["queue"]: row["count"] for row in rows if row["queue"] is not None}


async def _judge(
    connection: Connection, names: Names, lapsed: Sequence[int], shift: float
) -> list[int]:
    """Fence those whose leases ran out, unless all are spared; return the fenced ones."""
    # Locks a row, so that only one judges at a time.
    [silence] = await connection.fetch(names.render(sql.SILENCE))
    [lease] = await connection.fetch(names.render(sql.LEASES_OF), lapsed)
    if lease[0] is not None:
        if silence["seconds"] > lease[0] / 2:
            await spare(connection, names, shift)
        else:
            await connection.fetch(names.render(sql.FENCE), shift, lapsed)
    rows = await connection.fetch(names.render(sql.FENCED_AMONG), lapsed)
    return [row["number"] for row in rows]


async def spare(connection: Connection, names: Names, shift: float) -> None:
    """Give every consumer another lease, in a transaction that holds the lock of `sql.SILENCE`."""
    await connection.fetch(names.render(sql.SPARE), shift)
    await connection.fetch(names.render(sql.NOTE_SPARED))
