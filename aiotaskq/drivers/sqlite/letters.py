"""Dead letters: read, revived, discarded, trimmed. The key of one is its number in the table."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DeadLetter, DeadLimits
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.database import Database
from aiotaskq.drivers.sqlite.messages import (
    BUDGET,
    add,
    as_bytes,
    as_number,
    as_text,
    claim_anyhow,
)
from aiotaskq.errors import ConfigError

_LAST = 2**63 - 1  # the largest number that SQLite has
_NEVER = float("-inf")


def read(db: Database, queue: str, limit: int, before: str | None) -> list[DeadLetter]:
    """Return letters of a queue, the newest first, older ones than `before` if that is given.

    Raises:
        ConfigError: That is no key.
    """
    edge = _LAST if before is None else _number(before)
    if edge is None:
        raise ConfigError(f"{before!r} is no key of a dead letter: take one of those listed")
    return [
        DeadLetter(
            key=str(seq),
            id=as_text(name),
            queue=queue,
            body=as_bytes(body),
            reason=reason,
            crashes=as_number(crashes),
            died_at=died_at,
            details=details,
        )
        for seq, name, queue, body, reason, crashes, died_at, details in db.rows(
            sql.NEWEST_DEAD, (queue, edge, limit)
        )
    ]


def revive(
    db: Database, queue: str, letters: Sequence[tuple[str, Envelope]], now: float
) -> list[str]:
    """Store envelopes in place of letters, inside a transaction; return the keys not found."""
    absent, found = [], []
    for key, envelope in letters:
        number = _number(key)
        if number is None or db.change(sql.TAKE_DEAD, (number, queue)) == 0:
            absent.append(key)
            continue
        db.change(sql.LIFT_CANCEL, (envelope.id,))
        if envelope.unique:
            claim_anyhow(db, envelope.id, now)
        found.append(envelope)
    add(db, found, now)
    return absent


def discard(db: Database, queue: str, keys: Collection[str]) -> int:
    """Drop letters; return how many there were."""
    numbers = [number for key in keys if (number := _number(key)) is not None]
    with db.write():
        return db.change(sql.DISCARD, (json.dumps(numbers), queue))


class Trimmer:
    """Drops the oldest letters beyond some limits, in small steps.

    Counting takes a look at every letter. So it is done only where there is a new one since
    the count that found nothing to drop.
    """

    def __init__(self) -> None:
        self._counted: tuple[int | None, int] = (None, -1)  # the newest letter then, and `most`

    def is_due(self, db: Database, limits: DeadLimits, now: float) -> bool:
        """Look whether there may be something to drop."""
        newest, outdated = self._outlook(db, limits, now)
        if outdated:
            return True
        if newest is None or self._counted == (newest, limits.most):
            return False
        if db.rows(sql.COUNT_DEAD, (limits.most,)):
            return True
        self._counted = newest, limits.most
        return False

    def trim(self, db: Database, limits: DeadLimits, now: float) -> int:
        """Drop a bounded number of letters, inside a transaction; return how many."""
        dropped = 0
        if limits.age is not None:
            dropped = db.change(sql.TRIM_OLD, (now - limits.age, BUDGET))
        for queue, count in db.rows(sql.COUNT_DEAD, (limits.most,)):
            excess = min(count - limits.most, BUDGET - dropped)
            dropped += db.change(sql.TRIM_QUEUE, (queue, excess))
        return dropped

    def _outlook(self, db: Database, limits: DeadLimits, now: float) -> tuple[int | None, bool]:
        edge = _NEVER if limits.age is None else now - limits.age
        [(newest, outdated)] = db.rows(sql.DEAD_OUTLOOK, (edge,))
        return newest, bool(outdated)


def _number(key: str) -> int | None:
    """Return the number that a key is, or None if it is none."""
    if not (key.isascii() and key.isdigit()) or len(key) > len(str(_LAST)):
        return None
    return min(int(key), _LAST)
