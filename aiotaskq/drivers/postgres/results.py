"""Results in PostgreSQL: one row for each, in columns that psql can read.

Theory of operation. All state is in the table ``<prefix>_results``; a backend object holds two
pools and the time of its last sweep. It is closed or open.

- `store` cuts its batch into chunks. Each chunk is one statement, which stores the outcomes and
  sends the notices of them, so there is no outcome without its notice. A crash, a cancelled call or
  a lost answer leaves any chunks stored; storing the batch again is safe, because the first final
  outcome of an id stays, and later ones are refused.
- One value that PostgreSQL cannot store makes the statement of its chunk fail as a whole. The chunk
  is halved until the value is alone; then its outcome is stored in a form that can be stored (see
  `storable`). So every outcome whose id is storable gets a row, and none harms another. The others
  are refused.
- `subscribe` listens on a connection of its own. When that is lost, it connects again, with growing
  pauses, and yields an empty item: notices may have been missed, so subscribers have to look.
- Transactions of tasks use the second pool, whose calls have no time limit: what a task does takes
  the time that it takes. See `transactions`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from aiotaskq.backoff import Backoff
from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.batches import portions, slices
from aiotaskq.drivers.common.clock import SweepTimer
from aiotaskq.drivers.common.rows import read_outcome
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.postgres.connection import (
    STATEMENT_BYTES,
    UNSTORABLE_ERRORS,
    Connection,
    PostgresPool,
)
from aiotaskq.drivers.postgres.migrate import PostgresMigrations
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.outcomes import row_of, size_of
from aiotaskq.drivers.postgres.sql import results as results_sql
from aiotaskq.drivers.postgres.storable import failure_in_place_of, is_storable, storable_outcome
from aiotaskq.drivers.postgres.subscription import PostgresSubscription
from aiotaskq.drivers.postgres.transactions import PostgresTransaction
from aiotaskq.drivers.postgres.url import parse_url
from aiotaskq.errors import BackendUnavailable, BatchRefused
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.drivers.postgres")

_CHUNK_ROWS = 500
_CHUNK_IDS = 5000  # asked for in one statement
_SWEEP_EVERY = 60.0  # seconds
_SWEEP_ROWS = 1000
_LONGEST_TTL = 100.0 * 365 * 86_400  # seconds; a longer one could pass the last date of PostgreSQL
_FIRST_PAUSE = 0.1  # seconds before a subscription connects again
_LONGEST_PAUSE = 5.0


class PostgresBackend:
    """A result backend in the table ``<prefix>_results``, which it makes itself.

    Results are `jsonb`: a dict comes back in another order of keys, and a float that is a whole
    number beyond 1e15 as an int. One with a NUL in a string, which `jsonb` cannot contain, is
    stored as a text of JSON. A result that PostgreSQL cannot store is a failure that says so.

    Each subscription has a connection of its own, which has to reach the server directly or through
    a pooler in session mode: LISTEN has no effect in transaction mode.

    Args:
        url: ``postgresql://user:password@host:port/database``, or in Celery's form,
            ``db+postgresql+psycopg2://...``. Behind PgBouncer in transaction mode, add
            ``?statement_cache_size=0``.
        prefix: The prefix of the names of the table and of the channel.
        pool_size: The largest number of connections, without subscriptions.
        timeout: The time limit of a call in seconds.
        listen_url: The URL of subscriptions, if the other one leads to PgBouncer in transaction
            mode. If only host and port differ, ``?listen=host:port`` does the same.

    Raises:
        ConfigError: The URL or the prefix cannot be used.
    """

    wants_arguments: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "aiotaskq",
        pool_size: int = 5,
        timeout: float = 10.0,
        listen_url: str | None = None,
    ) -> None:
        self._settings: dict[str, Any] = {
            "url": url,
            "prefix": prefix,
            "pool_size": pool_size,
            "timeout": timeout,
            "listen_url": listen_url,
        }
        names = PostgresNames(prefix)
        self._channel = names.channel("results")
        self._migrations = PostgresMigrations(names, "results")
        parsed = parse_url(url, listen_url=listen_url)
        self._pool = PostgresPool(
            parsed, names, BackendUnavailable, pool_size=pool_size, timeout=timeout
        )
        self._transactions = PostgresPool(
            parsed,
            names,
            BackendUnavailable,
            pool_size=pool_size,
            timeout=None,
            own_isolation=False,  # the tasks' own transactions have what their database says
        )
        self._sweep_timer = SweepTimer(_SWEEP_EVERY)
        self._time_shift = 0.0  # the offset of the clock in seconds, for tests

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @property
    def url(self) -> str:
        return self._pool.url.shown

    def clone(self) -> Self:
        other = type(self)(**self._settings)
        other._time_shift = self._time_shift
        return other

    async def open(self) -> None:
        await self._migrations.open(self._pool)
        await self._transactions.open()  # connects when a task asks for a transaction

    async def close(self) -> None:
        await self._transactions.close()
        await self._pool.close()

    async def migrate(self, *, dry_run: bool = False) -> Sequence[tuple[str, str]]:
        """Apply the missing migrations; see `PostgresMigrations.migrate`."""
        return await self._migrations.migrate(self._pool, dry_run=dry_run)

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        refused: dict[str, None] = {}
        lost: dict[str, Exception] = {}  # by id
        chosen = _one_for_each_id(batch, refused, lost)
        sizes = [size_of(one) for one in chosen]
        for chunk in portions(chosen, sizes, most=_CHUNK_ROWS, most_bytes=STATEMENT_BYTES):
            for task_id in await self._store_some(chunk, ttl, lost):
                refused[task_id] = None
        await self._sweep_at_times()
        if lost:
            errors = {
                place: lost[one.task_id] for place, one in enumerate(batch) if one.task_id in lost
            }
            raise BatchRefused(errors, answer=refused.keys())
        return refused.keys()

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        found: dict[str, Outcome] = {}
        for some in _storable_ids(ids):
            for row in await self._pool.fetch(results_sql.LOAD, self._time_shift, some):
                found[row["task_id"]] = read_outcome(row)
        return found

    async def forget(self, ids: Collection[str]) -> int:
        count = 0
        for some in _storable_ids(ids):
            [row] = await self._pool.fetch(results_sql.FORGET, self._time_shift, some)
            count += row["count"]
        return count

    async def subscribe(self) -> AsyncIterator[Sequence[str]]:
        """Yield the ids of final outcomes as they are stored; see `ResultBackend.subscribe`.

        Raises:
            ConfigError: The server refuses the user, the password or the database.
        """
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            try:
                async with PostgresSubscription(self._pool, self._channel) as subscription:
                    backoff.reset()
                    yield []
                    while True:
                        yield await subscription.next()
            except BackendUnavailable as error:
                logger.warning("lost the subscription to results, connecting again: %s", error)
            await asyncio.sleep(backoff.next())

    async def begin(self) -> PostgresTransaction:
        """Begin a transaction for a task; see `aiotaskq.contract.results.TransactionalResults`."""
        return await PostgresTransaction.begin(
            self._transactions, self._store_on, timeout=self._settings["timeout"]
        )

    async def _store_on(self, connection: Connection, outcome: Outcome, ttl: float | None) -> bool:
        # If this process is stopped before the commit, the server ends the transaction: another run
        # of the task would wait for it. The savepoint keeps what the task wrote where only its
        # arguments cannot be stored.
        milliseconds = round(self._settings["timeout"] * 1000)
        await connection.execute(
            f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds}; SAVEPOINT aiotaskq"
        )
        try:
            return bool(await connection.fetch(*self._store_statement([outcome], ttl)))
        except UNSTORABLE_ERRORS:
            await connection.execute("ROLLBACK TO SAVEPOINT aiotaskq")
        return bool(
            await connection.fetch(*self._store_statement([storable_outcome(outcome)], ttl))
        )

    async def _store_some(
        self, chunk: Sequence[Outcome], ttl: float | None, lost: dict[str, Exception]
    ) -> list[str]:
        """Store a chunk, halving it where a value cannot be stored; return the ids refused.

        Outcomes that cannot be stored in any form are added to `lost`.
        """
        try:
            return await self._store_all(chunk, ttl)
        except UnstorableValue as error:
            if len(chunk) == 1:
                return await self._store_unstorable(chunk[0], ttl, error, lost)
        middle = len(chunk) // 2
        return [
            *await self._store_some(chunk[:middle], ttl, lost),
            *await self._store_some(chunk[middle:], ttl, lost),
        ]

    async def _store_unstorable(
        self,
        outcome: Outcome,
        ttl: float | None,
        reason: UnstorableValue,
        lost: dict[str, Exception],
    ) -> list[str]:
        """Store an outcome in another form; return its id if that is refused."""
        logger.warning("PostgreSQL cannot store the outcome of %r: %s", outcome.task_id, reason)
        for other in (storable_outcome(outcome), failure_in_place_of(outcome, str(reason))):
            try:
                return await self._store_all([other], ttl)
            except UnstorableValue as error:
                reason = error
        lost[outcome.task_id] = reason  # all but the id has been replaced
        return []

    async def _store_all(self, chunk: Sequence[Outcome], ttl: float | None) -> list[str]:
        statement, *arguments = self._store_statement(chunk, ttl)
        rows = await self._pool.query(statement, *arguments)
        stored = {row["task_id"] for row in rows}
        return [one.task_id for one in chunk if one.task_id not in stored]

    def _store_statement(self, chunk: Sequence[Outcome], ttl: float | None) -> tuple[Any, ...]:
        """Return the statement that stores outcomes, and its arguments."""
        return (
            self._pool.names.render(results_sql.STORE),
            self._time_shift,
            None if ttl is None else min(ttl, _LONGEST_TTL),
            self._channel,
            *zip(*map(row_of, chunk), strict=True),
        )

    async def _sweep_at_times(self) -> None:
        """Delete some expired outcomes, at most once a minute."""
        now = asyncio.get_running_loop().time()
        if not self._sweep_timer.is_due(now):
            return
        # Before the sweep, so that other calls do not sweep meanwhile.
        self._sweep_timer.note(now, more=False)
        try:
            [row] = await self._pool.fetch(results_sql.SWEEP, self._time_shift, _SWEEP_ROWS)
        except BackendUnavailable as error:  # the batch is stored; the next sweep goes on
            logger.warning("could not delete expired results: %s", error)
            return
        if row["count"] == _SWEEP_ROWS:
            self._sweep_timer.note(now, more=True)  # the next batch goes on


def _one_for_each_id(
    batch: Sequence[Outcome], refused: dict[str, None], lost: dict[str, Exception]
) -> list[Outcome]:
    """Return the outcome to store for each id, and note the ids whose later outcomes are refused.

    One statement cannot change a row twice. Ids that no row can have are added to `lost`.
    """
    chosen: dict[str, Outcome] = {}
    for outcome in batch:
        task_id = outcome.task_id
        if not is_storable(task_id):
            lost[task_id] = UnstorableValue(f"PostgreSQL cannot store the id {task_id!r:.200}")
        elif task_id in chosen and chosen[task_id].status.final:
            refused[task_id] = None
        else:
            chosen[task_id] = outcome
    return list(chosen.values())


def _storable_ids(ids: Collection[str]) -> Iterator[Sequence[str]]:
    """Return the ids that can have a row, each once, in slices for one statement each."""
    unique = [one for one in dict.fromkeys(ids) if is_storable(one)]
    return slices(unique, _CHUNK_IDS)
