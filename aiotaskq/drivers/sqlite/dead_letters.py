"""Dead letters: read, revived, discarded and trimmed. The key of one is its number in the table.

All functions run in the thread of a connection.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DeadLetter, DeadLimits
from aiotaskq.drivers.common.dead_letter_counts import DeadLetterCount
from aiotaskq.drivers.common.dead_letter_keys import number_of_key
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.messages import (
    BUDGET,
    add,
    as_bytes,
    as_number,
    as_text,
    as_time,
    claim_again,
)

_NEVER = float("-inf")


def read(database: SQLiteDatabase, queue: str, limit: int, before: int) -> list[DeadLetter]:
    """Return dead letters of a queue with a number below `before`, the newest first."""
    return [
        DeadLetter(
            key=str(seq),
            id=as_text(name),
            queue=queue,
            body=as_bytes(body),
            reason=as_text(reason),
            crashes=as_number(crashes),
            died_at=as_time(died_at) or 0.0,
            details=as_bytes(details),
        )
        for seq, name, queue, body, reason, crashes, died_at, details in database.rows(
            sql.NEWEST_DEAD, (queue, before, limit)
        )
    ]


def revive(
    database: SQLiteDatabase, queue: str, letters: Sequence[tuple[str, Envelope]], now: float
) -> list[str]:
    """Store envelopes in place of dead letters, inside a transaction; return the missing keys."""
    missing, found = [], []
    for key, envelope in letters:
        number = number_of_key(key)
        if number is None or database.change(sql.TAKE_DEAD, (number, queue)) == 0:
            missing.append(key)
            continue
        database.change(sql.LIFT_CANCEL, (envelope.id,))
        if envelope.unique:
            claim_again(database, envelope.id, now)
        found.append(envelope)
    add(database, found, now)
    return missing


def discard(database: SQLiteDatabase, queue: str, keys: Collection[str]) -> int:
    """Drop dead letters; return the number of those that existed."""
    numbers = [number for key in keys if (number := number_of_key(key)) is not None]
    with database.write():
        return database.change(sql.DISCARD, (json.dumps(numbers), queue))


class SQLiteDeadLetterTrimmer:
    """Drops the oldest dead letters beyond some limits, in small steps."""

    def __init__(self) -> None:
        self._count = DeadLetterCount()

    def is_due(self, database: SQLiteDatabase, limits: DeadLimits, now: float) -> bool:
        """Return whether there may be something to drop; needs no transaction."""
        newest, outdated = self._outlook(database, limits, now)
        if outdated:
            return True
        if not self._count.is_due(newest, limits.most):
            return False
        if database.rows(sql.COUNT_DEAD, (limits.most,)):
            return True
        self._count.note(newest, limits.most)
        return False

    def trim(self, database: SQLiteDatabase, limits: DeadLimits, now: float) -> int:
        """Drop a bounded number of dead letters, inside a transaction; return the number."""
        dropped = 0
        if limits.age is not None:
            dropped = database.change(sql.TRIM_OLD, (now - limits.age, BUDGET))
        for queue, count in database.rows(sql.COUNT_DEAD, (limits.most,)):
            excess = min(count - limits.most, BUDGET - dropped)
            dropped += database.change(sql.TRIM_QUEUE, (queue, excess))
        return dropped

    def _outlook(
        self, database: SQLiteDatabase, limits: DeadLimits, now: float
    ) -> tuple[int | None, bool]:
        edge = _NEVER if limits.age is None else now - limits.age
        [(newest, outdated)] = database.rows(sql.DEAD_OUTLOOK, (edge,))
        return newest, bool(outdated)
