"""Maintenance: delayed messages that fall due, lost consumers, and rows whose time is over.

Theory of operation. Any worker may do a round, and several may at once. A round reads first what
there is to do, without a transaction, so that a round with nothing to do keeps nobody from
writing. Its findings are only hints: inside the transaction each fact is looked at again
(`give_up` judges a consumer anew, `promote` selects by the time). So two rounds that see the same
thing do it once.

A round touches at most `BUDGET` rows of each kind. It may therefore leave work to the next round,
and keeps the facts for that: a fenced consumer stays in its table while it holds messages. A crash
in the middle undoes the whole round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from aiotaskq.contract.records import DeadLimits, Maintained
from aiotaskq.drivers.common.clock import SweepTimer
from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.dead_letters import SQLiteDeadLetterTrimmer
from aiotaskq.drivers.sqlite.lease import give_up, is_anybody_spared, note_look, take_back
from aiotaskq.drivers.sqlite.messages import BUDGET, as_text, as_time
from aiotaskq.drivers.sqlite.notify import SQLiteNotifier, queue_topic
from aiotaskq.drivers.sqlite.process_identity import is_gone

_SWEEP_EVERY = 10.0  # seconds


class SQLiteSweeper:
    """Removes rows whose time is over, from time to time, in transactions of its owner."""

    def __init__(self) -> None:
        self.timer = SweepTimer(_SWEEP_EVERY)

    def sweep_if_due(self, database: SQLiteDatabase, now: float) -> None:
        """Remove a bounded number of rows if it is time for that, inside a transaction."""
        if self.timer.is_due(now):
            self.timer.note(now, more=_sweep(database, now))


class SQLiteMaintenance:
    """The maintenance of one broker object; used in the thread of its connection.

    Args:
        now: Returns the time of the store.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._trimmer = SQLiteDeadLetterTrimmer()
        self.sweeper = SQLiteSweeper()

    def maintain(self, database: SQLiteDatabase, limits: DeadLimits) -> Maintained:
        """Do one round; see `Broker.maintain`."""
        now = self._now()
        gone = _gone(database)
        lapsed = [
            number
            for number, lease_until, process, fenced in database.rows(sql.ALL_CONSUMERS)
            if fenced or (as_time(lease_until) or 0.0) <= now or process in gone
        ]
        [(due_at, _)] = database.rows(sql.OUTLOOK)
        is_due = due_at is not None and due_at <= now
        trims = self._trimmer.is_due(database, limits, now)
        spared = is_anybody_spared(database)
        if not (lapsed or is_due or trims or spared or self.sweeper.timer.is_due(now)):
            return Maintained()
        # Relaxed: what a power cut undoes of this is done again.
        with database.write(relaxed=True):
            now = self._now()  # again: it may have waited long for the lock
            promoted = promote(database, now)
            reclaimed = _reclaim(database, lapsed, now, gone)
            if spared:
                note_look(database)
            trimmed = self._trimmer.trim(database, limits, now) if trims else 0
            self.sweeper.sweep_if_due(database, now)
        return Maintained(promoted=promoted, reclaimed=reclaimed, trimmed=trimmed)


def promote(database: SQLiteDatabase, now: float) -> int:
    """Move messages that have fallen due to the end of their queues; return their number.

    Of all queues, inside a transaction, at most `BUDGET` messages.
    """
    due = database.rows(sql.ALL_DUE, (now, BUDGET))
    due += database.rows(sql.ALL_TIMELESS, (BUDGET - len(due),))
    for seq, _ in due:
        database.change(sql.PROMOTE, (seq,))
    for queue in {as_text(queue) for _, queue in due}:
        database.notify(queue_topic(queue))
    return len(due)


def _sweep(database: SQLiteDatabase, now: float) -> bool:
    """Remove a bounded number of rows whose time is over; return whether there may be more."""
    # Ports go by the real clock: they do not age when a test lets time pass.
    database.change(sql.DROP_STALE_PORTS, (time.time() - SQLiteNotifier.stale_after,))
    database.change(sql.TAKE_BACK_STRAYS, (BUDGET,))
    database.renumber()  # after that, as it leaves messages alone that are held
    for [process] in database.rows(sql.LISTENING_PROCESSES):
        if is_gone(process):
            database.change(sql.DROP_PORTS_OF, (process,))
    return max(database.change(statement, (now, BUDGET)) for statement in sql.SWEEPS) == BUDGET


def _gone(database: SQLiteDatabase) -> set[str]:
    """Return the processes of consumers that are certainly dead."""
    return {process for [process] in database.rows(sql.ALL_PROCESSES) if is_gone(process)}


def _reclaim(database: SQLiteDatabase, lapsed: list[int], now: float, gone: Collection[str]) -> int:
    reclaimed = 0
    for number in lapsed:
        if not give_up(database, number, now, gone):
            continue
        reclaimed += take_back(database, number, BUDGET - reclaimed)
        if reclaimed == BUDGET:
            break  # the next round goes on with this consumer
    return reclaimed
