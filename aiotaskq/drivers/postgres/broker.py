"""The PostgreSQL broker: a table of messages, whose rows are taken, and deleted when done.

Theory of operation. All state is in the database; a broker object holds a pool, a connection for
notices, and the time of its last sweep, and may vanish at any moment. It is closed or open; closing
never loses messages.

A message is a row in one of four states: ready, delayed (it has a due time), held (it has a
consumer and a token), or suspect (ready, after two crashes). Each change of state is one statement
or one transaction: a crash, a cancelled call or a lost connection leaves it done or not done.

- `publish` is one transaction for each thousand messages. The call's id is recorded with them. A
  call repeated after a lost answer stores only the chunks that are not recorded.
- A fetch takes rows that no other transaction has locked; see `consumer`.
- `cancel` marks ids before it looks which of them are held. So each message is deleted, or found
  held, or dropped by the publish or fetch that sees the mark.
- A message leaves the table when it is settled, and never before: it is held by a consumer whose
  lease runs, or `maintenance` gives it to others.

Consumers are told of new messages after the commit, never before; see `notify`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.drivers.common.rows import count_depths
from aiotaskq.drivers.postgres.caller_transaction import (
    CALLER_ERRORS,
    PostgresDatabaseCheck,
    connection_in_transaction,
)
from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.drivers.postgres.consumer import PostgresConsumer
from aiotaskq.drivers.postgres.dead_letters import discard, read, revive
from aiotaskq.drivers.postgres.lease import PostgresLease
from aiotaskq.drivers.postgres.maintenance import PostgresMaintenance
from aiotaskq.drivers.postgres.messages import (
    check_storable,
    count_by_queue,
    insert,
    notify_on_commit,
)
from aiotaskq.drivers.postgres.migrate import PostgresMigrations
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.notify import ALL, PostgresNotifier
from aiotaskq.drivers.postgres.results import PostgresBackend
from aiotaskq.drivers.postgres.schedules import PostgresSchedules
from aiotaskq.drivers.postgres.sql import consumers as consumers_sql
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.drivers.postgres.storable import is_storable
from aiotaskq.drivers.postgres.url import parse_url
from aiotaskq.errors import BatchRefused, BrokerFull, BrokerUnavailable

_PURGE_ROWS = 10_000  # of one statement


class PostgresBroker:
    """A broker in a PostgreSQL database; see `aiotaskq.contract.broker.Broker`.

    It makes its tables itself, if the user may do that; otherwise see `aiotaskq migrate`.

    Args:
        url: ``postgresql://user:password@host:port/database``. Behind PgBouncer in transaction
            mode, add ``?statement_cache_size=0&listen=host:port``, the latter of PostgreSQL itself.
        prefix: The prefix of the names of tables and channels.
        pool_size: The largest number of connections, beside one that listens while a consumer
            waits.
        timeout: The time limit of a call in seconds.
        listen_url: The URL to listen at for notices, if more than host and port differ there.

    Raises:
        ConfigError: The URL or the prefix cannot be used.
    """

    traits: ClassVar[Traits] = Traits(transactional=True)

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
        self._url = parse_url(url, listen_url=listen_url)
        self._names = PostgresNames(prefix)
        self._migrations = PostgresMigrations(self._names, "broker")
        self._pool = self._new_pool(pool_size)
        self._notifier = PostgresNotifier(self._pool)
        self._maintenance = PostgresMaintenance(self._pool)
        self._database = PostgresDatabaseCheck(self._pool)
        self._time_shift = 0.0  # the offset of the clock in seconds, for tests

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @property
    def url(self) -> str:
        return self._url.shown

    def clone(self) -> Self:
        twin = type(self)(**self._settings)
        twin._time_shift = self._time_shift
        return twin

    def backend(self) -> PostgresBackend:
        return PostgresBackend(**self._settings)

    async def open(self) -> None:
        await self._migrations.open(self._pool)

    async def close(self) -> None:
        await self._notifier.close()
        await self._pool.close()

    async def migrate(self, *, dry_run: bool = False) -> Sequence[tuple[str, str]]:
        """Apply the missing migrations; see `PostgresMigrations.migrate`."""
        return await self._migrations.migrate(self._pool, dry_run=dry_run)

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        if not batch:
            return []
        # Always an id, because the pool repeats a statement that failed on a stale connection.
        call = call_id or uuid.uuid4().hex
        errors: dict[int, Exception] = {}
        refused = await insert(
            self._pool.query,
            self._names,
            batch,
            shift=self._time_shift,
            call_id=call,
            errors=errors,
        )
        stored = (
            [one for place, one in enumerate(batch) if place not in errors] if errors else batch
        )
        await self._notifier.wake(count_by_queue(stored))
        if errors:
            raise BatchRefused(errors, answer=refused)
        return refused

    async def publish_in(self, connection: object, batch: Sequence[Envelope]) -> Collection[str]:
        """Store envelopes in the caller's transaction; see `Transactional`."""
        check_storable(batch)
        with self._pool.errors(but=CALLER_ERRORS):
            own = await connection_in_transaction(connection)
            await self._database.check(own.fetchrow)
            refused = await insert(own.fetch, self._names, batch, shift=self._time_shift)
            await notify_on_commit(own.fetch, self._names)
        return refused

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> PostgresConsumer:
        return PostgresConsumer(
            self._pool, self._notifier, self._shift, queues, name=name, lease=lease, about=about
        )

    def schedules(self) -> PostgresSchedules:
        return PostgresSchedules(self._pool, self._notifier, self._shift)

    def lease(self, grant: Grant) -> PostgresLease:
        return PostgresLease(self._new_pool(1), self._shift, grant)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        rows = await self._pool.fetch(consumers_sql.LIVE_CONSUMERS, self._time_shift)
        return [
            ConsumerInfo(
                id=row["id"],
                # Another program may have written lists of lists, or NULL.
                queues=tuple(one for one in row["queues"] if isinstance(one, str)),
                about=row["about"],
            )
            for row in rows
        ]

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        wanted = list(filter(is_storable, set(ids)))  # no message has another id
        if not wanted:
            return []

        async def work(connection: Connection) -> list[str]:
            render = self._names.render
            before: set[str] = set()  # ids cancelled by earlier calls stay cancelled
            if not running:
                rows = await connection.fetch(render(messages_sql.CANCELLED_AMONG), wanted)
                before = {row["id"] for row in rows}
            # Waits for fetches that are taking one of them. After it, no fetch takes any more.
            await connection.fetch(render(messages_sql.CANCEL), self._time_shift, wanted)
            if running:
                return []
            rows = await connection.fetch(render(messages_sql.HELD_AMONG), wanted)
            held = [row["id"] for row in rows if row["id"] not in before]
            await connection.fetch(render(messages_sql.UNCANCEL), held)
            return held

        return await self._pool.transact(work, repeat=True)

    async def cancelled_among(self, ids: Collection[str]) -> Collection[str]:
        known = list(filter(is_storable, ids))
        rows = await self._pool.fetch(messages_sql.CANCELLED_AMONG, known)
        return {row["id"] for row in rows}

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        now = asyncio.get_running_loop().time() + self._time_shift
        maintained, promoted, back = await self._maintenance.maintain(limits, self._time_shift, now)
        await self._notifier.wake(promoted)
        # All consumers, because not each of them may be given a suspect.
        await self._notifier.wake(dict.fromkeys(back, ALL))
        return maintained

    async def depth(self) -> Mapping[str, Depth]:
        rows = await self._pool.fetch(messages_sql.DEPTH, self._time_shift)
        return count_depths((row["queue"], row["state"], row["count"]) for row in rows)

    async def purge(self, queue: str) -> int:
        dropped = 0
        if not is_storable(queue):
            return 0
        for statement in messages_sql.PURGES:
            # In steps, so that none takes longer than the time limit of a call.
            while found := (await self._pool.fetch(statement, queue, _PURGE_ROWS))[0]["count"]:
                dropped += found
        return dropped

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        return await read(self._pool, queue, limit, before)

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return await revive(self._pool, self._notifier, queue, letters, self._time_shift)

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return await discard(self._pool, queue, keys)

    def _shift(self) -> float:
        return self._time_shift

    def _new_pool(self, pool_size: int) -> PostgresPool:
        return PostgresPool(
            self._url,
            self._names,
            BrokerUnavailable,
            full=BrokerFull,
            pool_size=pool_size,
            timeout=self._settings["timeout"],
            by_index=True,
        )
