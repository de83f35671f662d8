"""Statements about keys near the largest number, after which SQLite has none to give.

Another program may have written one. Then no row could be added any more: SQLite says that the disk
is full.
"""

from __future__ import annotations

LAST_KEY = 2**62
"""The first key that does not count as one that this driver wrote."""


_KEYS = {"messages": "seq", "consumers": "number", "dead": "seq", "results": "arrival"}
COUNTED = ("consumers", "dead", "results")
"""The tables whose keys never come back: SQLite remembers the last one."""
# The key of a held message is a part of its receipt: it stays until the message is held no more.
_MOVABLE = {"messages": "AND consumer IS NULL"}
SPOILT_KEYS = {
    table: (
        f"""
        SELECT {key} FROM ~{table} WHERE {key} >= ? {_MOVABLE.get(table, "")}
        ORDER BY {key} LIMIT 1000
        """,
        f"SELECT max({key}) FROM ~{table} WHERE {key} < ?",
        f"UPDATE OR IGNORE ~{table} SET {key} = ? WHERE {key} = ?",
    )
    for table, key in _KEYS.items()
}
"""For each table: the keys from one on, the last key before one, and a new key for a row."""

# As a whole number: SQLite takes the largest one for a fraction beyond it.
READ_SEQUENCE = "SELECT CAST(seq AS INTEGER) FROM sqlite_sequence WHERE name = ?"
WRITE_SEQUENCE = "UPDATE sqlite_sequence SET seq = ? WHERE name = ?"
