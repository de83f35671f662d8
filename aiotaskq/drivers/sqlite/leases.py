"""Signs of life, and who is given up for want of them: inside a transaction of the caller's.

Leases go by the clock on the wall, since processes share no other. When it is set forward, or
when one holds the file for long, every lease runs out at once, and nobody is to blame. What
tells such a silence is that nobody at all gave a sign of life. Whose process can be seen to
live is spared then: it gets another lease, but once only until anybody gives a sign of life, or
there is another silence before that.

In the table `meta`:

================  ===============================================================
`beat`            when anybody last gave a sign of life, Unix time
`spared`          the beat after which everybody was spared
`seen`            when anybody last looked since then, Unix time
`lease:<number>`  seconds of the consumer's lease
================  ===============================================================
"""

from __future__ import annotations

import time
from collections.abc import Collection

from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.database import Database
from aiotaskq.drivers.sqlite.process import is_alive
from aiotaskq.drivers.sqlite.wakeups import queue_topic

_BEAT = "beat"
_SPARED = "spared"
_SEEN = "seen"


def note_beat(db: Database, number: int, lease: float, now: float) -> None:
    """Note that a consumer lives; the first one after a silence speaks for all."""
    if _is_silence(db, lease):
        _spare(db, now)
    # By the real clock: that a test lets time pass is no silence.
    db.change(sql.WRITE_META, (_BEAT, repr(time.time())))
    db.change(sql.WRITE_META, (_key(number), repr(lease)))


def give_up(db: Database, number: int, now: float, gone: Collection[str]) -> bool:
    """Fence a consumer off: it can neither fetch nor settle nor renew; False if it lives.

    Of the processes in `gone` it is known that they are dead.
    """
    rows = db.rows(sql.JUDGED, (number,))
    if not rows:
        return False
    [(name, lease_until, process, fenced)] = rows
    if fenced:
        return True
    if process in gone:
        fence(db, number, f"{name}: its process is gone")
        return True
    # The lease may have been renewed since it was looked at.
    if lease_until > now or _is_spared(db, number, process, now):
        return False
    fence(db, number, f"{name}: its lease ran out")
    return True


def is_anybody_spared(db: Database) -> bool:
    """Tell whether those who were spared have yet to give a sign of life."""
    beat = _number(db, _BEAT)
    return beat is not None and beat == _number(db, _SPARED)


def note_look(db: Database) -> None:
    """Note that somebody looked, so that there was no other silence."""
    db.change(sql.WRITE_META, (_SEEN, repr(time.time())))


def fence(db: Database, number: int, note: str) -> None:
    """Keep a consumer from doing anything more; the note tells people how it died."""
    db.change(sql.FENCE, (note, number))


def take_back(db: Database, number: int, limit: int) -> int:
    """Take back what a fenced consumer held, counting the crash; return how many.

    If that is the limit, there may be more, and the consumer stays. Else it is forgotten.
    """
    held = db.rows(sql.HELD_BY, (number, limit))
    for seq, queue, cancelled in held:
        if cancelled:
            db.change(sql.FORGET_SEQ, (seq,))
        else:
            db.change(sql.TAKE_BACK, (seq,))
            db.wake(queue_topic(queue))
    if len(held) < limit:
        remove(db, number)
    return len(held)


def remove(db: Database, number: int) -> None:
    """Forget a consumer that holds nothing any more."""
    db.change(sql.REMOVE_CONSUMER, (number,))
    db.change(sql.FORGET_META, (_key(number),))


def _is_spared(db: Database, number: int, process: str | None, now: float) -> bool:
    lease = _number(db, _key(number))
    if lease is None or not is_alive(process) or not _is_silence(db, lease):
        return False
    _spare(db, now)
    return True


def _is_silence(db: Database, lease: float) -> bool:
    since = _number(db, _SEEN if is_anybody_spared(db) else _BEAT)
    return since is not None and time.time() - since > lease / 2


def _spare(db: Database, now: float) -> None:
    for number, process, lease in db.rows(sql.SPARABLE):
        if is_alive(process):
            db.change(sql.SPARE, (now + float(lease), number))
    db.change(sql.WRITE_META, (_SPARED, repr(_number(db, _BEAT))))
    note_look(db)


def _number(db: Database, key: str) -> float | None:
    rows = db.rows(sql.READ_META, (key,))
    return float(rows[0][0]) if rows else None


def _key(number: int) -> str:
    return f"lease:{number}"
