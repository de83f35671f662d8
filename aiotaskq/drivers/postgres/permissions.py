"""The least rights that roles of a PostgreSQL server need, by the kind of program.

The statements in the documentation are made from this module, and the tests run as roles with
these rights and no others: they may not create tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

_ALL = "SELECT, INSERT, UPDATE, DELETE"
_STORE = "SELECT, INSERT, UPDATE"


class PostgresRole(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of program, and the rights that its role needs.

    Attributes:
        meaning: The work of the program.
        tables: Rights by table, without the prefix.
    """

    meaning: str
    tables: Mapping[str, str]

    def grants(self, role: str, *, prefix: str = "aiotaskq") -> list[str]:
        """Return the statements that give a role these rights, once the tables exist.

        Args:
            role: The name of the role.
            prefix: The setting `prefix`.
        """
        by_rights: dict[str, list[str]] = {}
        for table, rights in self.tables.items():
            by_rights.setdefault(rights, []).append(f"{prefix}_{table}")
        return [f"GRANT {rights} ON {', '.join(on)} TO {role};" for rights, on in by_rights.items()]


# A sender wakes one of the consumers that wait, and marks it as no longer waiting.
_SEND = {
    "messages": "INSERT",
    "cancelled": "SELECT",
    "recent": _STORE,
    "calls": _STORE,
    "consumers": "SELECT, UPDATE (waiting)",
}
_CLIENT = {
    **_SEND,
    "messages": "SELECT, INSERT, DELETE",
    "cancelled": _ALL,
    "results": _ALL,
}

ROLES: Final[Mapping[str, PostgresRole]] = {
    "all": PostgresRole(
        meaning="does all of what follows",
        tables=dict.fromkeys(
            (
                *("messages", "consumers", "dead", "cancelled", "recent", "calls", "silence"),
                *("schedules", "results"),
            ),
            _ALL,
        ),
    ),
    "sender": PostgresRole(meaning="sends tasks, and does nothing else", tables=_SEND),
    "reader": PostgresRole(
        meaning="reads results, and waits for them", tables={"results": "SELECT"}
    ),
    "client": PostgresRole(
        meaning="sends tasks, waits for results, cancels and forgets: a web application",
        tables=_CLIENT,
    ),
    "worker": PostgresRole(
        meaning="runs tasks, which may do all that a client does",
        tables={
            # UPDATE of dead letters: trimming locks the rows.
            **dict.fromkeys(
                ("messages", "consumers", "dead", "cancelled", "recent", "calls", "results"), _ALL
            ),
            "silence": _STORE,
        },
    ),
    "scheduler": PostgresRole(
        meaning="runs schedules: `aiotaskq scheduler`",
        tables={**_SEND, "schedules": _ALL, "results": "SELECT"},
    ),
    "operator": PostgresRole(
        meaning="uses every command but `worker`",
        # UPDATE: purging locks the rows.
        tables={**_CLIENT, "messages": _ALL, "schedules": _ALL, "dead": "SELECT, DELETE"},
    ),
}
"""The roles of programs, by name."""
