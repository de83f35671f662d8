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
SPOILT_KEYS = {
    table: (
        f"SELECT {key} FROM ~{table} WHERE {key} >= {LAST_KEY} ORDER BY {key} LIMIT 1000",
        f"SELECT max({key}) FROM ~{table} WHERE {key} < {LAST_KEY}",
        f"UPDATE ~{table} SET {key} = ? WHERE {key} = ?",
    )
    for table, key in _KEYS.items()
}
"""For each table: the keys that no driver wrote, the last one that a driver did, and a new key."""

READ_SEQUENCE = "SELECT seq FROM sqlite_sequence WHERE name = ?"
WRITE_SEQUENCE = "UPDATE sqlite_sequence SET seq = ? WHERE name = ?"
