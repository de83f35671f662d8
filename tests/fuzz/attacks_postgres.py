"""Attacks on a PostgreSQL store: hostile values in each column of each table, and notices."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg

from aiotaskq.testing.fuzz import NOTICES, Attack

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# A row of each table that is right, in SQL.
_UNIQUE = "gen_random_uuid()::text"
ROWS: dict[str, dict[str, str]] = {
    "messages": {"priority": "0", "id": "'odd'", "queue": "'default'", "body": "'{}'"},
    "consumers": {
        "lease": "1",
        "lease_until": "9e9",
        "beat": "0",
        "id": _UNIQUE,
        "name": "'odd'",
        "queues": "'{default}'",
        "about": "'{}'",
    },
    "dead": {
        "died_at": "1",
        "crashes": "0",
        "priority": "0",
        "id": "'odd'",
        "queue": "'default'",
        "reason": "'odd'",
        "details": "'{}'",
        "body": "'{}'",
    },
    "cancelled": {"id": _UNIQUE, "until": "9e9"},
    "recent": {"id": _UNIQUE, "until": "9e9"},
    "calls": {"call_id": _UNIQUE, "until": "9e9"},
    "schedules": {"id": _UNIQUE, "revision": "'odd'", "due_at": "1", "body": "'{}'"},
    "results": {"task_id": _UNIQUE, "status": "'SUCCESS'"},
}
VALUES: dict[str, tuple[str, ...]] = {
    "bigint": ("0", "-1", "9223372036854775807", "-9223372036854775808"),
    "integer": ("0", "-1", "2147483647", "-2147483648"),
    "smallint": ("-1", "32767", "-32768"),
    "double precision": ("'NaN'", "'Infinity'", "'-Infinity'", "1e308", "-1e308", "0"),
    "text": ("''", "repeat('x', 100000)", "E'\\x1b[2J\\n'", "'[['", "'nan'"),
    "bytea": ("''", "'\\xff'", "repeat('[', 100000)::bytea", "'\\x00'"),
    "boolean": ("true", "false"),
    "jsonb": (
        "'null'",
        "'[]'",
        "'\"x\"'",
        "'{\"a\": 1e1000}'",
        "repeat('[', 900) || repeat(']', 900)",
    ),
    "timestamp with time zone": ("'infinity'", "'-infinity'", "'0001-01-01'"),
    "ARRAY": ("'{}'", "'{NULL}'", "'{{a,b},{c,d}}'", "array_fill('x'::text, ARRAY[1000])"),
}
# These say what a row is for; the driver would look for another one.
KEPT = {("consumers", "fenced"), ("migrations", "number")}


async def attacks(connection: Connection) -> list[Attack]:
    """Return the attacks, made over a connection that nothing else uses."""
    found: list[Attack] = []

    def add(statement: str, *arguments: Any) -> None:
        name = f"{statement} {arguments or ''}"[:300]
        found.append(Attack(name, _attack(connection, statement, arguments)))

    columns = await connection.fetch(
        "SELECT table_name, column_name, data_type FROM information_schema.columns"
        " WHERE table_name LIKE 'aiotaskq_%'"
    )
    for table, column, kind in columns:
        name = table.removeprefix("aiotaskq_")
        for value in VALUES.get(kind, ()):
            cast = "text[]" if kind == "ARRAY" else kind
            given = f"({value})::{cast}"
            if name in ROWS:
                row = {**ROWS[name], column: given}
                add(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(row.values())})")
            if name != "migrations" and (name, column) not in KEPT:
                add(f"UPDATE {table} SET {column} = {given}")
    for table in {row["table_name"] for row in columns} - {"aiotaskq_migrations"}:
        add(f"DELETE FROM {table}")
    add("INSERT INTO aiotaskq_migrations (number, name) VALUES (999, 'odd')")
    for notice in NOTICES:
        text = notice.decode(errors="replace")
        for channel in ("results", "wake", "1"):
            add("SELECT pg_notify($1, $2)", f"aiotaskq_{channel}", text)
    return found


def _attack(
    connection: Connection, statement: str, arguments: tuple[Any, ...]
) -> Callable[[], Awaitable[None]]:
    async def make() -> None:
        try:
            await connection.execute(statement, *arguments)
        except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError):
            return  # the server keeps that out itself

    return make
