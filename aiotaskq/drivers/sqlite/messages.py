"""What broker and consumers both do to the table of messages, inside a transaction of theirs."""

from __future__ import annotations

import time
from collections.abc import Iterable

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.caller import Caller
from aiotaskq.drivers.sqlite.database import Database
from aiotaskq.drivers.sqlite.process import is_gone
from aiotaskq.drivers.sqlite.wakeups import queue_topic

_DAY = 86_400.0

BUDGET = 1000
"""Rows that one step of housekeeping touches at most, so that no transaction takes long."""


def add(db: Database, batch: Iterable[Envelope], now: float) -> None:
    """Store envelopes at the end of the line, and wake who waits for them."""
    rows = []
    queues = set()
    for one in batch:
        due_at = one.not_before if one.delay is None else now + one.delay
        if due_at is not None and due_at <= now:
            due_at = None
        expires_at = one.expires_at if one.expires_in is None else now + one.expires_in
        rows.append((one.id, one.queue, one.priority, due_at, expires_at, one.body))
        # Delayed ones too: a waiter has to know until when it may sleep.
        queues.add(one.queue)
    db.change_many(sql.ADD_MESSAGE, rows)
    for queue in queues:
        db.wake(queue_topic(queue))


def claim(db: Database, name: str, now: float) -> bool:
    """Note a unique id for a day; False if it was noted before."""
    return db.change(sql.CLAIM_ID, {"id": name, "now": now, "until": now + _DAY}) == 1


def claim_anyhow(db: Database, name: str, now: float) -> None:
    """Note a unique id for a day, as of now."""
    db.change(sql.CLAIM_ANYHOW, (name, now + _DAY))


def promote(db: Database, now: float) -> int:
    """Put what has fallen due, in whatever queue, at the end of its line; return how many."""
    due = db.rows(sql.ALL_DUE, (now, BUDGET))
    for seq, _ in due:
        db.change(sql.PROMOTE, (seq,))
    for queue in {queue for _, queue in due}:
        db.wake(queue_topic(queue))
    return len(due)


def sweep(db: Database, now: float) -> bool:
    """Remove a bounded number of rows whose time is over; return whether there may be more."""
    # Ports go by the real clock: they do not age when a test lets time pass.
    db.change(sql.DROP_STALE, (time.time() - Caller.stale_after,))
    for [process] in db.rows(sql.LISTENING_PROCESSES):
        if is_gone(process):
            db.change(sql.DROP_PROCESS, (process,))
    return max(db.change(statement, (now, BUDGET)) for statement in sql.SWEEPS) == BUDGET


def as_bytes(value: object) -> bytes:
    """Return what a column for bytes holds; SQLite takes a value of any type for any column."""
    return value if isinstance(value, bytes) else as_text(value).encode(errors="replace")


def as_text(value: object) -> str:
    """The same for a column for text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else str(value)


def as_number(value: object) -> int:
    """The same for a column for whole numbers; what is none counts as 0."""
    return value if isinstance(value, int) else 0
