"""Maintenance that any worker does for all: promote, fence, take back, trim, sweep.

Theory of operation. A round (`maintain`) first looks what there is to do, then does a bounded
amount of each task, each in a transaction of its own. After a crash, a cancelled call or a lost
connection between two of them, the rest is left to the next round of any worker. Any number of
workers may run rounds at once: each task skips the rows that another one has locked, or takes a
lock.

A consumer ends in two steps. First its lease is found to have lapsed, and it is fenced: from that
commit on it can neither fetch nor settle, and it stays fenced. Then its messages are taken back, in
any number of rounds, and its row is removed with the last of them.

A lapsed lease may also mean that the server was away, or stood still, so that no consumer could
renew. The sign of that is a silence: no consumer at all has given a sign of life for half a lease.

- Invariant: in a silence nobody is fenced for a lapsed lease. All leases are extended instead, by
  whichever comes first: a round, a consumer that renews its lease, or a new consumer.
- But only once in a silence. If nobody gives a sign of life until the extended leases have lapsed,
  they are all dead. Unless the server stood still once more: rounds record that it answers, and a
  silence of the rounds themselves counts as a new one.
- One transaction at a time decides, under the lock of the table ``<prefix>_silence``. A sign of
  life that ends a silence takes the lock as well, because that sign alone would say that the other
  consumers had the time to give theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from aiotaskq.contract.records import DeadLimits, Maintained
from aiotaskq.drivers.common.clock import SweepTimer, is_stall
from aiotaskq.drivers.common.dead_letter_counts import DeadLetterCount
from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.sql import consumers as consumers_sql
from aiotaskq.drivers.postgres.sql import dead_letters as dead_letters_sql
from aiotaskq.drivers.postgres.sql import messages as messages_sql

STEP_ROWS = 1000
"""The most messages in one step of work, so that no transaction takes long."""

_SWEEP_EVERY = 10.0  # seconds
_SWEEP_ROWS = 10_000  # of small records
_SWEEPS = (*consumers_sql.SWEEPS, messages_sql.TAKE_BACK_STRAYS, messages_sql.FREE_TIMELESS)


class PostgresMaintenance:
    """Rounds of maintenance by one broker object.

    Args:
        pool: The pool of the broker.
    """

    def __init__(self, pool: PostgresPool) -> None:
        self._pool = pool
        self._dead_count = DeadLetterCount()
        self._sweep_timer = SweepTimer(_SWEEP_EVERY)

    async def maintain(
        self, limits: DeadLimits, shift: float, now: float
    ) -> tuple[Maintained, dict[str, int], set[str]]:
        """Do one round; see `Broker.maintain`.

        Args:
            limits: The limits of dead letters.
            shift: The offset of the clock in seconds, for tests.
            now: The monotonic time, with the same offset.

        Returns:
            The counts of the round; the number of promoted messages for each queue; and the queues
            of the messages taken back.
        """
        [seen] = await self._pool.fetch(consumers_sql.OVERVIEW, shift, limits.age)
        if seen["is_silence_missing"]:
            await self._pool.fetch(consumers_sql.ADD_SILENCE)
        promoted: dict[str, int] = {}
        if seen["is_due"]:
            promoted = await promote(self._pool, shift)
        reclaimed, back = await self._reclaim(seen["lapsed"], shift)
        if seen["is_spared"]:
            await self._pool.fetch(consumers_sql.NOTE_CHECK)
        trimmed = await self._trim(seen, limits, shift)
        if self._sweep_timer.is_due(now):
            full = [await self._sweep(statement, shift) for statement in _SWEEPS]
            self._sweep_timer.note(now, more=any(full))
        counts = Maintained(promoted=sum(promoted.values()), reclaimed=reclaimed, trimmed=trimmed)
        return counts, promoted, back

    async def _sweep(self, statement: str, shift: float) -> bool:
        """Delete outdated records; return whether there may be more."""
        [row] = await self._pool.fetch(statement, shift, _SWEEP_ROWS)
        return bool(row["count"] == _SWEEP_ROWS)

    # --- dead consumers -------------------------------------------------------------------------

    async def _reclaim(self, lapsed: Sequence[int], shift: float) -> tuple[int, set[str]]:
        """Fence consumers whose leases have lapsed and take their messages back."""
        if not lapsed:
            return 0, set()
        fenced = await self._pool.transact(
            lambda connection: _fence(connection, self._pool.names, lapsed, shift), repeat=True
        )
        count, queues = 0, set[str]()
        for number in fenced:
            if count >= STEP_ROWS:
                break  # the next round goes on

            async def take(
                connection: Connection, number: int = number, left: int = STEP_ROWS - count
            ) -> tuple[int, dict[str, int]]:
                return await take_back(connection, self._pool.names, number, left)

            taken, back = await self._pool.transact(take, repeat=False)
            count += taken
            queues |= back.keys()
        return count, queues

    # --- dead letters ---------------------------------------------------------------------------

    async def _trim(self, seen: asyncpg.Record, limits: DeadLimits, shift: float) -> int:
        newest, deleted = seen["newest_dead"], 0
        if seen["any_outdated"]:
            [row] = await self._pool.fetch(dead_letters_sql.TRIM_OLD, shift, limits.age, STEP_ROWS)
            deleted = row["count"]
        if not self._dead_count.is_due(newest, limits.most):
            return deleted
        overfull = await self._pool.fetch(dead_letters_sql.OVERFULL, limits.most)
        for queue in overfull:
            excess = min(queue["count"] - limits.most, STEP_ROWS - deleted)
            [row] = await self._pool.fetch(dead_letters_sql.TRIM_QUEUE, queue["queue"], excess)
            deleted += row["count"]
        if not overfull:
            self._dead_count.note(newest, limits.most)
        return deleted


async def promote(pool: PostgresPool, shift: float) -> dict[str, int]:
    """Move due messages to the end of their queues; return how many for each queue."""

    async def work(connection: Connection) -> dict[str, int]:
        await connection.fetch(pool.names.render(consumers_sql.LOCK_PROMOTION))
        rows = await connection.fetch(pool.names.render(messages_sql.PROMOTE), shift, STEP_ROWS)
        return {row["queue"]: row["count"] for row in rows}

    return await pool.transact(work, repeat=True)


async def take_back(
    connection: Connection, names: PostgresNames, number: int, limit: int
) -> tuple[int, dict[str, int]]:
    """Take messages back from a fenced consumer, in a transaction, counting the crash.

    The consumer is removed with its last message.

    Returns:
        How many were taken back, and how many of each queue can be fetched again.
    """
    rows = await connection.fetch(names.render(messages_sql.TAKE_BACK), number, limit)
    count = sum(row["count"] for row in rows)
    if count < limit:
        await connection.fetch(names.render(consumers_sql.REMOVE_FENCED), number)
    return count, {row["queue"]: row["count"] for row in rows if row["queue"] is not None}


async def extend_leases(connection: Connection, names: PostgresNames, shift: float) -> None:
    """Give every consumer another lease, in a transaction that holds `LOCK_SILENCE`."""
    await connection.fetch(names.render(consumers_sql.EXTEND_LEASES), shift)
    await connection.fetch(names.render(consumers_sql.NOTE_EXTENSION))


async def _fence(
    connection: Connection, names: PostgresNames, lapsed: Sequence[int], shift: float
) -> list[int]:
    """Fence consumers whose leases have lapsed, or extend all leases; return the fenced ones."""
    [silence] = await connection.fetch(names.render(consumers_sql.LOCK_SILENCE))
    [live] = await connection.fetch(names.render(consumers_sql.LONGEST_LEASE), lapsed)
    if live["count"]:  # else all of them are fenced already
        longest = live["longest"]  # None: another program wrote all of them
        if longest is not None and is_stall(silence["seconds"], longest):
            await extend_leases(connection, names, shift)
        else:
            await connection.fetch(names.render(consumers_sql.FENCE_LAPSED), shift, lapsed)
    rows = await connection.fetch(names.render(consumers_sql.FENCED_AMONG), lapsed)
    return [row["number"] for row in rows]
