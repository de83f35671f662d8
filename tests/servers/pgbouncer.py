"""PgBouncer in front of a PostgreSQL server."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from typing import Any

from tests.servers.base import Server, ServerMissing, Watchdog
from tests.servers.postgres import PostgresServer, owner


class PgBouncer(Server):
    """A PgBouncer; in transaction mode it has fewer connections than clients.

    Args:
        watchdog: Stops it if the tests are killed.
        postgres: The server behind it.
        mode: ``transaction`` or ``session``.
    """

    name = "pgbouncer"

    def __init__(
        self, watchdog: Watchdog, postgres: PostgresServer, *, mode: str = "transaction"
    ) -> None:
        binary = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
        if binary is None:
            raise ServerMissing("pgbouncer")
        super().__init__(watchdog)
        self._binary = binary
        self._postgres = postgres
        self._mode = mode
        self._owner = owner("pgbouncer")
        if self._owner is not None:
            os.chown(self.folder, self._owner.pw_uid, self._owner.pw_gid)
        self._write_settings()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database, with the options for a pooler."""
        user = self._postgres.user
        return f"postgresql://{user}@{self.host}:{self.port}/{database}?statement_cache_size=0"

    def _write_settings(self) -> None:
        postgres = self._postgres
        settings = {
            "listen_addr": self.host,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(self.folder / "users"),
            "pool_mode": self._mode,
            # In session mode each client has a connection for itself.
            "default_pool_size": "3" if self._mode == "transaction" else "40",
            "server_round_robin": "1",
            "log_connections": "0",
            "log_disconnections": "0",
        }
        lines = ["[databases]", f"* = host={postgres.host} port={postgres.port}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        (self.folder / "users").write_text(f'"{postgres.user}" ""\n')
        (self.folder / "settings").write_text("\n".join(lines) + "\n")

    def _spawn_options(self) -> dict[str, Any]:
        if self._owner is None:
            return {}
        return {"user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}

    def _command(self) -> list[str]:
        return [self._binary, str(self.folder / "settings")]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1):
            return True
        return False
