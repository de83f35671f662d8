"""Statements about results.

The first parameter of each is the offset of the clock in seconds, for tests.
"""

from __future__ import annotations

from aiotaskq.drivers.common.rows import OUTCOME_COLUMNS

_NOW = "(now() + make_interval(secs => $1::float8))"
_ALIVE = f"(r.expires_at IS NULL OR r.expires_at > {_NOW})"


def _timed(template: str) -> str:
    return (
        template.replace("~now", _NOW)
        .replace("~alive", _ALIVE)
        .replace("~columns", OUTCOME_COLUMNS)
    )


# Stores a batch and notifies subscribers of the ids of final outcomes, in one statement: there is
# no outcome without its notice, and no notice without its outcome. Rows are locked in the order of
# their ids, so that two batches that share some cannot deadlock.
# Where there is hardly room for notices, none is sent: subscribers also look by themselves.
# A notice is a JSON array of ids, shorter than the 8000 bytes that PostgreSQL allows. It is empty
# where an id is too long for one: then subscribers have to look.
STORE = _timed("""
WITH kept AS (
    INSERT INTO "{prefix}_results" AS r (~columns, expires_at)
    SELECT i.*, ~now + make_interval(secs => $2::float8)
    FROM unnest(
        $4::text[], $5::text[], $6::jsonb[], $7::timestamptz[], $8::text[], $9::text[],
        $10::jsonb[], $11::jsonb[], $12::text[], $13::integer[], $14::text[], $15::float8[],
        $16::jsonb[], $17::jsonb[]
    ) AS i (~columns)
    ORDER BY i.task_id
    ON CONFLICT (task_id) DO UPDATE SET
        status = excluded.status, result = excluded.result, date_done = excluded.date_done,
        traceback = excluded.traceback, name = excluded.name, args = excluded.args,
        kwargs = excluded.kwargs, worker = excluded.worker, retries = excluded.retries,
        queue = excluded.queue, execution_time = excluded.execution_time,
        children = excluded.children, history = excluded.history,
        expires_at = excluded.expires_at
    WHERE r.status NOT IN ('SUCCESS', 'FAILURE', 'REVOKED') OR NOT ~alive
    RETURNING task_id, status
), news AS (
    SELECT to_json(task_id) AS id, octet_length(to_json(task_id)::text) + 2 AS size, task_id
    FROM kept
    WHERE status IN ('SUCCESS', 'FAILURE', 'REVOKED') AND pg_notification_queue_usage() < 0.9
), parts AS (
    SELECT id, sum(size) OVER (ORDER BY task_id) / 7000 AS part FROM news WHERE size < 900
)
SELECT task_id FROM kept
UNION ALL
SELECT pg_notify($3::text, json_agg(id)::text)::text FROM parts GROUP BY part
UNION ALL
SELECT pg_notify($3::text, '')::text WHERE EXISTS (SELECT FROM news WHERE size >= 900)
""")

# Returns outcomes that have not expired. Locks nothing: it only informs.
LOAD = _timed("""
SELECT ~columns
FROM "{prefix}_results" AS r
WHERE task_id = ANY($2::text[]) AND ~alive
""")

# Deletes outcomes, and counts those that had not expired. Locks their rows,
# as every DELETE does.
FORGET = _timed("""
WITH gone AS (DELETE FROM "{prefix}_results" WHERE task_id = ANY($2::text[]) RETURNING expires_at)
SELECT count(*) AS count FROM gone AS r WHERE ~alive
""")

# Deletes some expired outcomes. Skips locked rows: several processes delete different ones.
SWEEP = _timed("""
WITH old AS (
    SELECT task_id FROM "{prefix}_results" AS r
    WHERE r.expires_at <= ~now
    ORDER BY r.expires_at LIMIT $2::integer
    FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM "{prefix}_results" AS r USING old WHERE r.task_id = old.task_id RETURNING r.task_id
)
SELECT count(*) AS count FROM gone
""")
