"""The table of results, and every statement about it."""

from __future__ import annotations

import asyncpg

from aiotaskq.drivers.postgres.link import Connection
from aiotaskq.errors import ConfigError

_LONGEST_PREFIX = 40  # bytes; PostgreSQL cuts names at 63, and the index's is the longest

_CREATE = """
CREATE TABLE IF NOT EXISTS {table} (
    task_id        text PRIMARY KEY,
    status         text NOT NULL,
    result         jsonb,
    date_done      timestamptz,
    traceback      text,
    name           text,
    args           jsonb,
    kwargs         jsonb,
    worker         text,
    retries        integer,
    queue          text,
    execution_time double precision,
    children       jsonb,
    expires_at     timestamptz,
    history        jsonb
);
CREATE INDEX IF NOT EXISTS {index} ON {table} (expires_at) WHERE expires_at IS NOT NULL;
"""

# An earlier release made the table without it.
_EXTEND = "ALTER TABLE {table} ADD COLUMN IF NOT EXISTS history jsonb"
_IS_COMPLETE = """
SELECT EXISTS (
    SELECT FROM pg_attribute
    WHERE attrelid = to_regclass($1) AND attname = 'history' AND NOT attisdropped
)
"""

# In every statement below, the first parameter is the clock's shift in seconds: 0 but in tests.
_NOW = "(now() + make_interval(secs => $1::float8))"
_ALIVE = f"(r.expires_at IS NULL OR r.expires_at > {_NOW})"

# Stores a batch, and tells subscribers the ids of final outcomes, in one statement: no outcome
# without its notice, no notice without its outcome. Rows are taken in the order of their ids, so
# that two batches that share some cannot wait for each other.
# A notice holds a JSON array of ids, below PostgreSQL's 8000 bytes, or nothing: then somebody has
# to look, because an id is too long to be told.
_STORE = """
WITH kept AS (
    INSERT INTO {table} AS r (
        task_id, status, result, date_done, traceback, name, args, kwargs, worker, retries,
        queue, execution_time, children, history, expires_at
    )
    SELECT i.*, {now} + make_interval(secs => $2::float8)
    FROM unnest(
        $4::text[], $5::text[], $6::jsonb[], $7::timestamptz[], $8::text[], $9::text[],
        $10::jsonb[], $11::jsonb[], $12::text[], $13::integer[], $14::text[], $15::float8[],
        $16::jsonb[], $17::jsonb[]
    ) AS i (
        task_id, status, result, date_done, traceback, name, args, kwargs, worker, retries,
        queue, execution_time, children, history
    )
    ORDER BY i.task_id
    ON CONFLICT (task_id) DO UPDATE SET
        status = excluded.status, result = excluded.result, date_done = excluded.date_done,
        traceback = excluded.traceback, name = excluded.name, args = excluded.args,
        kwargs = excluded.kwargs, worker = excluded.worker, retries = excluded.retries,
        queue = excluded.queue, execution_time = excluded.execution_time,
        children = excluded.children, history = excluded.history,
        expires_at = excluded.expires_at
    WHERE r.status NOT IN ('SUCCESS', 'FAILURE', 'REVOKED') OR NOT {alive}
    RETURNING task_id, status
), news AS (
    SELECT to_json(task_id) AS id, octet_length(to_json(task_id)::text) + 2 AS size, task_id
    FROM kept
    WHERE status IN ('SUCCESS', 'FAILURE', 'REVOKED')
), parts AS (
    SELECT id, sum(size) OVER (ORDER BY task_id) / 7000 AS part FROM news WHERE size < 900
)
SELECT task_id FROM kept
UNION ALL
SELECT pg_notify($3::text, json_agg(id)::text)::text FROM parts GROUP BY part
UNION ALL
SELECT pg_notify($3::text, '')::text WHERE EXISTS (SELECT FROM news WHERE size >= 900)
"""

_LOAD = """
SELECT task_id, status, result, date_done, traceback, name, args, kwargs, worker, retries, queue,
    execution_time, children, history
FROM {table} AS r
WHERE task_id = ANY($2::text[]) AND {alive}
"""

_FORGET = """
WITH gone AS (DELETE FROM {table} WHERE task_id = ANY($2::text[]) RETURNING expires_at)
SELECT count(*) AS count FROM gone AS r WHERE {alive}
"""

# A bounded piece of work; several at once take different rows.
_SWEEP = """
WITH old AS (
    SELECT task_id FROM {table} AS r
    WHERE r.expires_at <= {now}
    ORDER BY r.expires_at LIMIT $2::integer
    FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM {table} AS r USING old WHERE r.task_id = old.task_id RETURNING r.task_id
)
SELECT count(*) AS count FROM gone
"""


class Schema:
    """Names and statements under one prefix.

    Attributes:
        channel: Where notices are given.
    """

    def __init__(self, prefix: str) -> None:
        if not prefix or len(prefix.encode()) > _LONGEST_PREFIX or "\0" in prefix:
            raise ConfigError(
                f"the prefix {prefix!r} cannot name a PostgreSQL table:"
                f" it should have 1 to {_LONGEST_PREFIX} bytes"
            )
        self.channel = f"{prefix}_results"
        self.table = _quoted(f"{prefix}_results")
        names = {
            "table": self.table,
            "index": _quoted(f"{prefix}_results_expires_at_idx"),
            "now": _NOW,
            "alive": _ALIVE,
        }
        self._create = _CREATE.format(**names)
        self._extend = _EXTEND.format(**names)
        self.store = _STORE.format(**names)
        self.load = _LOAD.format(**names)
        self.forget = _FORGET.format(**names)
        self.sweep = _SWEEP.format(**names)

    async def prepare(self, connection: Connection) -> None:
        """Make the table, or what it lacks; many processes may do so at once.

        Raises:
            ConfigError: It lacks something, and the user may not change it.
        """
        # Looked for first: a user who may not create tables can use one that is there.
        if await connection.fetchval(_IS_COMPLETE, self.table):
            return
        async with connection.transaction():
            # "IF NOT EXISTS" alone fails when two do it at once.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", self.table
            )
            if await connection.fetchval("SELECT to_regclass($1)::text", self.table) is None:
                await connection.execute(self._create)
            else:
                await self._complete(connection)

    async def _complete(self, connection: Connection) -> None:
        try:
            await connection.execute(self._extend)
        except asyncpg.InsufficientPrivilegeError as error:
            raise ConfigError(
                f"an earlier release made the table {self.table}, and this user may not change it"
                f" ({error}): have its owner run {self._extend}"
            ) from error


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
