"""The PostgreSQL broker: rows that are taken, and deleted when they are done."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.consumer import PostgresConsumer
from aiotaskq.drivers.postgres.enlisted import CALLERS_OWN, enlist
from aiotaskq.drivers.postgres.housekeeping import Housekeeper
from aiotaskq.drivers.postgres.lease import PostgresLease
from aiotaskq.drivers.postgres.letters import discard, read, revive
from aiotaskq.drivers.postgres.link import Connection, Link
from aiotaskq.drivers.postgres.messages import announce, counted, insert
from aiotaskq.drivers.postgres.migrating import Migrations
from aiotaskq.drivers.postgres.names import Names
from aiotaskq.drivers.postgres.results import PostgresBackend
from aiotaskq.drivers.postgres.schedules import PostgresSchedules
from aiotaskq.drivers.postgres.target import parse
from aiotaskq.drivers.postgres.waking import ALL, Bell
from aiotaskq.errors import BrokerFull, BrokerUnavailable

_PURGE_STEP = 10_000


class PostgresBroker:
    """Messages in PostgreSQL. See `aiotaskq.contract.broker.Broker`.

    It makes its tables itself, where the user may; else see `aiotaskq migrate`.

    Args:
        url: ``postgresql://user:password@host:port/database``. Behind PgBouncer in transaction
            mode, add ``?statement_cache_size=0&listen=host:port``, the latter of PostgreSQL itself.
        prefix: What the names of tables and channels begin with.
        pool_size: The most connections at once, beside one that listens while somebody waits.
        timeout: Seconds until a call is given up.
        listen_url: Where to listen for notices, if more than host and port is another there.

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
        self._target = parse(url, listen_url=listen_url)
        self._names = Names(prefix)
        self._migrations = Migrations(self._names, "broker")
        self._link = self._new_link(pool_size)
        self._bell = Bell(self._link)
        self._housekeeper = Housekeeper(self._link)
        self._time_shift = 0.0  # for tests: seconds that have passed without passing

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @property
    def url(self) -> str:
        return self._target.url

    def clone(self) -> Self:
        twin = type(self)(**self._settings)
        twin._time_shift = self._time_shift
        return twin

    def backend(self) -> PostgresBackend:
        return PostgresBackend(**self._settings)

    async def open(self) -> None:
        """Connect, and make the tables if they are not there. Idempotent.

        Raises:
            BrokerUnavailable: It cannot be reached now.
            ConfigError: The server refuses the user, the password, the database or the tables.
        """
        await self._link.open(self._migrations.prepare)

    async def close(self) -> None:
        await self._bell.close()
        await self._link.close()

    async def migrate(self, *, dry_run: bool = False) -> Sequence[tuple[str, str]]:
        """Bring the tables up to date, all or nothing; it need not be open.

        Args:
            dry_run: Only look what is missing.

        Returns:
            The name and the statements of each step.

        Raises:
            BrokerUnavailable: It cannot be reached now.
            ConfigError: The server refuses it, or a later release changed the tables.
        """
        return await self._link.once(partial(self._migrations.migrate, dry_run=dry_run))

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        if not batch:
            return []
        # An id in any case: the link repeats what failed on a stale connection.
        call = call_id or uuid.uuid4().hex
        refused = await insert(
            self._link.query, self._names, batch, shift=self._time_shift, call_id=call
        )
        await self._bell.wake(counted(batch))
        return refused

    async def publish_in(self, connection: object, batch: Sequence[Envelope]) -> Collection[str]:
        """Store envelopes in the transaction of the caller; see `Transactional`."""
        with self._link.errors(but=CALLERS_OWN):
            own = await enlist(connection)
            refused = await insert(own.fetch, self._names, batch, shift=self._time_shift)
            await announce(own.fetch, self._names)
        return refused

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> PostgresConsumer:
        return PostgresConsumer(
            self._link, self._bell, self._shift, queues, name=name, lease=lease, about=about
        )

    def schedules(self) -> PostgresSchedules:
        return PostgresSchedules(self._link, self._bell, self._shift)

    def lease(self, grant: Grant) -> PostgresLease:
        return PostgresLease(self._new_link(1), self._shift, grant)

    async def consumers(self) -> Sequence[ConsumerInfo]:
        rows = await self._link.fetch(sql.LIVING, self._time_shift)
        return [
            ConsumerInfo(id=row["id"], queues=tuple(row["queues"]), about=row["about"])
            for row in rows
        ]

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        wanted = list(set(ids))
        if not wanted:
            return []

        async def work(connection: Connection) -> list[str]:
            render = self._names.render
            before: set[str] = set()
            if not running:
                rows = await connection.fetch(render(sql.CANCELLED_AMONG), wanted)
                before = {row["id"] for row in rows}
            # Waits for those who are taking one of them; after it nobody can.
            await connection.fetch(render(sql.CANCEL), self._time_shift, wanted)
            if running:
                return []
            rows = await connection.fetch(render(sql.HELD_AMONG), wanted)
            spared = [row["id"] for row in rows if row["id"] not in before]
            await connection.fetch(render(sql.LIFT_CANCEL), spared)
            return spared

        return await self._link.transact(work, repeat=True)

    async def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        now = asyncio.get_running_loop().time() + self._time_shift
        tended, due, back = await self._housekeeper.maintain(limits, self._time_shift, now)
        await self._bell.wake(due)
        # All, since not everybody may be given a suspect.
        await self._bell.wake(dict.fromkeys(back, ALL))
        return tended

    async def depth(self) -> Mapping[str, Depth]:
        counts: dict[str, dict[str, int]] = {}
        for row in await self._link.fetch(sql.DEPTH, self._time_shift):
            states = counts.setdefault(row["queue"], {})
            states[row["state"]] = states.get(row["state"], 0) + row["count"]
        return {queue: Depth(**states) for queue, states in counts.items()}

    async def purge(self, queue: str) -> int:
        dropped = 0
        for statement in sql.PURGES:
            # In steps, each in less time than a call may take.
            while found := (await self._link.fetch(statement, queue, _PURGE_STEP))[0]["count"]:
                dropped += found
        return dropped

    async def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        """Return dead letters of a queue, the newest first.

        Raises:
            BrokerUnavailable: The server cannot be reached now.
            ConfigError: `before` is no key.
        """
        return await read(self._link, queue, limit, before)

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return await revive(self._link, self._bell, queue, letters, self._time_shift)

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        return await discard(self._link, queue, keys)

    def _shift(self) -> float:
        return self._time_shift

    def _new_link(self, pool_size: int) -> Link:
        return Link(
            self._target,
            self._names,
            BrokerUnavailable,
            full=BrokerFull,
            pool_size=pool_size,
            timeout=self._settings["timeout"],
            by_index=True,
        )
