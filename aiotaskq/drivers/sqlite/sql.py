"""The tables, and every statement that runs on them.

``~name`` stands for the table ``<prefix>_name``, quoted.

A message is in one of four states. Each state has a partial index of its own, so that no state
slows down another:

=======  ==============================  =================================================
ready    no consumer, no `due_at`        index `ready`: in the order of fetching
suspect  the same, crashed twice         index `suspects`: the same; is handed out alone
delayed  no consumer, a `due_at`         index `delayed`: by due time
held     a consumer and a `token`        index `held`: by consumer
=======  ==============================  =================================================

`seq` is the place in the queue. A held message keeps its place, so a message that comes back is at
the head again: everything that was behind it still is. A delayed message moves to the end of its
queue when it falls due.
"""

from __future__ import annotations

from aiotaskq.drivers.common.rows import OUTCOME_COLUMNS
from aiotaskq.drivers.sqlite.spoilt_keys import LAST_KEY

VERSION = 3
"""The version of the tables below. A file of a later version is refused."""

_READY = """
    CREATE INDEX ~messages_ready ON ~messages (queue, priority DESC, seq)
    WHERE consumer IS NULL AND due_at IS NULL AND crashes < 2
"""
# The 2 is `contract.message.SUSPECT`. SQLite uses a partial index only for a query with the same
# condition, word for word.
_SUSPECTS = """
    CREATE INDEX ~messages_suspects ON ~messages (queue, priority DESC, seq)
    WHERE consumer IS NULL AND due_at IS NULL AND crashes >= 2
"""
_CONSUMERS_BY_ID = "CREATE INDEX ~consumers_id ON ~consumers (id)"
_DEAD_BY_AGE = "CREATE INDEX ~dead_died ON ~dead (died_at)"
_CANCELLED = "CREATE TABLE ~cancelled (id TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID"
_CANCELLED_UNTIL = "CREATE INDEX ~cancelled_until ON ~cancelled (until)"
_SCHEDULES = """
    CREATE TABLE ~schedules (
        id TEXT NOT NULL PRIMARY KEY,
        revision TEXT NOT NULL,
        due_at REAL,
        body BLOB NOT NULL
    )
"""
_SCHEDULES_DUE = """
    CREATE INDEX ~schedules_due ON ~schedules (due_at, id) WHERE due_at IS NOT NULL
"""

SCHEMA = (
    """
    CREATE TABLE ~meta (
        key TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) WITHOUT ROWID
    """,
    # The large column comes last: SQLite reads a row up to the last column that is selected.
    """
    CREATE TABLE ~messages (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        queue TEXT NOT NULL,
        priority INTEGER NOT NULL,
        due_at REAL,
        expires_at REAL,
        consumer INTEGER,
        token INTEGER,
        cancelled INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0,
        crash_note TEXT NOT NULL DEFAULT '',
        body BLOB NOT NULL
    )
    """,
    _READY,
    _SUSPECTS,
    "CREATE INDEX ~messages_delayed ON ~messages (due_at, seq, queue) WHERE due_at IS NOT NULL",
    """
    CREATE INDEX ~messages_held ON ~messages (consumer, cancelled, queue)
    WHERE consumer IS NOT NULL
    """,
    "CREATE INDEX ~messages_id ON ~messages (id)",
    # AUTOINCREMENT: the number of a fenced consumer never comes back.
    """
    CREATE TABLE ~consumers (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL,
        name TEXT NOT NULL,
        queues TEXT NOT NULL,
        lease_until REAL NOT NULL,
        fenced INTEGER NOT NULL DEFAULT 0,
        process TEXT,
        about BLOB NOT NULL DEFAULT x'',
        crash_note TEXT NOT NULL DEFAULT ''
    )
    """,
    _CONSUMERS_BY_ID,
    """
    CREATE TABLE ~dead (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL,
        queue TEXT NOT NULL,
        priority INTEGER NOT NULL,
        reason TEXT NOT NULL,
        crashes INTEGER NOT NULL,
        died_at REAL NOT NULL,
        body BLOB NOT NULL,
        details BLOB NOT NULL DEFAULT x''
    )
    """,
    "CREATE INDEX ~dead_queue ON ~dead (queue, seq)",
    _DEAD_BY_AGE,
    _CANCELLED,
    _CANCELLED_UNTIL,
    "CREATE TABLE ~recent (id TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX ~recent_until ON ~recent (until)",
    """
    CREATE TABLE ~calls (
        call_id TEXT PRIMARY KEY,
        until REAL NOT NULL,
        stored TEXT NOT NULL,
        refused TEXT NOT NULL
    )
    """,
    "CREATE INDEX ~calls_until ON ~calls (until)",
    """
    CREATE TABLE ~wakeups (
        topic TEXT NOT NULL,
        network TEXT NOT NULL,
        port INTEGER NOT NULL,
        refreshed_at REAL NOT NULL,
        process TEXT,
        PRIMARY KEY (topic, network, port)
    ) WITHOUT ROWID
    """,
    # AUTOINCREMENT: `subscribe` reads on from the last number that it saw, which must not come
    # back.
    """
    CREATE TABLE ~results (
        arrival INTEGER PRIMARY KEY AUTOINCREMENT,
        task_id TEXT NOT NULL UNIQUE,
        status TEXT NOT NULL,
        result,
        date_done TEXT,
        traceback TEXT,
        children TEXT NOT NULL,
        name TEXT,
        args,
        kwargs,
        worker TEXT,
        retries INTEGER NOT NULL,
        queue TEXT,
        execution_time REAL,
        expires_at REAL,
        history TEXT
    )
    """,
    "CREATE INDEX ~results_expires ON ~results (expires_at) WHERE expires_at IS NOT NULL",
    _SCHEDULES,
    _SCHEDULES_DUE,
)

MIGRATIONS = {
    1: (
        "ALTER TABLE ~messages ADD COLUMN crash_note TEXT NOT NULL DEFAULT ''",
        "DROP INDEX ~messages_ready",
        _READY,
        _SUSPECTS,
        "ALTER TABLE ~consumers ADD COLUMN about BLOB NOT NULL DEFAULT x''",
        "ALTER TABLE ~consumers ADD COLUMN crash_note TEXT NOT NULL DEFAULT ''",
        _CONSUMERS_BY_ID,
        "ALTER TABLE ~dead ADD COLUMN details BLOB NOT NULL DEFAULT x''",
        _DEAD_BY_AGE,
        _CANCELLED,
        _CANCELLED_UNTIL,
        "ALTER TABLE ~results ADD COLUMN history TEXT",
    ),
    2: (_SCHEDULES, _SCHEDULES_DUE),
}
"""The statements that lead from a version to the next one."""

HAS_TABLE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
READ_VERSION = "SELECT value FROM ~meta WHERE key = 'schema'"
WRITE_VERSION = """
    INSERT INTO ~meta (key, value) VALUES ('schema', ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value
"""

# --- publish ---

ADD_MESSAGE = """
    INSERT INTO ~messages (id, queue, priority, due_at, expires_at, body)
    VALUES (?, ?, ?, ?, ?, ?)
"""
# Changes a row only if the id is new or its time is over.
CLAIM_ID = """
    INSERT INTO ~recent (id, until) VALUES (:id, :until)
    ON CONFLICT (id) DO UPDATE SET until = excluded.until WHERE until <= :now
"""
CLAIM_AGAIN = "INSERT OR REPLACE INTO ~recent (id, until) VALUES (?, ?)"
# One row in any case. Where no id is cancelled, nothing more is done about cancelled ids.
READ_CALL = """
    SELECT
        EXISTS (SELECT 1 FROM ~cancelled),
        (SELECT stored FROM ~calls WHERE call_id = :call AND until > :now),
        (SELECT refused FROM ~calls WHERE call_id = :call AND until > :now)
"""
CANCELLED_AMONG = """
    SELECT value FROM json_each(?)
    WHERE EXISTS (SELECT 1 FROM ~cancelled WHERE id = value)
"""
WRITE_CALL = """
    INSERT OR REPLACE INTO ~calls (call_id, until, stored, refused) VALUES (?, ?, ?, ?)
"""

# --- fetch ---

NEXT_READY = """
    SELECT seq, id, crashes, priority, body, expires_at, crash_note FROM ~messages
    WHERE queue = ? AND consumer IS NULL AND due_at IS NULL AND crashes < 2
    ORDER BY priority DESC, seq
    LIMIT ?
"""
NEXT_SUSPECT = """
    SELECT seq, id, crashes, priority, body, expires_at, crash_note FROM ~messages
    WHERE queue = ? AND consumer IS NULL AND due_at IS NULL AND crashes >= 2
    ORDER BY priority DESC, seq
    LIMIT 1
"""
ANY_READY = """
    SELECT 1 FROM ~messages
    WHERE queue = ? AND consumer IS NULL AND due_at IS NULL AND crashes < 2
    LIMIT 1
"""
ANY_SUSPECT = """
    SELECT 1 FROM ~messages
    WHERE queue = ? AND consumer IS NULL AND due_at IS NULL AND crashes >= 2
    LIMIT 1
"""
HOLDS_ANY = "SELECT 1 FROM ~messages WHERE consumer = ? LIMIT 1"
# The next due time of all queues, or 0 if there is one that is no time; and whether any queue has
# suspects.
OUTLOOK = """
    SELECT
        CASE WHEN EXISTS (SELECT 1 FROM ~messages WHERE due_at >= '') THEN 0.0 ELSE (
            SELECT due_at FROM ~messages WHERE due_at IS NOT NULL ORDER BY due_at LIMIT 1) END,
        EXISTS (
            SELECT 1 FROM ~messages INDEXED BY ~messages_suspects
            WHERE consumer IS NULL AND due_at IS NULL AND crashes >= 2)
"""
ALL_DUE = "SELECT seq, queue FROM ~messages WHERE due_at <= ? ORDER BY due_at, seq LIMIT ?"
# Those whose due time is no time. SQLite sorts text and bytes behind all numbers.
ALL_TIMELESS = "SELECT seq, queue FROM ~messages WHERE due_at >= '' LIMIT ?"
# A message keeps its place where there is no sound key to follow, or only the last one.
PROMOTE = f"""
    UPDATE ~messages SET due_at = NULL, seq = coalesce((
        SELECT nullif(max(seq) + 1, {LAST_KEY}) FROM ~messages WHERE seq < {LAST_KEY}), seq)
    WHERE seq = ?
"""
HOLD = "UPDATE ~messages SET consumer = ?, token = ? WHERE seq = ?"

# --- settle: a receipt is (seq, consumer, token) ---

FORGET = "DELETE FROM ~messages WHERE seq = ? AND consumer = ? AND token = ?"
FORGET_CANCELLED = """
    DELETE FROM ~messages WHERE seq = ? AND consumer = ? AND token = ? AND cancelled = 1
"""
# With (new id, new id, receipt): whether an envelope may be stored in place of the held message.
MAY_FOLLOW = """
    SELECT NOT (cancelled = 1 AND id = ?) AND NOT EXISTS (SELECT 1 FROM ~cancelled WHERE id = ?)
    FROM ~messages WHERE seq = ? AND consumer = ? AND token = ?
"""
GIVE_BACK = """
    UPDATE ~messages SET consumer = NULL, token = NULL
    WHERE seq = ? AND consumer = ? AND token = ?
"""
BURY = """
    INSERT INTO ~dead (id, queue, priority, reason, crashes, died_at, details, body)
    SELECT id, queue, priority, ?, crashes, ?, ?, body FROM ~messages
    WHERE seq = ? AND consumer = ? AND token = ?
"""

# --- consumers ---

ADD_CONSUMER = """
    INSERT INTO ~consumers (id, name, queues, lease_until, process, about)
    VALUES (?, ?, ?, ?, ?, ?)
"""
# With (number, id): in a file that replaced another one, its number may be that of a stranger.
IS_ALIVE = "SELECT 1 FROM ~consumers WHERE number = ? AND id = ? AND fenced = 0"
NUMBER_OF = "SELECT number FROM ~consumers WHERE id = ? AND fenced = 0"
RENEW = "UPDATE ~consumers SET lease_until = ? WHERE number = ?"
REMOVE_CONSUMER = "DELETE FROM ~consumers WHERE number = ?"
ALL_CONSUMERS = "SELECT number, lease_until, process, fenced FROM ~consumers"
LIVING = "SELECT id, queues, about FROM ~consumers WHERE fenced = 0 AND lease_until > ?"
ALL_PROCESSES = "SELECT DISTINCT process FROM ~consumers WHERE process IS NOT NULL"
JUDGED = "SELECT name, lease_until, process, fenced FROM ~consumers WHERE number = ?"
FENCE = "UPDATE ~consumers SET fenced = 1, crash_note = ? WHERE number = ?"
READ_META = "SELECT value FROM ~meta WHERE key = ?"
WRITE_META = """
    INSERT INTO ~meta (key, value) VALUES (?, ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value
"""
ADD_META = "INSERT OR IGNORE INTO ~meta (key, value) VALUES (?, ?)"
FORGET_META = "DELETE FROM ~meta WHERE key = ?"
SPARABLE = """
    SELECT number, process, value FROM ~consumers JOIN ~meta ON key = 'lease:' || number
    WHERE fenced = 0
"""
SPARE = "UPDATE ~consumers SET lease_until = max(lease_until, ?) WHERE number = ?"
CANCELLED_OF = "SELECT seq, token, id FROM ~messages WHERE consumer = ? AND cancelled = 1"
FORGET_CANCELLED_OF = "DELETE FROM ~messages WHERE consumer = ? AND cancelled = 1"
GIVE_BACK_ALL = "UPDATE ~messages SET consumer = NULL, token = NULL WHERE consumer = ?"

# --- maintain ---

HELD_BY = "SELECT seq, queue, cancelled FROM ~messages WHERE consumer = ? LIMIT ?"
FORGET_SEQ = "DELETE FROM ~messages WHERE seq = ?"
TAKE_BACK = """
    UPDATE ~messages SET
        consumer = NULL, token = NULL,
        crashes = max(min(CAST(crashes AS INTEGER), 1000000000), 0) + 1,
        crash_note = (SELECT crash_note FROM ~consumers WHERE number = ~messages.consumer)
    WHERE seq = ?
"""
# Messages whose holder does not exist, and never did: every holder has a row while it holds any.
TAKE_BACK_STRAYS = """
    UPDATE ~messages SET
        consumer = NULL, token = NULL,
        crashes = max(min(CAST(crashes AS INTEGER), 1000000000), 0) + 1,
        crash_note = 'its holder does not exist'
    WHERE seq IN (
        SELECT seq FROM ~messages WHERE consumer IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM ~consumers WHERE number = ~messages.consumer)
        LIMIT ?)
"""
# Each with (now, limit).
SWEEPS = (
    "DELETE FROM ~recent WHERE id IN (SELECT id FROM ~recent WHERE until <= ? LIMIT ?)",
    "DELETE FROM ~calls WHERE rowid IN (SELECT rowid FROM ~calls WHERE until <= ? LIMIT ?)",
    "DELETE FROM ~cancelled WHERE id IN (SELECT id FROM ~cancelled WHERE until <= ? LIMIT ?)",
    """
    DELETE FROM ~results WHERE arrival IN (
        SELECT arrival FROM ~results WHERE expires_at <= ? LIMIT ?)
    """,
)

# --- cancel, depth, purge, dead letters ---

CANCEL_WAITING = """
    DELETE FROM ~messages WHERE id IN (SELECT value FROM json_each(?)) AND consumer IS NULL
"""
CANCEL_HELD = """
    UPDATE ~messages SET cancelled = 1
    WHERE id IN (SELECT value FROM json_each(?)) AND consumer IS NOT NULL
"""
HELD_AMONG = """
    SELECT DISTINCT id FROM ~messages
    WHERE id IN (SELECT value FROM json_each(?)) AND consumer IS NOT NULL AND cancelled = 0
"""
REMEMBER_CANCEL = """
    INSERT OR REPLACE INTO ~cancelled (id, until) SELECT value, ? FROM json_each(?)
"""
LIFT_CANCEL = "DELETE FROM ~cancelled WHERE id = ?"
# Each with (now,).
DEPTHS = {
    "ready": """
        SELECT queue, sum(n) FROM (
            SELECT queue, count(*) AS n FROM ~messages
            WHERE consumer IS NULL AND due_at IS NULL AND crashes < 2 GROUP BY queue
            UNION ALL
            SELECT queue, count(*) FROM ~messages
            WHERE consumer IS NULL AND due_at IS NULL AND crashes >= 2 GROUP BY queue
            UNION ALL
            SELECT queue, count(*) FROM ~messages WHERE due_at <= :now GROUP BY queue
        ) GROUP BY queue
    """,
    "delayed": "SELECT queue, count(*) FROM ~messages WHERE due_at > :now GROUP BY queue",
    "held": "SELECT queue, count(*) FROM ~messages WHERE consumer IS NOT NULL GROUP BY queue",
    "dead": "SELECT queue, count(*) FROM ~dead GROUP BY queue",
}
# Each with (queue, limit).
PURGES = (
    """
    DELETE FROM ~messages WHERE seq IN (
        SELECT seq FROM ~messages
        WHERE queue = ? AND consumer IS NULL AND due_at IS NULL AND crashes < 2 LIMIT ?)
    """,
    """
    DELETE FROM ~messages WHERE seq IN (
        SELECT seq FROM ~messages
        WHERE queue = ? AND consumer IS NULL AND due_at IS NULL AND crashes >= 2 LIMIT ?)
    """,
    """
    DELETE FROM ~messages WHERE seq IN (
        SELECT seq FROM ~messages WHERE due_at IS NOT NULL AND queue = ? LIMIT ?)
    """,
)
NEWEST_DEAD = """
    SELECT seq, id, queue, body, reason, crashes, died_at, details FROM ~dead
    WHERE queue = ? AND seq < ? ORDER BY seq DESC LIMIT ?
"""
TAKE_DEAD = "DELETE FROM ~dead WHERE seq = ? AND queue = ?"
DISCARD = "DELETE FROM ~dead WHERE seq IN (SELECT value FROM json_each(?)) AND queue = ?"
# With (a time): the newest dead letter, and whether there is one of that time or before.
DEAD_OUTLOOK = (
    "SELECT (SELECT max(seq) FROM ~dead), EXISTS (SELECT 1 FROM ~dead WHERE died_at <= ?)"
)
COUNT_DEAD = "SELECT queue, count(*) FROM ~dead GROUP BY queue HAVING count(*) > ?"
TRIM_QUEUE = """
    DELETE FROM ~dead WHERE seq IN (SELECT seq FROM ~dead WHERE queue = ? ORDER BY seq LIMIT ?)
"""
TRIM_OLD = """
    DELETE FROM ~dead WHERE seq IN (
        SELECT seq FROM ~dead WHERE died_at <= ? ORDER BY died_at LIMIT ?)
"""

# --- schedules ---

ALL_SCHEDULES = "SELECT id, revision, due_at, body FROM ~schedules ORDER BY id"
SCHEDULES_AMONG = """
    SELECT id, revision, due_at, body FROM ~schedules
    WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id
"""
# The schedules that are due, with those whose due time is no time; then one row in any case, with
# the next due time after now, or NULL.
DUE_SCHEDULES = """
    SELECT * FROM (
        SELECT id, revision, due_at, body FROM ~schedules
        WHERE due_at <= :now ORDER BY due_at, id LIMIT :limit)
    UNION ALL SELECT * FROM (
        SELECT id, revision, 0.0, body FROM ~schedules WHERE due_at >= '' LIMIT :limit)
    UNION ALL
    SELECT NULL, NULL, (
        SELECT due_at FROM ~schedules WHERE due_at > :now AND due_at < ''
        ORDER BY due_at LIMIT 1), NULL
"""
REVISION_OF = "SELECT revision FROM ~schedules WHERE id = ?"
WRITE_SCHEDULE = """
    INSERT INTO ~schedules (id, revision, due_at, body) VALUES (?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE
    SET revision = excluded.revision, due_at = excluded.due_at, body = excluded.body
"""
DROP_SCHEDULE = "DELETE FROM ~schedules WHERE id = ?"

# --- wake-ups ---

WRITE_PORT = """
    INSERT OR REPLACE INTO ~wakeups (topic, network, port, refreshed_at, process)
    VALUES (?, ?, ?, ?, ?)
"""
ERASE_PORT = "DELETE FROM ~wakeups WHERE network = ? AND port = ?"
PORTS_OF = "SELECT port FROM ~wakeups WHERE topic = ? AND network = ? AND refreshed_at > ?"
LISTENING_PROCESSES = "SELECT DISTINCT process FROM ~wakeups WHERE process IS NOT NULL"
DROP_PORTS_OF = "DELETE FROM ~wakeups WHERE process = ?"
DROP_STALE_PORTS = "DELETE FROM ~wakeups WHERE refreshed_at <= ?"

# --- results ---

ADD_RESULT = """
    INSERT INTO ~results (task_id, status, result, date_done, traceback, children, name, args,
                          kwargs, worker, retries, queue, execution_time, history, expires_at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (task_id) DO NOTHING
"""
DROP_REPLACEABLE = """
    DELETE FROM ~results
    WHERE task_id = ? AND (status NOT IN ('SUCCESS', 'FAILURE', 'REVOKED') OR expires_at <= ?)
"""
LOAD = f"""
    SELECT {OUTCOME_COLUMNS} FROM ~results
    WHERE task_id IN (SELECT value FROM json_each(?)) AND (expires_at IS NULL OR expires_at > ?)
"""
FORGET_RESULTS = """
    DELETE FROM ~results
    WHERE task_id IN (SELECT value FROM json_each(?)) AND (expires_at IS NULL OR expires_at > ?)
"""
LAST_ARRIVAL = f"SELECT max(arrival) FROM ~results WHERE arrival < {LAST_KEY}"
ARRIVED_SINCE = f"""
    SELECT arrival, task_id FROM ~results
    WHERE arrival > ? AND arrival < {LAST_KEY} AND status IN ('SUCCESS', 'FAILURE', 'REVOKED')
    ORDER BY arrival LIMIT ?
"""
