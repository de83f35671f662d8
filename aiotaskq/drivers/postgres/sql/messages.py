"""Statements about messages: publish, fetch, settle, promote, cancel, count and purge."""

from __future__ import annotations

from aiotaskq.drivers.common.retention import CALLS_FOR, CANCELLED_IDS_FOR, UNIQUE_IDS_FOR
from aiotaskq.drivers.postgres.sql.fragments import (
    MOST_CRASHES,
    NOW,
    READY,
    REAL_NOW,
    SUSPECT,
    any_suspect,
    not_cancelled,
)

# --- publish: $2 is the id of the call, or NULL ---

# Records the call; "fresh" has a row unless the same call is recorded and not yet outdated. The
# unique index makes a repeated call wait until the first one is committed or rolled back.
_CALL = f"""
call AS (
    INSERT INTO "{{prefix}}_calls" AS c (call_id, until)
    SELECT $2::text, {NOW} + {CALLS_FOR} WHERE $2::text IS NOT NULL
    ON CONFLICT (call_id) DO UPDATE SET until = excluded.until WHERE c.until <= {NOW}
    RETURNING call_id
), fresh AS (
    SELECT FROM call UNION ALL SELECT WHERE $2::text IS NULL
)"""

# Stores plain messages. Locks only the call's id: new rows concern nobody before the commit.
ADD = f"""
WITH {_CALL}
INSERT INTO "{{prefix}}_messages" (id, queue, priority, body)
SELECT g.id, g.queue, g.priority, g.body
FROM unnest($3::text[], $4::text[], $5::smallint[], $6::bytea[]) AS g (id, queue, priority, body)
WHERE EXISTS (SELECT FROM fresh) AND {not_cancelled("g.id")}
"""

_DUE = f"coalesce(g.not_before, {NOW} + g.delay)"
# Stores messages with times or unique ids ($11), and returns the ids refused. Ids are claimed in
# their order, so that two calls do not deadlock; with the call's id, so that it may be repeated.
ADD_ANY = f"""
WITH {_CALL}, given AS MATERIALIZED (
    SELECT * FROM unnest(
        $3::text[], $4::text[], $5::smallint[], $6::bytea[],
        $7::float8[], $8::float8[], $9::float8[], $10::float8[], $11::boolean[]
    ) AS g (id, queue, priority, body, not_before, delay, expires_at, expires_in, is_unique)
), claimed AS (
    INSERT INTO "{{prefix}}_recent" AS r (id, until, call_id)
    SELECT id, {NOW} + {UNIQUE_IDS_FOR}, $2::text FROM given
    WHERE is_unique AND EXISTS (SELECT FROM fresh) ORDER BY id
    ON CONFLICT (id) DO UPDATE SET until = excluded.until, call_id = excluded.call_id
    WHERE r.until <= {NOW}
    RETURNING id
), stored AS (
    INSERT INTO "{{prefix}}_messages" (id, queue, priority, body, due_at, expires_at)
    SELECT g.id, g.queue, g.priority, g.body, CASE WHEN {_DUE} > {NOW} THEN {_DUE} END,
        coalesce(g.expires_at, {NOW} + g.expires_in)
    FROM given AS g
    WHERE EXISTS (SELECT FROM fresh) AND {not_cancelled("g.id")}
        AND (NOT g.is_unique OR g.id IN (SELECT id FROM claimed))
)
SELECT id FROM given
WHERE is_unique AND id NOT IN (SELECT id FROM claimed) AND NOT EXISTS (
    SELECT FROM "{{prefix}}_recent" AS r WHERE r.id = given.id AND r.call_id = $2::text
)
"""
# Claims unique ids whether they were claimed before or not; in their order, against deadlocks.
CLAIM = f"""
INSERT INTO "{{prefix}}_recent" (id, until, call_id)
SELECT DISTINCT id, {NOW} + {UNIQUE_IDS_FOR}, NULL FROM unnest($2::text[]) AS u (id) ORDER BY id
ON CONFLICT (id) DO UPDATE SET until = excluded.until, call_id = NULL
"""
# Sends a notice to a channel when the transaction commits. PostgreSQL lets one such commit through
# at a time, in the whole server.
# Nothing is sent where there is hardly room for notices: the caller's transaction would fail, and
# consumers look by themselves.
NOTIFY = "SELECT pg_notify($1::text, '') WHERE pg_notification_queue_usage() < 0.5"

# --- fetch: $2 consumer, $3 token, $4 queues in order, $5 limit, $6 whether to take nothing where
# --- a delayed message is due, which has to be promoted first

# Takes messages; the first row is an overview, without a message. The consumer is locked FOR KEY
# SHARE, so that fencing waits for the commit. Fetches skip the rows that another one is taking.
TAKE = f"""
WITH me AS MATERIALIZED (
    SELECT number FROM "{{prefix}}_consumers"
    WHERE number = $2 AND NOT fenced AND floor <= $3
    FOR KEY SHARE
), outlook AS MATERIALIZED (
    SELECT {any_suspect("$4")} AS suspects, (
        SELECT due_at FROM "{{prefix}}_messages" WHERE due_at IS NOT NULL ORDER BY due_at LIMIT 1
    ) AS next_due
    FROM me
), able AS MATERIALIZED (
    SELECT CASE WHEN suspects
        THEN NOT EXISTS (SELECT FROM "{{prefix}}_messages" AS h WHERE h.consumer = $2)
        ELSE false
    END AS alone
    FROM outlook
    WHERE NOT $6::boolean OR next_due IS NULL OR next_due > {NOW}
), suspect AS MATERIALIZED (
    SELECT m.seq
    FROM able, unnest($4::text[]) WITH ORDINALITY AS q (name, place), LATERAL (
        SELECT seq FROM "{{prefix}}_messages" WHERE queue = q.name AND {SUSPECT}
        ORDER BY priority DESC, seq LIMIT 1
        FOR UPDATE SKIP LOCKED
    ) AS m
    WHERE able.alone
    ORDER BY q.place LIMIT 1
), ready AS MATERIALIZED (
    SELECT m.seq
    FROM able, unnest($4::text[]) WITH ORDINALITY AS q (name, place), LATERAL (
        SELECT seq FROM "{{prefix}}_messages" WHERE queue = q.name AND {READY}
        ORDER BY priority DESC, seq LIMIT $5
        FOR UPDATE SKIP LOCKED
    ) AS m
    WHERE NOT EXISTS (SELECT FROM suspect)
    ORDER BY q.place LIMIT $5
), taken AS (
    UPDATE "{{prefix}}_messages" AS m SET consumer = $2, token = $3
    WHERE seq = ANY (ARRAY(SELECT seq FROM suspect UNION ALL SELECT seq FROM ready))
    RETURNING seq, queue, id, priority, crashes, crash_note, expires_at, body,
        NOT {not_cancelled("m.id")} AS cancelled
)
SELECT NULL::bigint AS seq, NULL::text AS queue, NULL::text AS id, NULL::smallint AS priority,
    NULL::integer AS crashes, NULL::text AS crash_note, next_due AS expires_at,
    NULL::bytea AS body, suspects AS cancelled, {NOW} AS now
FROM outlook
UNION ALL
SELECT *, NULL FROM taken
"""
# Returns messages that fetches since a token took from the queues of the consumer ($4). Locks none:
# only their holder settles them, and the floor was raised before (see `consumers.RAISE_FLOOR`), so
# that no fetch of then can add any.
TAKEN_SINCE = f"""
SELECT seq, token, queue, id, priority, crashes, crash_note, expires_at, body, {NOW} AS now
FROM "{{prefix}}_messages"
WHERE consumer = $2 AND token >= $3 AND queue = ANY ($4::text[])
"""
# Moves due messages to the end of their queues, in the order in which they fell due. Skips rows
# that a cancelling or purging transaction has locked. Runs under `consumers.LOCK_PROMOTION`.
PROMOTE = f"""
WITH due AS MATERIALIZED (
    SELECT seq FROM "{{prefix}}_messages"
    WHERE due_at <= {NOW} ORDER BY due_at, seq LIMIT $2
    FOR UPDATE SKIP LOCKED
), promoted AS (
    UPDATE "{{prefix}}_messages" AS m SET due_at = NULL, seq = DEFAULT
    FROM due WHERE m.seq = due.seq
    RETURNING m.queue
)
SELECT queue, count(*) AS count FROM promoted GROUP BY queue
"""

# --- settle: $1 consumer, $2 and $3 the receipts (seq and token); each returns those it settled.
# --- Their row locks decide against a concurrent take-back: the second of the two finds that the
# --- message is held by nobody, or is gone. So the consumer's own row need not be locked.

_RECEIPTS = "unnest($2::bigint[], $3::bigint[]) AS r (seq, token)"
_ALIVE = 'EXISTS (SELECT FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced)'
_HELD = f"m.seq = r.seq AND m.consumer = $1 AND m.token = r.token AND {_ALIVE}"

# Deletes messages that are done. Locks the messages alone.
DONE = f"""
DELETE FROM "{{prefix}}_messages" AS m USING {_RECEIPTS} WHERE {_HELD}
RETURNING r.seq, r.token
"""
# Hands messages back to the head of their queues; deletes cancelled ones. Locks the messages alone.
RELEASE = f"""
WITH back AS (
    UPDATE "{{prefix}}_messages" AS m SET consumer = NULL, token = NULL FROM {_RECEIPTS}
    WHERE {_HELD} AND {not_cancelled("m.id")}
    RETURNING r.seq, r.token
), gone AS (
    DELETE FROM "{{prefix}}_messages" AS m USING {_RECEIPTS}
    WHERE {_HELD} AND NOT {not_cancelled("m.id")}
    RETURNING r.seq, r.token
)
SELECT * FROM back UNION ALL SELECT * FROM gone
"""
# Moves messages to the dead letters; $4 reasons, $5 details, $6 the offset of the clock. Locks the
# messages alone.
MOVE_TO_DEAD = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_messages" AS m
    USING unnest($2::bigint[], $3::bigint[], $4::text[], $5::bytea[])
        WITH ORDINALITY AS r (seq, token, reason, details, place)
    WHERE {_HELD}
    RETURNING r.seq, r.token, r.place, r.reason, r.details, m.id, m.queue, m.priority, m.crashes,
        m.body
), buried AS (
    INSERT INTO "{{prefix}}_dead" (id, queue, priority, crashes, body, reason, details, died_at)
    SELECT id, queue, priority, crashes, body, reason, details, {REAL_NOW} + $6::float8
    FROM gone ORDER BY place
)
SELECT seq, token FROM gone
"""
# Hands back all messages of a consumer that closes, without those cancelled; returns how many for
# each queue. Runs under `consumers.LOCK_CONSUMER`, so that no fetch can add any.
RELEASE_ALL = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_messages" AS m
    WHERE consumer = $1 AND NOT {not_cancelled("m.id")}
), back AS (
    UPDATE "{{prefix}}_messages" AS m SET consumer = NULL, token = NULL
    WHERE consumer = $1 AND {not_cancelled("m.id")}
    RETURNING queue
)
SELECT queue, count(*) AS count FROM back GROUP BY queue
"""
# Takes messages back from a fenced consumer ($1), up to a limit ($2), and counts the crash. Skips
# rows that a settlement, or another process that does the same, has locked.
TAKE_BACK = f"""
WITH held AS MATERIALIZED (
    SELECT seq, {not_cancelled("m.id")} AS goes_on FROM "{{prefix}}_messages" AS m
    WHERE consumer = $1 ORDER BY seq LIMIT $2
    FOR UPDATE OF m SKIP LOCKED
), gone AS (
    DELETE FROM "{{prefix}}_messages"
    WHERE seq = ANY (ARRAY(SELECT seq FROM held WHERE NOT goes_on))
    RETURNING seq
), back AS (
    UPDATE "{{prefix}}_messages" SET
        consumer = NULL, token = NULL, crashes = least(crashes, {MOST_CRASHES}) + 1,
        crash_note = (SELECT crash_note FROM "{{prefix}}_consumers" WHERE number = $1)
    WHERE seq = ANY (ARRAY(SELECT seq FROM held WHERE goes_on))
    RETURNING queue
)
SELECT queue, count(*) AS count FROM back GROUP BY queue
UNION ALL
SELECT NULL, count(*) FROM gone
"""

# Takes messages back whose holder does not exist, and never did: another program wrote them. Every
# holder has a row, and goes with its last message; a fetch locks the row of its own.
TAKE_BACK_STRAYS = f"""
WITH stray AS MATERIALIZED (
    SELECT seq FROM "{{prefix}}_messages" AS m
    WHERE consumer IS NOT NULL
        AND NOT EXISTS (SELECT FROM "{{prefix}}_consumers" AS c WHERE c.number = m.consumer)
    ORDER BY consumer, seq LIMIT $2
    FOR UPDATE OF m SKIP LOCKED
), back AS (
    UPDATE "{{prefix}}_messages" SET
        consumer = NULL, token = NULL, crashes = least(crashes, {MOST_CRASHES}) + 1,
        crash_note = 'its holder does not exist', due_at = NULL
    WHERE seq = ANY (ARRAY(SELECT seq FROM stray))
    RETURNING seq
)
SELECT count(*) AS count, $1::float8 FROM back
"""
# Makes messages ready whose due time is no number. It is greater than all times, so that they would
# wait for ever.
FREE_TIMELESS = """
WITH timeless AS MATERIALIZED (
    SELECT seq FROM "{prefix}_messages" WHERE due_at = 'NaN' ORDER BY due_at, seq LIMIT $2
    FOR UPDATE SKIP LOCKED
), freed AS (
    UPDATE "{prefix}_messages" SET due_at = NULL
    WHERE seq = ANY (ARRAY(SELECT seq FROM timeless))
    RETURNING seq
)
SELECT count(*) AS count, $1::float8 FROM freed
"""

# --- cancel ---

# Deletes waiting messages and marks their ids as cancelled for a week. Its row locks wait for a
# fetch that is taking one of them, which then counts as held. Ids go in order, against deadlocks.
CANCEL = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_messages" WHERE consumer IS NULL AND id = ANY ($2::text[])
)
INSERT INTO "{{prefix}}_cancelled" (id, until)
SELECT DISTINCT id, {NOW} + {CANCELLED_IDS_FOR} FROM unnest($2::text[]) AS u (id) ORDER BY id
ON CONFLICT (id) DO UPDATE SET until = excluded.until
"""
# Returns those of some ids that are cancelled already. Locks nothing: `CANCEL` follows anyway.
CANCELLED_AMONG = 'SELECT id FROM "{prefix}_cancelled" WHERE id = ANY ($1::text[])'
# Returns those of some ids that are held. Locks nothing: after `CANCEL` no fetch takes any more.
HELD_AMONG = """
SELECT DISTINCT id FROM "{prefix}_messages"
WHERE consumer IS NOT NULL AND id = ANY ($1::text[])
"""
# Makes ids no longer cancelled. Locks their rows, as every DELETE does.
UNCANCEL = 'DELETE FROM "{prefix}_cancelled" WHERE id = ANY ($1::text[])'
# Returns the messages of a consumer whose ids are cancelled. Locks nothing: it only informs.
CANCELLED_OF = """
SELECT m.seq, m.token, m.id
FROM "{prefix}_messages" AS m JOIN "{prefix}_cancelled" AS c ON c.id = m.id
WHERE m.consumer = $1
"""

# --- depth and purge ---

# Counts messages by queue and state. Locks nothing: it only informs.
DEPTH = f"""
SELECT queue, 'ready' AS state, count(*) AS count FROM "{{prefix}}_messages"
WHERE {READY} GROUP BY queue
UNION ALL
SELECT queue, 'ready', count(*) FROM "{{prefix}}_messages" WHERE {SUSPECT} GROUP BY queue
UNION ALL
SELECT queue, CASE WHEN due_at <= {NOW} THEN 'ready' ELSE 'delayed' END, count(*)
FROM "{{prefix}}_messages" WHERE due_at IS NOT NULL GROUP BY 1, 2
UNION ALL
SELECT queue, 'held', count(*) FROM "{{prefix}}_messages" WHERE consumer IS NOT NULL GROUP BY queue
UNION ALL
SELECT queue, 'dead', count(*) FROM "{{prefix}}_dead" GROUP BY queue
"""


def _purge(condition: str) -> str:
    return f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_messages"
    WHERE seq = ANY (ARRAY(
        SELECT seq FROM "{{prefix}}_messages" WHERE queue = $1 AND {condition} LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING seq
)
SELECT count(*) AS count FROM gone
"""


# Delete some waiting messages of a queue, by state. Skip the rows that a fetch is taking.
PURGES = (_purge(READY), _purge(SUSPECT), _purge("due_at IS NOT NULL"))
