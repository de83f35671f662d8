"""Results in PostgreSQL: one row each, in JSON columns."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import asyncpg
import msgspec
from msgspec import UNSET, Raw, UnsetType

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.postgres import results_sql as sql
from aiotaskq.drivers.postgres.link import REJECTED, Connection, Link, Rejected
from aiotaskq.drivers.postgres.migrating import Migrations
from aiotaskq.drivers.postgres.names import Names
from aiotaskq.drivers.postgres.repair import replaced, storable, tidied
from aiotaskq.drivers.postgres.target import parse
from aiotaskq.drivers.postgres.transactions import PostgresTransaction
from aiotaskq.errors import BackendUnavailable, DecodeError

logger = logging.getLogger("aiotaskq.drivers.postgres")

_CHUNK_ROWS = 500
_CHUNK_BYTES = 4 * 1024 * 1024
_IDS = 5000  # asked for in one statement
_SWEEP_EVERY = 60.0  # seconds
_SWEEP_ROWS = 1000
_FOREVER = 100.0 * 365 * 86_400  # seconds; a longer ttl could pass the end of PostgreSQL's calendar
_PING_EVERY = 15.0  # seconds of silence until a subscription is checked
_PING_TIMEOUT = 5.0
_PAUSE = 0.1  # seconds before a subscription is renewed; doubled up to the next
_LONGEST_PAUSE = 5.0


class PostgresBackend:
    """A result backend in the table ``<prefix>_results``, which it makes itself.

    Results are `jsonb`: a dict comes back in another order of keys, and a float that is a whole
    number beyond 1e15 as an int. A result that PostgreSQL cannot keep (NUL in a string) is stored
    as a failure that says so.

    Each subscription (`arrivals`) has a connection of its own, which has to reach the server
    directly or through a pooler in session mode: LISTEN has no effect in transaction mode.

    Args:
        url: ``postgresql://user:password@host:port/database``, or as Celery users write it,
            ``db+postgresql+psycopg2://...``. Behind PgBouncer in transaction mode, add
            ``?statement_cache_size=0``.
        prefix: What the names of the table and of the channel begin with.
        pool_size: The most connections at once, subscriptions apart.
        timeout: Seconds until a call is given up.
        listen_url: Where subscriptions connect to, where the URL leads to PgBouncer in
            transaction mode; ``?listen=host:port`` says the same where only these differ.

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
        names = Names(prefix)
        self._channel = names.channel("results")
        self._migrations = Migrations(names, "results")
        target = parse(url, listen_url=listen_url)
        self._link = Link(target, names, BackendUnavailable, pool_size=pool_size, timeout=timeout)
        # For tasks: what they do there takes the time that it takes.
        self._transactions = Link(
            target, names, BackendUnavailable, pool_size=pool_size, timeout=None
        )
        self._swept_at = float("-inf")
        self._time_shift = 0.0  # seconds; tests let time pass by it

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @property
    def url(self) -> str:
        """Where it is, without the password."""
        return self._link.target.url

    def clone(self) -> Self:
        """Return a closed driver of the same settings, for another event loop."""
        other = type(self)(**self._settings)
        other._time_shift = self._time_shift
        return other

    async def open(self) -> None:
        """Connect, and make the table if it is not there. Idempotent.

        Raises:
            BackendUnavailable: It cannot be reached now.
            ConfigError: The server refuses the user, the password, the database or the table.
        """
        await self._link.open(self._migrations.prepare)
        await self._transactions.open()  # no connection yet

    async def close(self) -> None:
        """Let go of the connections. Idempotent, never raises."""
        await self._transactions.close()
        await self._link.close()

    async def migrate(self, *, dry_run: bool = False) -> Sequence[tuple[str, str]]:
        """Bring the tables up to date, all or nothing; it need not be open.

        Args:
            dry_run: Only look what is missing.

        Returns:
            The name and the statements of each step.

        Raises:
            BackendUnavailable: It cannot be reached now.
            ConfigError: The server refuses it, or a later release changed the tables.
        """
        return await self._link.once(partial(self._migrations.migrate, dry_run=dry_run))

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        refused: dict[str, None] = {}
        chosen = _choose(batch, refused)
        for chunk in _chunks(chosen):
            for task_id in await self._store_some(chunk, ttl):
                refused[task_id] = None
        await self._sweep_now_and_then()
        return refused.keys()

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        found: dict[str, Outcome] = {}
        for some in _slices(ids):
            for row in await self._link.fetch(sql.LOAD, self._time_shift, some):
                found[row["task_id"]] = _outcome(row)
        return found

    async def forget(self, ids: Collection[str]) -> int:
        count = 0
        for some in _slices(ids):
            [row] = await self._link.fetch(sql.FORGET, self._time_shift, some)
            count += row["count"]
        return count

    async def subscribe(self) -> AsyncIterator[Sequence[str]]:
        """Yield the ids of final outcomes as they are stored; see `ResultBackend.subscribe`.

        Raises:
            ConfigError: The server refuses the user, the password or the database.
        """
        pause = _PAUSE
        while True:
            try:
                async with _Subscription(self._link, self._channel) as subscription:
                    pause = _PAUSE
                    yield []
                    while True:
                        yield await subscription.next()
            except BackendUnavailable as error:
                logger.warning("no news of results, subscribing again: %s", error)
            await asyncio.sleep(pause * (0.5 + random.random() / 2))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def begin(self) -> PostgresTransaction:
        """Begin a transaction for a task; see `aiotaskq.contract.results.TransactionalResults`."""
        return await PostgresTransaction.begin(
            self._transactions, self._store_on, timeout=self._settings["timeout"]
        )

    async def _store_on(self, connection: Connection, outcome: Outcome, ttl: float | None) -> bool:
        # Should this process stand still before the commit, another run of the task would wait
        # for it. And what the task wrote is not to go because its arguments cannot be kept.
        longest = round(self._settings["timeout"] * 1000)
        await connection.execute(
            f"SET LOCAL idle_in_transaction_session_timeout = {longest}; SAVEPOINT aiotaskq"
        )
        try:
            return bool(await connection.fetch(*self._storing([outcome], ttl)))
        except REJECTED:
            await connection.execute("ROLLBACK TO SAVEPOINT aiotaskq")
        return bool(await connection.fetch(*self._storing([tidied(outcome)], ttl)))

    async def _store_some(self, chunk: Sequence[Outcome], ttl: float | None) -> list[str]:
        """Store a chunk; return the ids refused. One value that cannot be kept harms no other."""
        try:
            return await self._store_all(chunk, ttl)
        except Rejected as error:
            if len(chunk) == 1:
                return await self._store_difficult(chunk[0], ttl, str(error))
        middle = len(chunk) // 2
        return [
            *await self._store_some(chunk[:middle], ttl),
            *await self._store_some(chunk[middle:], ttl),
        ]

    async def _store_difficult(self, outcome: Outcome, ttl: float | None, reason: str) -> list[str]:
        logger.warning("PostgreSQL cannot keep the outcome of %s: %s", outcome.task_id, reason)
        for lesser in (tidied(outcome), replaced(outcome, reason)):
            try:
                return await self._store_all([lesser], ttl)
            except Rejected as error:
                reason = str(error)
        # Only its id is left to be at fault.
        logger.error(
            "an outcome is lost, its id %.100r cannot be kept: %s", outcome.task_id, reason
        )
        return []

    async def _store_all(self, chunk: Sequence[Outcome], ttl: float | None) -> list[str]:
        statement, *arguments = self._storing(chunk, ttl)
        rows = await self._link.query(statement, *arguments)
        kept = {row["task_id"] for row in rows}
        return [one.task_id for one in chunk if one.task_id not in kept]

    def _storing(self, chunk: Sequence[Outcome], ttl: float | None) -> tuple[Any, ...]:
        """Return the statement that stores outcomes, and its parameters."""
        return (
            self._link.names.render(sql.STORE),
            self._time_shift,
            None if ttl is None else min(ttl, _FOREVER),
            self._channel,
            *zip(*map(_row, chunk), strict=True),
        )

    async def _sweep_now_and_then(self) -> None:
        """Delete some of what is out of date, seldom."""
        now = asyncio.get_running_loop().time()
        if now < self._swept_at + _SWEEP_EVERY:
            return
        self._swept_at = now
        try:
            [row] = await self._link.fetch(sql.SWEEP, self._time_shift, _SWEEP_ROWS)
        except BackendUnavailable as error:  # the batch is stored, and nothing depends on this
            logger.warning("could not delete results that are out of date: %s", error)
            return
        if row["count"] == _SWEEP_ROWS:
            self._swept_at = float("-inf")  # there is more: go on with the next batch


class _Subscription:
    """A connection that listens for notices."""

    def __init__(self, link: Link, channel: str) -> None:
        self._link = link
        self._channel = channel
        self._connection: Connection | None = None
        self._notices: deque[str] = deque()
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        connection = await self._link.connect(listens=True)
        try:
            with self._link.errors():
                connection.add_termination_listener(self._end)
                await connection.add_listener(self._channel, self._hear)
        except BaseException:
            await self._link.drop(connection)
            raise
        self._connection = connection
        return self

    async def __aexit__(self, *_: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._link.drop(connection)

    async def next(self) -> Sequence[str]:
        """Wait for notices; return the ids, or none if somebody has to look.

        Raises:
            BackendUnavailable: The connection is lost.
        """
        while not self._notices:
            self._news.clear()
            try:
                async with asyncio.timeout(_PING_EVERY):
                    await self._news.wait()
            except TimeoutError:
                await self._ping()
            if self._connection is None or self._connection.is_closed():
                raise BackendUnavailable(f"the connection to {self._link.target.url} is lost")
        notices, self._notices = self._notices, deque()
        told = [notice for notice in notices if notice]
        if told and len(told) < len(notices):
            self._notices.append("")  # that somebody has to look is the next item
        return [one for notice in told for one in msgspec.json.decode(notice, type=list[str])]

    async def _ping(self) -> None:
        # A firewall that forgot the connection lets it look sound for hours.
        assert self._connection is not None
        with self._link.errors():
            async with asyncio.timeout(_PING_TIMEOUT):
                await self._connection.execute("SELECT 1")

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._notices.append(str(payload))
        self._news.set()

    def _end(self, _connection: object) -> None:
        self._news.set()


def _choose(batch: Sequence[Outcome], refused: dict[str, None]) -> list[Outcome]:
    """Return the outcome that counts for each id, and note whose later ones do not.

    One statement cannot touch a row twice.
    """
    chosen: dict[str, Outcome] = {}
    for outcome in batch:
        task_id = outcome.task_id
        if not storable(task_id):
            logger.error("an outcome is lost, its id cannot be kept: %.100r", task_id)
        elif task_id in chosen and chosen[task_id].status.final:
            refused[task_id] = None
        else:
            chosen[task_id] = outcome
    return list(chosen.values())


def _chunks(outcomes: Sequence[Outcome]) -> Iterator[Sequence[Outcome]]:
    """Cut into pieces that one statement may carry."""
    chunk: list[Outcome] = []
    size = 0
    for outcome in outcomes:
        own = sum(len(bytes(raw)) for raw in (outcome.result, outcome.args, outcome.kwargs) if raw)
        own += len(outcome.traceback or "") + sum(len(one.traceback) for one in outcome.history)
        if chunk and (len(chunk) == _CHUNK_ROWS or size + own > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(outcome)
        size += own
    if chunk:
        yield chunk


def _slices(ids: Collection[str]) -> Iterator[list[str]]:
    unique = [one for one in dict.fromkeys(ids) if storable(one)]
    for start in range(0, len(unique), _IDS):
        yield unique[start : start + _IDS]


def _row(outcome: Outcome) -> tuple[Any, ...]:
    """Return the parameters of an outcome, in the order of `results_sql.STORE`."""
    return (
        outcome.task_id,
        str(outcome.status),
        _json(outcome.result),
        outcome.date_done,
        outcome.traceback,
        outcome.name,
        _json(outcome.args),
        _json(outcome.kwargs),
        outcome.worker,
        outcome.retries,
        outcome.queue,
        outcome.execution_time,
        msgspec.json.encode(outcome.children).decode(),
        # By the standard library, which writes down lone surrogates too: PostgreSQL refuses
        # them, and then they are shown in another way.
        json.dumps(msgspec.to_builtins(outcome.history)) if outcome.history else None,
    )


def _json(raw: Raw | UnsetType) -> str | None:
    # What is no UTF-8 is no JSON either, and is refused as other non-JSON is.
    return None if isinstance(raw, UnsetType) else bytes(raw).decode("utf-8", "surrogateescape")


def _outcome(row: asyncpg.Record) -> Outcome:
    try:
        status = TaskStatus(row["status"])
        children = msgspec.json.decode(row["children"] or "[]", type=list[str])
        history = msgspec.json.decode(row["history"] or "[]", type=tuple[Attempt, ...])
    except ValueError as error:  # somebody else wrote it
        raise DecodeError(f"the row of {row['task_id']} is no outcome: {error}") from error
    return Outcome(
        task_id=row["task_id"],
        status=status,
        result=_raw(row["result"]) or Raw(b"null"),
        date_done=row["date_done"],
        traceback=row["traceback"],
        name=row["name"],
        args=_raw(row["args"]) or UNSET,
        kwargs=_raw(row["kwargs"]) or UNSET,
        worker=row["worker"],
        retries=row["retries"] or 0,
        queue=row["queue"],
        execution_time=row["execution_time"],
        children=children,
        history=history,
    )


def _raw(text: str | None) -> Raw | None:
    return None if text is None else Raw(text.encode())
