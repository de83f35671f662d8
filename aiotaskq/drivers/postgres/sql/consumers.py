"""Statements about consumers: their leases, waiting flags and end, and sweeping of old records."""

from __future__ import annotations

from aiotaskq.drivers.postgres.sql.fragments import NOW, REAL_NOW, any_suspect

# --- signs of life and leases: other programs may have written any number into these columns

_AHEAD = 10.0  # seconds by which a sign of life may lie ahead, where the clock was set back
_LONGEST_LEASE = 100.0 * 365 * 86_400  # seconds
_LEASE_AHEAD = 86_400.0  # seconds by which the end of a lease may lie ahead, likewise

# The last sign of life. One in the future would hide every silence until then.
_LAST_BEAT = f"max(beat) FILTER (WHERE beat <= {REAL_NOW} + {_AHEAD})"
_IS_LEASE = f"lease > 0 AND lease <= {_LONGEST_LEASE}"
_LEASE = f"CASE WHEN {_IS_LEASE} THEN lease ELSE 0 END"
# A lease that ends much later than a new one would has lapsed, too: it would never lapse by itself.
# So has one whose end is NaN, which is greater than every number.
_LAPSED = f"(lease_until <= {NOW} OR lease_until > {NOW} + {_LEASE} + {_LEASE_AHEAD})"


def _bounded(lease: str) -> str:
    return f"least({lease}::float8, {_LONGEST_LEASE})"


# --- waiting and notifying: the flags are soft state, so their commits do not wait for the disk ---

# Marks a consumer as waiting; returns no row if it was marked. Locks its row, but no key, and so
# never waits for a fetch.
SET_WAITING = """
UPDATE "{prefix}_consumers" SET waiting = true
WHERE number = $1 AND NOT waiting
RETURNING set_config('synchronous_commit', 'off', true)
"""
# Marks a consumer as not waiting; returns no row if a notice to it is on its way. Locks likewise.
CLEAR_WAITING = """
UPDATE "{prefix}_consumers" SET waiting = false
WHERE number = $1 AND waiting
RETURNING set_config('synchronous_commit', 'off', true)
"""
# Sends a notice to each of some waiting consumers and clears their flags, so that each is notified
# once. Locks them in their order, against deadlocks, and no keys, so as not to wait for fetches.
NOTIFY_WAITING = """
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

# --- one consumer ---

# Begins a lease, once however often it is repeated. The new row concerns nobody before the commit.
# Runs under `LOCK_SILENCE`.
ADD_CONSUMER = f"""
INSERT INTO "{{prefix}}_consumers" (id, name, queues, about, lease, lease_until, beat)
VALUES ($2, $3, $4::text[], $5, {_bounded("$6")}, {NOW} + {_bounded("$6")}, {REAL_NOW})
ON CONFLICT (id, fenced) DO UPDATE SET lease_until = excluded.lease_until, beat = excluded.beat
RETURNING number, (SELECT {_LAST_BEAT} FROM "{{prefix}}_consumers") AS last_beat,
    extract(epoch FROM pg_postmaster_start_time())::float8 AS started
"""
# Raises the floor of the tokens that a consumer may fetch with. FOR UPDATE, and so waits for a
# fetch that still runs in the server; a later one with an older token takes nothing.
RAISE_FLOOR = """
UPDATE "{prefix}_consumers" SET floor = $2
WHERE number IN (
    SELECT number FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced FOR UPDATE
)
RETURNING number
"""
# Tells whether suspects wait and whether any id is cancelled. Locks nothing: it only informs.
NEWS = f"""
SELECT {any_suspect("$2")} AS suspects, EXISTS (SELECT FROM "{{prefix}}_cancelled") AS cancels
FROM "{{prefix}}_consumers" WHERE number = $1 AND NOT fenced
"""
# Returns a row if the consumer is not fenced. Locks nothing: it proves that the consumer was not
# fenced before, which is all that is asked.
IS_ALIVE = 'SELECT FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced'
# Locks a consumer that closes. FOR UPDATE waits for a fetch that still runs, and keeps others out.
LOCK_CONSUMER = 'SELECT FROM "{prefix}_consumers" WHERE number = $1 AND NOT fenced FOR UPDATE'
# Removes a consumer that holds nothing. Runs under `LOCK_CONSUMER`.
REMOVE_CONSUMER = 'DELETE FROM "{prefix}_consumers" WHERE number = $1'
# Returns the consumers whose leases run. Locks nothing: it only informs.
LIVE_CONSUMERS = f"""
SELECT id, queues, about FROM "{{prefix}}_consumers" WHERE NOT fenced AND lease_until > {NOW}
"""

# --- leases ---

_SILENCE = f'{REAL_NOW} - (SELECT coalesce({_LAST_BEAT}, 0) FROM "{{prefix}}_consumers")'
# Renews a lease; returns how long no consumer had given a sign of life. Changes no key, and so does
# not wait for a fetch. Runs under `LOCK_SILENCE`.
RENEW = f"""
UPDATE "{{prefix}}_consumers" SET lease_until = {NOW} + {_bounded("$3")}, beat = {REAL_NOW}
WHERE id = $2 AND NOT fenced
RETURNING {_SILENCE} AS silence
"""
# Renews a lease unless there was a silence; the usual case. The last condition is that of
# `aiotaskq.drivers.common.clock.is_stall`; here it saves a second statement. Locks the row alone,
# and no key: signs of life neither wait for one another nor for fetches.
RENEW_UNLESS_SILENT = f"""
UPDATE "{{prefix}}_consumers" SET lease_until = {NOW} + {_bounded("$3")}, beat = {REAL_NOW}
WHERE id = $2 AND NOT fenced AND {_SILENCE} <= $3::float8 / 2
RETURNING number
"""
# Fences a consumer whose process is known to be dead. Changes a key, and so waits for its fetch.
FENCE_ONE = """
UPDATE "{prefix}_consumers" SET fenced = true, crash_note = $2
WHERE id = $1 AND NOT fenced
RETURNING number
"""
# Locks the record of silences and returns how long the current one is. FOR UPDATE: one transaction
# at a time decides about lapsed leases, or ends a silence.
LOCK_SILENCE = f"""
SELECT {REAL_NOW} - CASE WHEN spared = last THEN seen ELSE last END AS seconds
FROM "{{prefix}}_silence" AS s, LATERAL (
    SELECT coalesce({_LAST_BEAT}, 0) AS last FROM "{{prefix}}_consumers"
) AS beats
FOR UPDATE OF s
"""
# Lets one transaction at a time promote messages. A second one would skip what the first is
# promoting, and its fetch would bring less than there is. It begins with this lock, so that its
# later statements see what the first one committed.
LOCK_PROMOTION = 'SELECT FROM "{prefix}_silence" FOR UPDATE'
# Returns how many of some consumers are not fenced, and their longest lease; NULL if none of them
# has one that a consumer could have been given. Runs under `LOCK_SILENCE`.
LONGEST_LEASE = f"""
SELECT count(*) AS count, max(lease) FILTER (WHERE {_IS_LEASE}) AS longest
FROM "{{prefix}}_consumers" WHERE number = ANY ($1::bigint[]) AND NOT fenced
"""
# Gives every consumer another lease. Changes no key, and so does not wait for fetches. Runs under
# `LOCK_SILENCE`.
EXTEND_LEASES = f"""
UPDATE "{{prefix}}_consumers"
SET lease_until = CASE WHEN {_LAPSED} THEN {NOW} + {_LEASE}
    ELSE greatest(lease_until, {NOW} + {_LEASE}) END
WHERE NOT fenced
"""
# Records that leases were extended in the current silence. Runs under `LOCK_SILENCE`.
NOTE_EXTENSION = f"""
UPDATE "{{prefix}}_silence"
SET spared = (SELECT coalesce({_LAST_BEAT}, 0) FROM "{{prefix}}_consumers"), seen = {REAL_NOW}
"""
# Records when the server last answered, in a silence in which leases were extended. Locks the row,
# as every UPDATE does, but only for a moment: it is a transaction of its own.
NOTE_CHECK = f'UPDATE "{{prefix}}_silence" SET seen = {REAL_NOW}'
# Fences consumers whose leases have lapsed. Tests that again, because one may have been renewed;
# changes a key, and so waits for their fetches. Runs under `LOCK_SILENCE`.
FENCE_LAPSED = f"""
UPDATE "{{prefix}}_consumers"
SET fenced = true, crash_note = name || ': its lease ran out'
WHERE number = ANY ($2::bigint[]) AND NOT fenced AND {_LAPSED}
"""
# Returns those of some consumers that are fenced. Locks nothing: fencing is never undone.
FENCED_AMONG = """
SELECT number FROM "{prefix}_consumers"
WHERE number = ANY ($1::bigint[]) AND fenced ORDER BY number
"""
# Removes a fenced consumer that holds nothing any more. Fenced, it can take nothing; and two that
# remove it at once find one row.
REMOVE_FENCED = """
DELETE FROM "{prefix}_consumers"
WHERE number = $1 AND fenced
    AND NOT EXISTS (SELECT FROM "{prefix}_messages" WHERE consumer = $1)
"""

# --- maintain ---

# Tells what there is to do; $2 the longest age of dead letters. Locks nothing: each task of
# maintenance tests again what it finds.
OVERVIEW = f"""
SELECT EXISTS (SELECT FROM "{{prefix}}_messages" WHERE due_at <= {NOW}) AS is_due,
    ARRAY(
        SELECT number FROM "{{prefix}}_consumers" WHERE fenced OR {_LAPSED}
        ORDER BY number LIMIT 100
    ) AS lapsed,
    (
        SELECT count(*) > 0 AND s.spared = coalesce({_LAST_BEAT}, 0) FROM "{{prefix}}_consumers"
    ) AS is_spared,
    s.single IS NULL AS is_silence_missing,
    (SELECT max(seq) FROM "{{prefix}}_dead") AS newest_dead,
    EXISTS (SELECT FROM "{{prefix}}_dead" WHERE died_at <= {NOW} - $2::float8) AS any_outdated
FROM (SELECT) AS one LEFT JOIN "{{prefix}}_silence" AS s ON true
"""
# Makes the one row of silences, where somebody has deleted it.
ADD_SILENCE = 'INSERT INTO "{prefix}_silence" DEFAULT VALUES ON CONFLICT DO NOTHING'


def _sweep(table: str, key: str) -> str:
    return f"""
WITH gone AS (
    DELETE FROM "{{prefix}}_{table}"
    WHERE {key} = ANY (ARRAY(
        SELECT {key} FROM "{{prefix}}_{table}" WHERE until <= {NOW} ORDER BY until LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING {key}
)
SELECT count(*) AS count FROM gone
"""


# Delete some outdated records of calls, unique ids and cancelled ids. Skip locked rows: several
# processes that sweep at once delete different ones.
SWEEPS = (_sweep("calls", "call_id"), _sweep("recent", "id"), _sweep("cancelled", "id"))
