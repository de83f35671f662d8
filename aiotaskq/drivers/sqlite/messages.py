"""Messages in their table: storing them, and reading rows that another program may have written.

All functions run in the thread of a connection, inside a transaction of the caller
(`SQLiteDatabase.write`). The states of a message are told in `aiotaskq.drivers.sqlite.sql`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.common.retention import UNIQUE_IDS_FOR
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.notify import queue_topic

_FAR = 2**31 - 1  # whole numbers beyond are not counted

BUDGET = 1000
"""Rows that one step of maintenance touches at most, so that no transaction takes long."""


def add(database: SQLiteDatabase, batch: Iterable[Envelope], now: float) -> None:
    """Store envelopes at the end of their queues and notify the consumers that wait for them."""
    rows = []
    queues = set()
    for one in batch:
        due_at = one.not_before if one.delay is None else now + one.delay
        if due_at is not None and due_at <= now:
            due_at = None
        expires_at = one.expires_at if one.expires_in is None else now + one.expires_in
        rows.append((one.id, one.queue, one.priority, due_at, expires_at, one.body))
        # Also for delayed messages: a waiting consumer has to learn until when it may wait.
        queues.add(one.queue)
    database.change_many(sql.ADD_MESSAGE, rows)
    for queue in queues:
        database.notify(queue_topic(queue))


def add_unless_cancelled(database: SQLiteDatabase, batch: list[Envelope], now: float) -> None:
    """Store envelopes like `add`, but none whose id is cancelled."""
    ids = json.dumps([one.id for one in batch])
    cancelled = {row[0] for row in database.rows(sql.CANCELLED_AMONG, (ids,))}
    add(database, [one for one in batch if one.id not in cancelled], now)


def claim(database: SQLiteDatabase, name: str, now: float) -> bool:
    """Note a unique id; return False if it was noted before and its time is not over."""
    until = now + UNIQUE_IDS_FOR
    return database.change(sql.CLAIM_ID, {"id": name, "now": now, "until": until}) == 1


def claim_again(database: SQLiteDatabase, name: str, now: float) -> None:
    """Note a unique id, whether or not it was noted before."""
    database.change(sql.CLAIM_AGAIN, (name, now + UNIQUE_IDS_FOR))


UNSTORABLE_ERRORS = (UnicodeEncodeError, OverflowError, sqlite3.DataError)
"""Errors for such a value: text with lone surrogates, a number or bytes beyond SQLite's limits."""


def unstorable(error: Exception) -> UnstorableValue:
    """Return the error for callers."""
    return UnstorableValue(f"SQLite cannot store it: {error}")


def as_time(value: object) -> float | None:
    """Return a value of a column for times; None for a value of another type."""
    return float(value) if isinstance(value, int | float) else None


def as_bytes(value: object) -> bytes:
    """Return a value of a column for bytes; SQLite accepts a value of any type in any column."""
    return value if isinstance(value, bytes) else as_text(value).encode(errors="replace")


def as_text(value: object) -> str:
    """Return a value of a column for text as text, also if it has another type."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else str(value)


def as_number(value: object) -> int:
    """Return a value of a column for whole numbers; a value of another type counts as 0."""
    return max(-_FAR, min(value, _FAR)) if isinstance(value, int) else 0
