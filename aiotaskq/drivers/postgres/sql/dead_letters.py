"""Statements about dead letters."""

from __future__ import annotations

from aiotaskq.drivers.postgres.sql.fragments import NOW

# Returns letters of a queue below a number, the newest first. Locks nothing: it only informs.
NEWEST = """
SELECT seq, id, body, reason, crashes, died_at, details FROM "{prefix}_dead"
WHERE queue = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3
"""
# Deletes letters and returns those that were there. Their row locks decide between two that revive
# or discard the same letter: the second finds it gone.
REMOVE = 'DELETE FROM "{prefix}_dead" WHERE queue = $1 AND seq = ANY ($2::bigint[]) RETURNING seq'
# Returns the queues with more letters than allowed. Locks nothing: trimming follows in any case.
OVERFULL = """
SELECT queue, count(*) AS count FROM "{prefix}_dead" GROUP BY queue HAVING count(*) > $1
"""
# Deletes the oldest letters of a queue. Skips locked rows: they are being revived or deleted.
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
# Deletes letters above an age ($2), the oldest first. Skips locked rows likewise.
TRIM_OLD = f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_dead" WHERE seq = ANY (ARRAY(
        SELECT seq FROM "{{prefix}}_dead" WHERE died_at <= {NOW} - $2::float8
        ORDER BY died_at LIMIT $3
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING seq
)
SELECT count(*) AS count FROM gone
"""
