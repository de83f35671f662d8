"""Expressions that several statements share."""

from __future__ import annotations

# The time by the server's clock. Signs of life go by this one even in tests: the offset of the
# clock there stands for time in which nobody gave any.
REAL_NOW = "extract(epoch FROM statement_timestamp())::float8"
NOW = f"({REAL_NOW} + $1::float8)"

# States of a message. A partial index is used only where its condition is repeated word for word.
# The 2 is `SUSPECT` of `aiotaskq.contract.message`.
READY = "consumer IS NULL AND due_at IS NULL AND crashes < 2"
SUSPECT = "consumer IS NULL AND due_at IS NULL AND crashes >= 2"

MOST_CRASHES = 1_000_000_000
"""Crashes above this number are not counted: the column has 32 bits."""


def any_suspect(queues: str) -> str:
    """Return a condition: a suspect waits in one of the queues."""
    return f"""EXISTS (
    SELECT FROM unnest({queues}::text[]) AS q (name), LATERAL (
        SELECT FROM "{{prefix}}_messages" WHERE queue = q.name AND {SUSPECT} LIMIT 1
    ) AS m
)"""


def not_cancelled(message_id: str) -> str:
    """Return a condition: the id is not cancelled.

    While no id is cancelled it costs nothing. Otherwise each id is looked up in the index; with NOT
    EXISTS, the planner could read all cancelled ids first.
    """
    return f"""(
    NOT EXISTS (SELECT FROM "{{prefix}}_cancelled")
    OR (SELECT c.until FROM "{{prefix}}_cancelled" AS c WHERE c.id = {message_id}) IS NULL
)"""
