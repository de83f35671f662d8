"""Statements about schedules.

Each change names the revision that the caller has seen, and returns a row if it was made. The row
lock of the change decides between two callers: the second one waits for the first, tests the
revision again, and finds another one.
"""

from __future__ import annotations

from aiotaskq.drivers.postgres.sql.fragments import NOW

# Returns every schedule. Locks nothing: a change tests the revision.
ALL = 'SELECT id, revision, due_at, body FROM "{prefix}_schedules"'
# Returns the schedules of some ids. Locks nothing, likewise.
AMONG = f"{ALL} WHERE id = ANY ($1::text[])"
# Returns the due schedules, and those whose due time is no number, after a row with the time and
# the earliest due time after it. Locks nothing, likewise: any number of schedulers look, and the
# change decides.
DUE = f"""
SELECT NULL AS id, NULL AS revision, NULL::bytea AS body, {NOW} AS now, (
    SELECT due_at FROM "{{prefix}}_schedules" WHERE due_at > {NOW} AND due_at < 'NaN'
    ORDER BY due_at LIMIT 1
) AS due_at
UNION ALL
(
    SELECT id, revision, body, NULL, due_at FROM "{{prefix}}_schedules"
    WHERE due_at <= {NOW} ORDER BY due_at, id LIMIT $2
)
UNION ALL
(
    SELECT id, revision, body, NULL, 0 FROM "{{prefix}}_schedules" WHERE due_at = 'NaN' LIMIT $2
)
"""
# Adds a schedule unless there is one. The unique index makes two that add the same one take turns.
ADD = """
INSERT INTO "{prefix}_schedules" (id, revision, due_at, body) VALUES ($1, $2, $3, $4)
ON CONFLICT (id) DO NOTHING
RETURNING id
"""
# Changes a schedule of a given revision ($5). Locks its row; see above.
CHANGE = """
UPDATE "{prefix}_schedules" SET revision = $2, due_at = $3, body = $4
WHERE id = $1 AND revision = $5
RETURNING id
"""
# Removes a schedule of a given revision. Locks its row; see above.
REMOVE = 'DELETE FROM "{prefix}_schedules" WHERE id = $1 AND revision = $2 RETURNING id'
# Returns a row if there is no such schedule. Locks nothing: there is no row to lock.
IS_ABSENT = """
SELECT WHERE NOT EXISTS (SELECT FROM "{prefix}_schedules" WHERE id = $1)
"""
