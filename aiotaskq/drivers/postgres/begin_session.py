"""Beginning of a session: its socket is kept out of forks, and its isolation level is chosen."""

from __future__ import annotations

from typing import Any

from aiotaskq import forks


async def begin_session(connection: Any, *, isolate: bool) -> None:
    """Prepare a new connection.

    Args:
        connection: One of asyncpg.
        isolate: Whether to see to its isolation level, where its database has another default.
    """
    forks.keep_transport_private(connection._transport)
    if isolate:
        await _choose_isolation(connection)


async def _choose_isolation(connection: Any) -> None:
    """Set the isolation level of a new session, where its database has another default.

    Not behind a pooler, where the session is not ours alone: its server process has another number
    than the one that we were told.
    """
    found = await connection.fetchrow(
        "SELECT current_setting('default_transaction_isolation') AS level, pg_backend_pid() AS pid"
    )
    if found["level"] != "read committed" and found["pid"] == connection.get_server_pid():
        await connection.execute(
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED"
        )
