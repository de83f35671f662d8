"""A PostgreSQL server."""

from __future__ import annotations

import contextlib
import getpass
import glob
import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.servers.base import Server, ServerFailed, ServerMissing, Watchdog


def owner(what: str) -> pwd.struct_passwd | None:
    """Return the user for a server that refuses to run as root; None: the current one."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerMissing(f"a user other than {getpass.getuser()} to run {what} as")


class PostgresServer(Server):
    """A PostgreSQL server without fsync: it survives being killed, not a power cut.

    Attributes:
        user: A superuser that needs no password.
        guarded_user: A user that needs `guarded_password`, which has to be quoted in a URL.
    """

    name = "postgres"
    user = "aiotaskq"
    guarded_user = "guarded"
    guarded_password = "s3cret/p@ss:word"

    def __init__(self, watchdog: Watchdog) -> None:
        self._binaries = self._find_binaries()
        super().__init__(watchdog)
        self._owner = owner("postgres")
        if self._owner is not None:
            os.chown(self.folder, self._owner.pw_uid, self._owner.pw_gid)
        self._made = 0
        self._has_guarded_user = False
        self._initialise()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database, for the user without a password."""
        return f"postgresql://{self.user}@{self.host}:{self.port}/{database}"

    def guarded_url(self, database: str = "postgres", password: str | None = None) -> str:
        """Return the URL of a database with a password: the right one, or the given one."""
        secret = quote(self.guarded_password if password is None else password, safe="")
        return f"postgresql://{self.guarded_user}:{secret}@{self.host}:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database that both users may use, and return its name."""
        self._made += 1
        name = f"test_{self._made}"
        self.sql(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database and end the connections to it."""
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def sql(self, *statements: str, database: str = "postgres") -> list[str]:
        """Run statements, each in a transaction of its own, and return the lines of their answers.

        Raises:
            ServerFailed: A statement failed.
        """
        given = [part for statement in statements for part in ("-c", statement)]
        done = subprocess.run(
            [*self._psql, "-d", database, "-v", "ON_ERROR_STOP=1", "-qAtX", *given],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
        if done.returncode != 0:
            raise ServerFailed(done.stderr)
        return done.stdout.splitlines()

    @property
    def _psql(self) -> list[str]:
        psql = self._binaries / "psql"
        return [str(psql), "-h", self.host, "-p", str(self.port), "-U", self.user]

    @staticmethod
    def _find_binaries() -> Path:
        found = [
            Path(name).parent
            for pattern in ("/usr/lib/postgresql/*/bin/initdb", "/usr/pgsql-*/bin/initdb")
            for name in glob.glob(pattern)  # noqa: PTH207 - an absolute pattern
        ]
        on_path = shutil.which("initdb")
        if on_path is not None:
            found.append(Path(on_path).resolve().parent)
        complete = [
            folder
            for folder in found
            if all((folder / name).exists() for name in ("initdb", "postgres", "psql"))
        ]
        if not complete:
            raise ServerMissing("postgres (initdb, postgres and psql)")
        return max(complete, key=lambda folder: (len(str(folder)), str(folder)))

    def _spawn_options(self) -> dict[str, Any]:
        if self._owner is None:
            return {}
        return {"user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}

    def _initialise(self) -> None:
        command = [str(self._binaries / "initdb"), "-D", str(self.folder / "data")]
        options = [
            "-U",
            self.user,
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "--no-instructions",
        ]
        done = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            check=False,
            **self._spawn_options(),
        )
        if done.returncode != 0:
            raise ServerFailed(f"initdb failed:\n{done.stderr}")
        (self.folder / "data" / "pg_hba.conf").write_text(
            f"host all {self.guarded_user} 127.0.0.1/32 scram-sha-256\n"
            "host all all 127.0.0.1/32 trust\n"
            "local all all trust\n"
        )

    def start(self) -> None:
        """Start it and wait until it answers; the first time, create the guarded user too."""
        super().start()
        if not self._has_guarded_user:
            self.sql(f"CREATE ROLE {self.guarded_user} LOGIN PASSWORD '{self.guarded_password}'")
            self._has_guarded_user = True

    def _command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "listen_addresses": self.host,
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "100",
            "shared_buffers": "32MB",
            "autovacuum": "off",
            "log_min_messages": "fatal",
        }
        given = [part for key in settings for part in ("-c", f"{key}={settings[key]}")]
        return [str(self._binaries / "postgres"), "-D", str(self.folder / "data"), *given]

    def _answers(self) -> bool:
        with contextlib.suppress(ServerFailed):
            return self.sql("SELECT 1") == ["1"]
        return False

    def _stop_signal(self) -> signal.Signals:
        return signal.SIGINT  # "fast": ends the sessions; SIGTERM would wait for them
