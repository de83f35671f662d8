"""Every statement of the broker, for `Names.render`.

"Now" is the server's time when the statement began, and the seconds that its clock is ahead: 0 but
in tests. Where it is used, that is the first parameter. Beats of the living go by the real time.

A consumer's row is locked FOR KEY SHARE while it fetches. That keeps nobody from renewing or
waking it, and whoever fences it, which changes a key, waits until the fetch is over: what it took
is taken back with the rest.
"""

from __future__ import annotations

_REAL = "extract(epoch FROM statement_timestamp())::float8"
_NOW = f"({_REAL} + $1::float8)"

_READY = "consumer IS NULL AND due_at IS NULL AND crashes < 2"
# The 2 is `message.SUSPECT`. A partial index is used only for a query with the same words.
_SUSPECT = "consumer IS NULL AND due_at IS NULL AND crashes >= 2"
_ANY_SUSPECT = f"""EXISTS (
    SELECT FROM unnest(%s::text[]) AS q (name), LATERAL (
        SELECT FROM "{{prefix}}_messages" WHERE queue = q.name AND {_SUSPECT} LIMIT 1
    ) AS m
)"""
# Nobody pays for cancelling but where some id is cancelled. In this form each id is looked up;
# with NOT EXISTS all ids that were ever cancelled could be read first.
_NOT_CANCELLED = """(
    NOT EXISTS (SELECT FROM "{prefix}_cancelled")
    OR (SELECT c.until FROM "{prefix}_cancelled" AS c WHERE c.id = %s) IS NULL
)"""
_ALIVE = 'EXISTS (SELECT FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced)'

# --- publish: $2 is the id of the call, or NULL ---

_CALL = f"""
call AS (
    INSERT INTO "{{prefix}}_calls" AS c (call_id, until)
    SELECT $2::text, {_NOW} + 60 WHERE $2::text IS NOT NULL
    ON CONFLICT (call_id) DO UPDATE SET until = excluded.until WHERE c.until <= {_NOW}
    RETURNING call_id
), fresh AS (
    SELECT FROM call UNION ALL SELECT WHERE $2::text IS NULL
)"""

ADD = f"""
WITH {_CALL}
INSERT INTO "{{prefix}}_messages" (id, queue, priority, body)
SELECT g.id, g.queue, g.priority, g.body
FROM unnest($3::text[], $4::text[], $5::smallint[], $6::bytea[]) AS g (id, queue, priority, body)
WHERE EXISTS (SELECT FROM fresh) AND {_NOT_CANCELLED % "g.id"}
"""

# With times; $11 tells which are to be unique, each id once. An id is claimed by the call, so that
# the same call may be repeated; in the order of ids, so that two calls do not wait for each other.
_DUE = f"coalesce(g.not_before, {_NOW} + g.delay)"
ADD_ANY = f"""
WITH {_CALL}, given AS MATERIALIZED (
    SELECT * FROM unnest(
        $3::text[], $4::text[], $5::smallint[], $6::bytea[],
        $7::float8[], $8::float8[], $9::float8[], $10::float8[], $11::boolean[]
    ) AS g (id, queue, priority, body, not_before, delay, expires_at, expires_in, is_unique)
), claimed AS (
    INSERT INTO "{{prefix}}_recent" AS r (id, until, call_id)
    SELECT id, {_NOW} + 86400, $2::text FROM given
    WHERE is_unique AND EXISTS (SELECT FROM fresh) ORDER BY id
    ON CONFLICT (id) DO UPDATE SET until = excluded.until, call_id = excluded.call_id
    WHERE r.until <= {_NOW}
    RETURNING id
), stored AS (
    INSERT INTO "{{prefix}}_messages" (id, queue, priority, body, due_at, expires_at)
    SELECT g.id, g.queue, g.priority, g.body, CASE WHEN {_DUE} > {_NOW} THEN {_DUE} END,
        coalesce(g.expires_at, {_NOW} + g.expires_in)
    FROM given AS g
    WHERE EXISTS (SELECT FROM fresh) AND {_NOT_CANCELLED % "g.id"}
        AND (NOT g.is_unique OR g.id IN (SELECT id FROM claimed))
)
SELECT id FROM given
WHERE is_unique AND id NOT IN (SELECT id FROM claimed) AND NOT EXISTS (
    SELECT FROM "{{prefix}}_recent" AS r WHERE r.id = given.id AND r.call_id = $2::text
)
"""
CLAIM_ANYHOW = f"""
INSERT INTO "{{prefix}}_recent" (id, until, call_id)
SELECT DISTINCT id, {_NOW} + 86400, NULL FROM unnest($2::text[]) AS u (id) ORDER BY id
ON CONFLICT (id) DO UPDATE SET until = excluded.until, call_id = NULL
"""

# --- waking ---

WAIT = """
UPDATE "{prefix}_consumers" SET waiting = true
WHERE number = $1 AND NOT waiting
RETURNING set_config('synchronous_commit', 'off', true)
"""
WAIT_NO_MORE = """
UPDATE "{prefix}_consumers" SET waiting = false
WHERE number = $1 AND waiting
RETURNING set_config('synchronous_commit', 'off', true)
"""
# One notice each, to as many as there is work for. That who waits is noted is nothing that has to
# survive a crash, and a commit with a notice holds up all others.
WAKE = """
WITH idle AS MATERIALIZED (
    SELECT number FROM "{prefix}_consumers"
    WHERE waiting AND NOT fenced AND queues && $1::text[]
    ORDER BY number LIMIT $2
    FOR NO KEY UPDATE
), woken AS (
    UPDATE "{prefix}_consumers" SET waiting = false
    WHERE number = ANY (ARRAY(SELECT number FROM idle))
    RETURNING number
)
SELECT pg_notify($3::text || number, ''), set_config('synchronous_commit', 'off', true) FROM woken
"""
ANNOUNCE = "SELECT pg_notify($1::text, '')"

# --- fetch: $2 consumer, $3 token, $4 queues in order, $5 limit, $6 whether to take nothing
# where something has fallen due, which would have to be promoted first ---

TAKE = f"""
WITH me AS MATERIALIZED (
    SELECT number FROM "{{prefix}}_consumers"
    WHERE number = $2 AND NOT fenced AND floor <= $3
    FOR KEY SHARE
), outlook AS MATERIALIZED (
    SELECT {_ANY_SUSPECT % "$4"} AS suspects, (
        SELECT due_at FROM "{{prefix}}_messages" WHERE due_at IS NOT NULL ORDER BY due_at LIMIT 1
    ) AS next_due
    FROM me
), able AS MATERIALIZED (
    SELECT CASE WHEN suspects
        THEN NOT EXISTS (SELECT FROM "{{prefix}}_messages" AS h WHERE h.consumer = $2)
        ELSE false
    END AS alone
    FROM outlook
    WHERE NOT $6::boolean OR next_due IS NULL OR next_due > {_NOW}
), suspect AS MATERIALIZED (
    SELECT m.seq
    FROM able, unnest($4::text[]) WITH ORDINALITY AS q (name, place), LATERAL (
        SELECT seq FROM "{{prefix}}_messages" WHERE queue = q.name AND {_SUSPECT}
        ORDER BY priority DESC, seq LIMIT 1
        FOR UPDATE SKIP LOCKED
    ) AS m
    WHERE able.alone
    ORDER BY q.place LIMIT 1
), ready AS MATERIALIZED (
    SELECT m.seq
    FROM able, unnest($4::text[]) WITH ORDINALITY AS q (name, place), LATERAL (
        SELECT seq FROM "{{prefix}}_messages" WHERE queue = q.name AND {_READY}
        ORDER BY priority DESC, seq LIMIT $5
        FOR UPDATE SKIP LOCKED
    ) AS m
    WHERE NOT EXISTS (SELECT FROM suspect)
    ORDER BY q.place LIMIT $5
), taken AS (
    UPDATE "{{prefix}}_messages" AS m SET consumer = $2, token = $3
    WHERE seq = ANY (ARRAY(SELECT seq FROM suspect UNION ALL SELECT seq FROM ready))
    RETURNING seq, queue, id, priority, crashes, crash_note, expires_at, body,
        NOT {_NOT_CANCELLED % "m.id"} AS cancelled
)
SELECT NULL::bigint AS seq, NULL::text AS queue, NULL::text AS id, NULL::smallint AS priority,
    NULL::integer AS crashes, NULL::text AS crash_note, next_due AS expires_at,
    NULL::bytea AS body, suspects AS cancelled, {_NOW} AS now
FROM outlook
UNION ALL
SELECT *, NULL FROM taken
"""
# What calls took whose answers were lost. Those that come later than this find the floor higher.
RAISE_FLOOR = """
UPDATE "{prefix}_consumers" SET floor = $2
WHERE number IN (
    SELECT number FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced FOR UPDATE
)
RETURNING number
"""
RECALL = f"""
SELECT seq, token, queue, id, priority, crashes, crash_note, expires_at, body, {_NOW} AS now
FROM "{{prefix}}_messages"
WHERE consumer = $2 AND token >= $3
"""
# In the order of their falling due. One after the other, each in a transaction that begins with the
# first: whoever finds what others have just promoted would lock it, and those who fetch meanwhile
# would skip that and bring less than there is.
TAKE_TURNS = 'SELECT FROM "{prefix}_silence" FOR UPDATE'
PROMOTE = f"""
WITH due AS MATERIALIZED (
    SELECT seq FROM "{{prefix}}_messages"
    WHERE due_at <= {_NOW} ORDER BY due_at, seq LIMIT $2
    FOR UPDATE SKIP LOCKED
), promoted AS (
    UPDATE "{{prefix}}_messages" AS m SET due_at = NULL, seq = DEFAULT
    FROM due WHERE m.seq = due.seq
    RETURNING m.queue
)
SELECT queue, count(*) AS count FROM promoted GROUP BY queue
"""
NEWS = f"""
SELECT {_ANY_SUSPECT % "$2"} AS suspects, EXISTS (SELECT FROM "{{prefix}}_cancelled") AS cancels
FROM "{{prefix}}_consumers" WHERE number = $1 AND NOT fenced
"""
CANCELLED_OF = """
SELECT m.seq, m.token, m.id
FROM "{prefix}_messages" AS m JOIN "{prefix}_cancelled" AS c ON c.id = m.id
WHERE m.consumer = $1
"""

# --- settle: $1 consumer, $2 and $3 the receipts, seq and token; each returns what it settled ---

_RECEIPTS = "unnest($2::bigint[], $3::bigint[]) AS r (seq, token)"
_HELD = f"m.seq = r.seq AND m.consumer = $1 AND m.token = r.token AND {_ALIVE}"

DONE = f"""
DELETE FROM "{{prefix}}_messages" AS m USING {_RECEIPTS} WHERE {_HELD}
RETURNING r.seq, r.token
"""
RELEASE = f"""
WITH back AS (
    UPDATE "{{prefix}}_messages" AS m SET consumer = NULL, token = NULL FROM {_RECEIPTS}
    WHERE {_HELD} AND {_NOT_CANCELLED % "m.id"}
    RETURNING r.seq, r.token
), gone AS (
    DELETE FROM "{{prefix}}_messages" AS m USING {_RECEIPTS}
    WHERE {_HELD} AND NOT {_NOT_CANCELLED % "m.id"}
    RETURNING r.seq, r.token
)
SELECT * FROM back UNION ALL SELECT * FROM gone
"""
# $4 reasons, $5 details, $6 seconds that the clock is ahead.
BURY = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_messages" AS m
    USING unnest($2::bigint[], $3::bigint[], $4::text[], $5::bytea[])
        WITH ORDINALITY AS r (seq, token, reason, details, place)
    WHERE {_HELD}
    RETURNING r.seq, r.token, r.place, r.reason, r.details, m.id, m.queue, m.priority, m.crashes,
        m.body
), buried AS (
    INSERT INTO "{{prefix}}_dead" (id, queue, priority, crashes, body, reason, details, died_at)
    SELECT id, queue, priority, crashes, body, reason, details, {_REAL} + $6::float8
    FROM gone ORDER BY place
)
SELECT seq, token FROM gone
"""
IS_ALIVE = 'SELECT FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced'

# --- consumers ---

ADD_CONSUMER = f"""
INSERT INTO "{{prefix}}_consumers" (id, name, queues, about, lease, lease_until, beat)
VALUES ($2, $3, $4::text[], $5, $6::float8, {_NOW} + $6::float8, {_REAL})
ON CONFLICT (id, fenced) DO UPDATE SET lease_until = excluded.lease_until, beat = excluded.beat
RETURNING number, (SELECT max(beat) FROM "{{prefix}}_consumers") AS last_beat,
    extract(epoch FROM pg_postmaster_start_time())::float8 AS started
"""
_LAST_BEAT = 'SELECT max(beat) FROM "{prefix}_consumers"'
RENEW = f"""
UPDATE "{{prefix}}_consumers" SET lease_until = {_NOW} + $3::float8, beat = {_REAL}
WHERE id = $2 AND NOT fenced
RETURNING {_REAL} - ({_LAST_BEAT}) AS silence
"""
RENEW_IN_COMPANY = f"""
UPDATE "{{prefix}}_consumers" SET lease_until = {_NOW} + $3::float8, beat = {_REAL}
WHERE id = $2 AND NOT fenced AND {_REAL} - ({_LAST_BEAT}) <= $3::float8 / 2
RETURNING number
"""
FENCE_ONE = """
UPDATE "{prefix}_consumers" SET fenced = true, crash_note = $2
WHERE id = $1 AND NOT fenced
RETURNING number
"""
LIVING = f"""
SELECT id, queues, about FROM "{{prefix}}_consumers" WHERE NOT fenced AND lease_until > {_NOW}
"""
LOCK_CONSUMER = 'SELECT FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced FOR UPDATE'
GIVE_BACK_ALL = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_messages" AS m
    WHERE consumer = $1 AND NOT {_NOT_CANCELLED % "m.id"}
), back AS (
    UPDATE "{{prefix}}_messages" AS m SET consumer = NULL, token = NULL
    WHERE consumer = $1 AND {_NOT_CANCELLED % "m.id"}
    RETURNING queue
)
SELECT queue, count(*) AS count FROM back GROUP BY queue
"""
REMOVE_CONSUMER = 'DELETE FROM "{prefix}_consumers" WHERE number = $1'

# --- taking back: $1 consumer, which is fenced, $2 limit ---

TAKE_BACK = f"""
WITH held AS MATERIALIZED (
    SELECT seq, {_NOT_CANCELLED % "m.id"} AS goes_on FROM "{{prefix}}_messages" AS m
    WHERE consumer = $1 ORDER BY seq LIMIT $2
    FOR UPDATE OF m SKIP LOCKED
), gone AS (
    DELETE FROM "{{prefix}}_messages"
    WHERE seq = ANY (ARRAY(SELECT seq FROM held WHERE NOT goes_on))
    RETURNING seq
), back AS (
    UPDATE "{{prefix}}_messages" SET
        consumer = NULL, token = NULL, crashes = crashes + 1,
        crash_note = (SELECT crash_note FROM "{{prefix}}_consumers" WHERE number = $1)
    WHERE seq = ANY (ARRAY(SELECT seq FROM held WHERE goes_on))
    RETURNING queue
)
SELECT queue, count(*) AS count FROM back GROUP BY queue
UNION ALL
SELECT NULL, count(*) FROM gone
"""
REMOVE_FENCED = """
DELETE FROM "{prefix}_consumers"
WHERE number = $1 AND fenced
    AND NOT EXISTS (SELECT FROM "{prefix}_messages" WHERE consumer = $1)
"""

# --- maintain ---

OUTLOOK = f"""
SELECT EXISTS (SELECT FROM "{{prefix}}_messages" WHERE due_at <= {_NOW}) AS is_due,
    ARRAY(
        SELECT number FROM "{{prefix}}_consumers" WHERE fenced OR lease_until <= {_NOW}
        ORDER BY number LIMIT 100
    ) AS lapsed,
    s.spared = (SELECT max(beat) FROM "{{prefix}}_consumers") AS is_spared,
    (SELECT max(seq) FROM "{{prefix}}_dead") AS newest_dead,
    EXISTS (SELECT FROM "{{prefix}}_dead" WHERE died_at <= {_NOW} - $2::float8) AS any_outdated
FROM "{{prefix}}_silence" AS s
"""
# Only one judges at a time.
SILENCE = f"""
SELECT {_REAL} - CASE WHEN spared = last THEN seen ELSE last END AS seconds
FROM "{{prefix}}_silence" AS s, LATERAL (
    SELECT coalesce(max(beat), 0) AS last FROM "{{prefix}}_consumers"
) AS beats
FOR UPDATE OF s
"""
LEASES_OF = """
SELECT max(lease) FROM "{prefix}_consumers" WHERE number = ANY ($1::bigint[]) AND NOT fenced
"""
SPARE = f"""
UPDATE "{{prefix}}_consumers" SET lease_until = greatest(lease_until, {_NOW} + lease)
WHERE NOT fenced
"""
NOTE_SPARED = f"""
UPDATE "{{prefix}}_silence"
SET spared = (SELECT coalesce(max(beat), 0) FROM "{{prefix}}_consumers"), seen = {_REAL}
"""
NOTE_LOOK = f'UPDATE "{{prefix}}_silence" SET seen = {_REAL}'
FENCE = f"""
UPDATE "{{prefix}}_consumers"
SET fenced = true, crash_note = name || ': its lease ran out'
WHERE number = ANY ($2::bigint[]) AND NOT fenced AND lease_until <= {_NOW}
"""
FENCED_AMONG = """
SELECT number FROM "{prefix}_consumers"
WHERE number = ANY ($1::bigint[]) AND fenced ORDER BY number
"""


def _swept(table: str, key: str) -> str:
    return f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_{table}"
    WHERE {key} = ANY (ARRAY(
        SELECT {key} FROM "{{prefix}}_{table}" WHERE until <= {_NOW} ORDER BY until LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING {key}
)
SELECT count(*) AS count FROM gone
"""


SWEEPS = (_swept("calls", "call_id"), _swept("recent", "id"), _swept("cancelled", "id"))

# --- cancel: $1 ids ---

CANCELLED_AMONG = 'SELECT id FROM "{prefix}_cancelled" WHERE id = ANY ($1::text[])'
CANCEL = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_messages" WHERE consumer IS NULL AND id = ANY ($2::text[])
)
INSERT INTO "{{prefix}}_cancelled" (id, until)
SELECT DISTINCT id, {_NOW} + 7 * 86400 FROM unnest($2::text[]) AS u (id) ORDER BY id
ON CONFLICT (id) DO UPDATE SET until = excluded.until
"""
HELD_AMONG = """
SELECT DISTINCT id FROM "{prefix}_messages"
WHERE consumer IS NOT NULL AND id = ANY ($1::text[])
"""
LIFT_CANCEL = 'DELETE FROM "{prefix}_cancelled" WHERE id = ANY ($1::text[])'

# --- depth and purge ---

DEPTH = f"""
SELECT queue, 'ready' AS state, count(*) AS count FROM "{{prefix}}_messages"
WHERE {_READY} GROUP BY queue
UNION ALL
SELECT queue, 'ready', count(*) FROM "{{prefix}}_messages" WHERE {_SUSPECT} GROUP BY queue
UNION ALL
SELECT queue, CASE WHEN due_at <= {_NOW} THEN 'ready' ELSE 'delayed' END, count(*)
FROM "{{prefix}}_messages" WHERE due_at IS NOT NULL GROUP BY 1, 2
UNION ALL
SELECT queue, 'held', count(*) FROM "{{prefix}}_messages" WHERE consumer IS NOT NULL GROUP BY queue
UNION ALL
SELECT queue, 'dead', count(*) FROM "{{prefix}}_dead" GROUP BY queue
"""


def _purged(condition: str) -> str:
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


PURGES = (_purged(_READY), _purged(_SUSPECT), _purged("due_at IS NOT NULL"))

# --- dead letters ---

NEWEST_DEAD = """
SELECT seq, id, body, reason, crashes, died_at, details FROM "{prefix}_dead"
WHERE queue = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3
"""
TAKE_DEAD = (
    'DELETE FROM "{prefix}_dead" WHERE queue = $1 AND seq = ANY ($2::bigint[]) RETURNING seq'
)
COUNT_DEAD = """
SELECT queue, count(*) AS count FROM "{prefix}_dead" GROUP BY queue HAVING count(*) > $1
"""
TRIM_QUEUE = """
WITH gone AS (
    DELETE FROM "{prefix}_dead" WHERE seq = ANY (ARRAY(
        SELECT seq FROM "{prefix}_dead" WHERE queue = $1 ORDER BY seq LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING seq
)
SELECT count(*) AS count FROM gone
"""
TRIM_OLD = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_dead" WHERE seq = ANY (ARRAY(
        SELECT seq FROM "{{prefix}}_dead" WHERE died_at <= {_NOW} - $2::float8
        ORDER BY died_at LIMIT $3
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING seq
)
SELECT count(*) AS count FROM gone
"""

# --- schedules ---

ALL_SCHEDULES = 'SELECT id, revision, due_at, body FROM "{prefix}_schedules"'
SCHEDULES_AMONG = f"{ALL_SCHEDULES} WHERE id = ANY ($1::text[])"
# Those that are due; and always a row with the time, and the earliest due time after it, or NULL.
DUE_SCHEDULES = f"""
SELECT NULL AS id, NULL AS revision, NULL::bytea AS body, {_NOW} AS now, (
    SELECT due_at FROM "{{prefix}}_schedules" WHERE due_at > {_NOW} ORDER BY due_at LIMIT 1
) AS due_at
UNION ALL
(
    SELECT id, revision, body, NULL, due_at FROM "{{prefix}}_schedules"
    WHERE due_at <= {_NOW} ORDER BY due_at, id LIMIT $2
)
"""
PUT_SCHEDULE = """
INSERT INTO "{prefix}_schedules" (id, revision, due_at, body) VALUES ($1, $2, $3, $4)
ON CONFLICT (id) DO NOTHING
RETURNING id
"""
CHANGE_SCHEDULE = """
UPDATE "{prefix}_schedules" SET revision = $2, due_at = $3, body = $4
WHERE id = $1 AND revision = $5
RETURNING id
"""
DROP_SCHEDULE = 'DELETE FROM "{prefix}_schedules" WHERE id = $1 AND revision = $2 RETURNING id'
LACKS_SCHEDULE = """
SELECT WHERE NOT EXISTS (SELECT FROM "{prefix}_schedules" WHERE id = $1)
"""
