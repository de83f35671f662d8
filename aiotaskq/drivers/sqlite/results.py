"""The result backend."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, ClassVar, Self

import msgspec
from msgspec import UNSET, Raw, UnsetType

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.database import Database, Row, Settings
from aiotaskq.drivers.sqlite.link import Link
from aiotaskq.drivers.sqlite.messages import BUDGET, sweep
from aiotaskq.drivers.sqlite.wakeups import RESULTS, Bell
from aiotaskq.errors import BackendUnavailable

_RETRY_EVERY = 0.2
_SWEEP_EVERY = 10.0


class SQLiteBackend:
    """Outcomes in a table of an SQLite file. See `aiotaskq.contract.results.ResultBackend`.

    The table ``<prefix>_results`` can be read with the shell ``sqlite3``: values are JSON text
    where the serializer writes such.

    Args:
        url: ``sqlite:///name.db`` or ``sqlite:////folder/name.db``, with options if wanted.
        prefix: Of the tables.

    Raises:
        ConfigError: The URL is none of this driver.
    """

    wants_arguments: ClassVar[bool] = True

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._link = Link(Settings.parse(url, prefix), BackendUnavailable)
        self._bell = Bell(self._link)
        self._time_shift = 0.0  # for tests: seconds that have passed without passing
        self._sweep_at = 0.0

    @property
    def url(self) -> str:
        return self._link.settings.url

    def clone(self) -> Self:
        twin = type(self)(self.url, prefix=self._link.settings.prefix)
        twin._link.settings = self._link.settings  # the same file, wherever we work by then
        return twin

    async def open(self) -> None:
        await self._link.open()
        self._bell.open()

    async def close(self) -> None:
        await self._bell.close()
        await self._link.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        if not batch:
            return []
        return await self._link.run(partial(self._store, batch=list(batch), ttl=ttl))

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        if not ids:
            return {}
        asked = (json.dumps(list(ids)), self._now())
        rows = await self._link.run(lambda db: db.rows(sql.LOAD, asked))
        return {row[0]: _outcome(row) for row in rows}

    async def subscribe(self) -> AsyncGenerator[Sequence[str], None]:
        ear = asyncio.Event()
        self._bell.add(ear)
        seen: int | None = None
        whole = False  # whether the reader knows of no gap
        try:
            while True:
                # In this order: what is committed after `listen` rings, what was before is found.
                ear.clear()
                try:
                    await self._bell.listen([RESULTS])
                    seen, ids = await self._link.run(partial(_arrived_since, seen=seen))
                except BackendUnavailable:
                    if not self._link.is_open:
                        return
                    whole = False
                    await asyncio.sleep(_RETRY_EVERY)
                    continue
                if not whole:
                    whole = True
                    yield []
                if ids:
                    yield ids
                else:
                    await self._bell.wait(ear, self._bell.poll)
        finally:
            self._bell.discard(ear)

    async def forget(self, ids: Collection[str]) -> int:
        if not ids:
            return 0
        return await self._link.run(partial(_forget, ids=json.dumps(list(ids)), now=self._now()))

    def _now(self) -> float:
        return time.time() + self._time_shift

    # --- in the thread ---

    def _store(self, db: Database, batch: list[Outcome], ttl: float | None) -> list[str]:
        now = self._now()
        expires_at = None if ttl is None else now + ttl
        refused = []
        with db.write():
            for outcome in batch:
                if not _keep(db, _row(outcome, expires_at), now):
                    refused.append(outcome.task_id)
                elif outcome.status.final:
                    db.wake(RESULTS)
            if now >= self._sweep_at:
                self._sweep_at = now if sweep(db, now) else now + _SWEEP_EVERY
        return refused


def _keep(db: Database, row: Row, now: float) -> bool:
    """Store one outcome unless a final one is there. Mostly there is none, so that goes first."""
    if db.change(sql.ADD_RESULT, row) == 1:
        return True
    return (
        db.change(sql.DROP_REPLACEABLE, (row[0], now)) == 1 and db.change(sql.ADD_RESULT, row) == 1
    )


def _arrived_since(db: Database, seen: int | None) -> tuple[int, list[str]]:
    """Return the ids of final outcomes after a number, and the number to go on from."""
    if seen is None:
        return db.rows(sql.LAST_ARRIVAL)[0][0] or 0, []
    rows = db.rows(sql.ARRIVED_SINCE, (seen, BUDGET))
    return rows[-1][0] if rows else seen, [row[1] for row in rows]


def _forget(db: Database, ids: str, now: float) -> int:
    with db.write():
        return db.change(sql.FORGET_RESULTS, (ids, now))


def _row(outcome: Outcome, expires_at: float | None) -> Row:
    return (
        outcome.task_id,
        outcome.status.value,
        _at_rest(outcome.result),
        None if outcome.date_done is None else outcome.date_done.isoformat(),
        outcome.traceback,
        json.dumps(outcome.children, ensure_ascii=False),
        outcome.name,
        _at_rest(outcome.args),
        _at_rest(outcome.kwargs),
        outcome.worker,
        outcome.retries,
        outcome.queue,
        outcome.execution_time,
        json.dumps(msgspec.to_builtins(outcome.history)) if outcome.history else None,
        expires_at,
    )


def _outcome(row: Row) -> Outcome:
    task_id, status, result, done, traceback, children, name, args, kwargs, *rest = row
    worker, retries, queue, execution_time, history = rest
    return Outcome(
        task_id=task_id,
        status=TaskStatus(status),
        result=Raw(_bytes(result)),
        date_done=None if done is None else datetime.fromisoformat(done),
        traceback=traceback,
        children=json.loads(children),
        name=name,
        args=UNSET if args is None else Raw(_bytes(args)),
        kwargs=UNSET if kwargs is None else Raw(_bytes(kwargs)),
        worker=worker,
        retries=retries,
        queue=queue,
        execution_time=execution_time,
        history=() if history is None else _history(history),
    )


def _history(text: str) -> tuple[Attempt, ...]:
    return msgspec.convert(json.loads(text), tuple[Attempt, ...])


def _at_rest(value: Raw | UnsetType) -> str | bytes | None:
    """Return encoded bytes as text where they are text: people read the table."""
    if isinstance(value, UnsetType):
        return None
    data = bytes(value)
    # The shell shows text up to the first NUL.
    if b"\x00" in data:
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else value
