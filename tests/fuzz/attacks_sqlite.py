"""Attacks on an SQLite file: values of any type in each column of each table."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from aiotaskq.testing.fuzz import Attack

VALUES = (
    *("NULL", "0", "-1", "9223372036854775807", "-9223372036854775808", "1.5", "9e999", "-9e999"),
    *("''", "'abc'", "'nan'", "x'ff'", "x''", "CAST(x'ff61' AS TEXT)", "'a' || char(0) || 'b'"),
    *("CAST(zeroblob(100000) AS TEXT)", "replace(hex(zeroblob(50000)), '00', '[')", "'a/b/../c'"),
)
# The version of the tables says how all is to be read.
WHERE = {"aiotaskq_meta": "WHERE key != 'schema'"}


def attacks(path: Path) -> list[Attack]:
    """Return the attacks on a file with the tables of this package."""
    found: list[Attack] = []

    def add(statement: str) -> None:
        found.append(Attack(statement, partial(_run, path, statement)))

    with closing(sqlite3.connect(path)) as database:
        tables = [
            name
            for [name] in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if name.startswith("aiotaskq_")
        ]
        columns = {
            table: [
                (name, kind, required and default is None)
                for _, name, kind, required, default, _ in database.execute(
                    f"PRAGMA table_info({table})"
                )
            ]
            for table in tables
        }
    for table, described in columns.items():
        condition = WHERE.get(table, "")
        right = {
            name: {"INTEGER": "0", "REAL": "1.0", "BLOB": "x''"}.get(kind, "hex(randomblob(8))")
            for name, kind, needed in described
            if needed
        }
        if "queue" in right:
            right["queue"] = "'default'"
        for name, _, _ in described:
            for value in VALUES:
                row = {**right, name: value}
                add(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(row.values())})")
                add(f"UPDATE {table} SET {name} = {value} {condition}")
        add(f"DELETE FROM {table} {condition}")
    add("UPDATE sqlite_sequence SET seq = 9223372036854775807")
    add("UPDATE sqlite_sequence SET seq = 'abc'")
    return found


def _run(path: Path, statement: str) -> None:
    # What SQLite itself keeps out is no attack.
    kept_out = suppress(sqlite3.IntegrityError, sqlite3.DataError)
    with closing(sqlite3.connect(path, timeout=30)) as database, kept_out, database:
        database.execute(statement)
