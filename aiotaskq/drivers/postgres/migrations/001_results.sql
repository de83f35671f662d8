-- The first releases had no table of migrations, and the very first made this table without the
-- column history. Such a table is kept and completed.
CREATE TABLE IF NOT EXISTS "{prefix}_results" (
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
ALTER TABLE "{prefix}_results" ADD COLUMN IF NOT EXISTS history jsonb;
CREATE INDEX IF NOT EXISTS "{prefix}_results_expires_at_idx"
    ON "{prefix}_results" (expires_at) WHERE expires_at IS NOT NULL;
