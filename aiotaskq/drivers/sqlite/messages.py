"""What broker and consumers both do to the table of messages, inside a transaction of theirs."""

from __future__ import annotations

import time
from collections.abc import Iterable

from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.caller import Caller
from aiotaskq.drivers.sqlite.database import Database
from aiotaskq.drivers.sqlite.process import is_gone
from aiotaskq.drivers.sqlite.wakeups import queue_topic
from aiotaskq.message import Envelope

BUDGET = 1000
"""Rows that one step of housekeeping touches at most, so that no transaction takes long."""


def add(db: Database, batch: Iterable[Envelope], now: float) -> None:
    """Store envelopes at the end of the line, and wake who waits for them."""
    rows = []
    queues = set()
    for one in batch:
        due_at = one.not_before if one.not_before is not None and one.not_before > now else None
        rows.append((one.id, one.queue, one.priority, due_at, one.expires_at, one.body))
        # Delayed ones too: a waiter has to know until when it may sleep.
        queues.add(one.queue)
    db.change_many(sql.ADD_MESSAGE, rows)
    for queue in queues:
        db.wake(queue_topic(queue))


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
