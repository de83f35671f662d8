"""Leases of consumers: signs of life, and giving up a consumer that shows none.

Theory of operation. A consumer is a row with the end of its lease. It is *alive* until some
process *fences* it: because its process is gone, because its lease ran out, or because `end` was
called for it. Fencing is one transaction, and it is final: number and id of a row never come
back, and a fenced consumer can neither fetch nor settle nor renew. *Invariant: messages are taken
back only from a fenced consumer.* Taking back may need several transactions; the fenced row goes
with the last message.

Leases go by the wall clock, as processes share no other clock. When that clock is set forward, or
when one process keeps the file locked for long, every lease runs out at once, and no consumer is
to blame. Such a silence is recognised by the fact that nobody at all gave a sign of life
(`is_stall`). Then each consumer whose process certainly lives is *spared*: it gets another lease.
That happens once until the next sign of life of any consumer, or until another silence before
that: when nobody even looked in the meantime, the clock jumped or the machine slept again. So a
consumer that hangs while its process lives is given up one lease later.

The table ``meta`` holds for this:

================  =================================================================
`beat`            Unix time of the last sign of life of any consumer
`spared`          the value of `beat` after which all consumers were spared
`seen`            Unix time of the last look at the leases since then
`lease:<number>`  seconds of a consumer's lease
================  =================================================================

All of this is read and written inside transactions, so a crash leaves one state or the next. The
functions below run in the thread of a connection, inside a transaction of the caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from functools import partial

from aiotaskq.contract.records import Grant
from aiotaskq.drivers.common.clock import is_stall
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.connection import SQLiteConnection
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.messages import BUDGET, as_text, as_time
from aiotaskq.drivers.sqlite.notify import queue_topic
from aiotaskq.drivers.sqlite.process_identity import is_alive

_BEAT = "beat"
_SPARED = "spared"
_SEEN = "seen"


class SQLiteLease:
    """The lease of one consumer; see `aiotaskq.contract.broker.Lease`.

    Args:
        connection: A connection that nobody else uses, with a thread of its own.
        now: Returns the time of the store.
        grant: The lease.
    """

    def __init__(
        self, connection: SQLiteConnection, now: Callable[[], float], grant: Grant
    ) -> None:
        self._connection = connection
        self._now = now
        self._grant = grant

    async def renew(self) -> bool:
        await self._connection.open()
        return await self._connection.run(self._renew)

    async def end(self, note: str) -> int:
        await self._connection.open()
        return await self._connection.run(partial(self._end, note=note))

    async def close(self) -> None:
        await self._connection.close()

    # --- in the thread ---

    def _renew(self, database: SQLiteDatabase) -> bool:
        with database.write(relaxed=True):
            # The time after the lock was obtained, which may have taken long.
            now, number = self._now(), self._number(database)
            if number is None:
                return False
            database.change(sql.RENEW, (now + self._grant.seconds, number))
            note_beat(database, number, self._grant.seconds, now)
            return True

    def _end(self, database: SQLiteDatabase, note: str) -> int:
        # Relaxed: after a power cut its process is gone, and others notice that.
        with database.write(relaxed=True):
            number = self._number(database)
            if number is None:
                return 0
            _fence(database, number, note)
            return take_back(database, number, BUDGET)

    def _number(self, database: SQLiteDatabase) -> int | None:
        """Return the number of the consumer's row, or None if its lease has ended."""
        rows = database.rows(sql.NUMBER_OF, (self._grant.consumer,))
        return rows[0][0] if rows else None


def note_beat(database: SQLiteDatabase, number: int, lease: float, now: float) -> None:
    """Note that a consumer lives. The first one after a silence speaks for all."""
    if _is_silence(database, lease):
        _spare(database, now)
    # By the real clock: time that a test lets pass is no silence.
    database.change(sql.WRITE_META, (_BEAT, repr(time.time())))
    database.change(sql.WRITE_META, (_key(number), repr(lease)))


def give_up(database: SQLiteDatabase, number: int, now: float, gone: Collection[str]) -> bool:
    """Fence a consumer if it is dead or its lease ran out; return False if it stays alive.

    The processes in `gone` are known to be dead.
    """
    rows = database.rows(sql.JUDGED, (number,))
    if not rows:
        return False
    [(name, stored_until, process, fenced)] = rows
    name, lease_until = as_text(name), as_time(stored_until) or 0.0
    if fenced:
        return True
    if process in gone:
        _fence(database, number, f"{name}: its process is gone")
        return True
    # The lease may have been renewed since the caller saw it.
    if lease_until > now or _is_spared(database, number, process, now):
        return False
    _fence(database, number, f"{name}: its lease ran out")
    return True


def is_anybody_spared(database: SQLiteDatabase) -> bool:
    """Return whether consumers were spared and none has given a sign of life since."""
    beat = _number(database, _BEAT)
    return beat is not None and beat == _number(database, _SPARED)


def note_look(database: SQLiteDatabase) -> None:
    """Note a look at the leases, which shows that there was no other silence until now."""
    database.change(sql.WRITE_META, (_SEEN, repr(time.time())))


def take_back(database: SQLiteDatabase, number: int, limit: int) -> int:
    """Take messages back from a fenced consumer, counting the crash; return their number.

    If that number is the limit, there may be more, and the consumer stays. Otherwise it is removed.
    """
    held = database.rows(sql.HELD_BY, (number, limit))
    for seq, queue, cancelled in held:
        if cancelled:
            database.change(sql.FORGET_SEQ, (seq,))
        else:
            database.change(sql.TAKE_BACK, (seq,))
            database.notify(queue_topic(as_text(queue)))
    if len(held) < limit:
        remove(database, number)
    return len(held)


def remove(database: SQLiteDatabase, number: int) -> None:
    """Remove a consumer that holds nothing any more."""
    database.change(sql.REMOVE_CONSUMER, (number,))
    database.change(sql.FORGET_META, (_key(number),))


def _fence(database: SQLiteDatabase, number: int, note: str) -> None:
    """Keep a consumer from any further action; the note tells people how it died."""
    note = note.encode(errors="backslashreplace").decode()
    database.change(sql.FENCE, (note, number))


def _is_spared(database: SQLiteDatabase, number: int, process: str | None, now: float) -> bool:
    lease = _number(database, _key(number))
    if lease is None or not is_alive(process) or not _is_silence(database, lease):
        return False
    _spare(database, now)
    return True


def _is_silence(database: SQLiteDatabase, lease: float) -> bool:
    since = _number(database, _SEEN if is_anybody_spared(database) else _BEAT)
    return since is not None and is_stall(time.time() - since, lease)


def _spare(database: SQLiteDatabase, now: float) -> None:
    for number, process, lease in database.rows(sql.SPARABLE):
        if is_alive(process):
            database.change(sql.SPARE, (now + (_finite(lease) or 0.0), number))
    database.change(sql.WRITE_META, (_SPARED, repr(_number(database, _BEAT))))
    note_look(database)


def _number(database: SQLiteDatabase, key: str) -> float | None:
    rows = database.rows(sql.READ_META, (key,))
    return _finite(rows[0][0]) if rows else None


def _finite(value: object) -> float | None:
    """Return a stored number; None for what another program wrote that is none."""
    try:
        number = float(value)  # type: ignore[arg-type]  # of any type
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _key(number: int) -> str:
    return f"lease:{number}"
