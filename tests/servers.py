"""Servers of our own for the tests: installed binaries, free ports, temp folders.

They can be killed and started again on the same port with the same data. Only processes that were
started here are ever stopped, by pid. Should the test run itself be killed, a watchdog stops them.
"""

from __future__ import annotations

import contextlib
import getpass
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

LOOPBACK = "127.0.0.1"
START_TIMEOUT = 60.0  # seconds; the machine may be busy
STOP_TIMEOUT = 20.0


class ServerMissing(Exception):
    """The binaries of a server are not installed."""


class ServerFailed(Exception):
    """A server did not start, stop or answer."""


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


class Watchdog:
    """A process that kills the servers if this one ends without having stopped them.

    It reads the pids that are to be killed, one list a line, until the pipe closes.
    """

    # PostgreSQL takes its children along on QUIT; KILL is for those who ignore that.
    _SCRIPT = """
        pids=
        while read -r line; do pids=$line; done
        [ -n "$pids" ] || exit 0
        kill -s QUIT $pids
        sleep 1
        kill -s KILL $pids
    """

    def __init__(self) -> None:
        self._pids: set[int] = set()
        self._process = subprocess.Popen(
            ["sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    @property
    def pids(self) -> frozenset[int]:
        """The processes that are to be there, its own among them."""
        return frozenset(self._pids | {self._process.pid})

    def add(self, pid: int) -> None:
        """Look after a process."""
        self._pids.add(pid)
        self._tell()

    def discard(self, pid: int) -> None:
        """Forget a process, which has ended."""
        self._pids.discard(pid)
        self._tell()

    def close(self) -> None:
        """End the watchdog."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT)

    def _tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, sorted(self._pids))) + "\n")
        self._process.stdin.flush()


class Server:
    """A server process on a port of its own, which it keeps over restarts.

    Attributes:
        host: Always the loopback address.
        port: Where it listens.
        folder: Its data and its log; removed by `close`.
    """

    name = "server"

    def __init__(self, watchdog: Watchdog) -> None:
        self.host = LOOPBACK
        self.port = free_port()
        # Not pytest's temp folder: that one is closed to the user whom PostgreSQL runs as, and
        # a Unix socket's path must be short.
        base = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="aqt-", dir=base if len(base) < 60 else "/tmp"))
        self._watchdog = watchdog
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The server's process.

        Raises:
            ServerFailed: It does not run.
        """
        if self._process is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers; does nothing if it runs."""
        if self.running:
            return
        self._collect()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                text=True,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops the servers
                **self._spawn_options(),
            )
        self._watchdog.add(self._process.pid)
        self._wait_until(self._answers, START_TIMEOUT, "start")

    def stop(self) -> None:
        """Stop it in order; does nothing if it does not run."""
        self._end(self._stop_signal())

    def kill(self) -> None:
        """End it at once, as a power cut would for its process; does nothing if it does not run."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it in order and start it again, same port, same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _spawn_options(self) -> dict[str, Any]:
        return {}

    def _stop_signal(self) -> signal.Signals:
        return signal.SIGTERM

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)  # in case it is paused
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_TIMEOUT)
        self._collect()

    def _collect(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._watchdog.discard(self._process.pid)
            self._process = None

    def _wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if not self.running or time.monotonic() > end:
                self._end(signal.SIGKILL)
                text = self._log.read_text(errors="replace")[-2000:]
                raise ServerFailed(f"{self.name} did not {what}:\n{text}")
            time.sleep(0.02)


class RedisServer(Server):
    """A Redis server that writes every command to disk before it answers, unless told not to."""

    name = "redis-server"
    databases = 64

    def __init__(self, watchdog: Watchdog, *, durable: bool = True) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise ServerMissing("redis-server")
        super().__init__(watchdog)
        self._binary = binary
        self._durable = durable

    def url(self, database: int = 0) -> str:
        """Where a database of it is."""
        return f"redis://{self.host}:{self.port}/{database}"

    def flush(self, database: int | None = None) -> None:
        """Empty one database, or all."""
        if database is None:
            self.command("FLUSHALL")
        else:
            self.command(f"SELECT {database}", "FLUSHDB")

    def command(self, *lines: str) -> list[str]:
        """Send inline commands; return the first line of each answer.

        Raises:
            ServerFailed: One answered with an error.
        """
        with (
            socket.create_connection((self.host, self.port), timeout=10) as connection,
            connection.makefile("rb") as answers,
        ):
            connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
            replies = [answers.readline().decode().strip() for _ in lines]
        for reply in replies:
            if not reply or reply.startswith("-"):
                raise ServerFailed(f"redis-server answered {reply!r}")
        return replies

    def _command(self) -> list[str]:
        options = {
            "bind": self.host,
            "port": str(self.port),
            "dir": str(self.folder),
            "databases": str(self.databases),
            "save": "",
            "appendonly": "yes" if self._durable else "no",
            "appendfsync": "always",
            "daemonize": "no",
        }
        return [self._binary, *(part for key in options for part in (f"--{key}", options[key]))]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, ServerFailed):
            return self.command("PING") == ["+PONG"]
        return False


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
        self._owner = self._find_owner()
        if self._owner is not None:
            os.chown(self.folder, self._owner.pw_uid, self._owner.pw_gid)
        self._made = 0
        self._initialise()

    def url(self, database: str = "postgres") -> str:
        """Where a database of it is, for the user without a password."""
        return f"postgresql://{self.user}@{self.host}:{self.port}/{database}"

    def guarded_url(self, database: str = "postgres", password: str | None = None) -> str:
        """Where a database of it is, with a password: the right one unless another is given."""
        secret = quote(self.guarded_password if password is None else password, safe="")
        return f"postgresql://{self.guarded_user}:{secret}@{self.host}:{self.port}/{database}"

    def create_database(self) -> str:
        """Make an empty database, open to both users, and return its name."""
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
            ServerFailed: One failed.
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

    @staticmethod
    def _find_owner() -> pwd.struct_passwd | None:
        """The user to run it as: PostgreSQL refuses to run as root."""
        if os.geteuid() != 0:
            return None
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(name)
        raise ServerMissing(f"a user other than {getpass.getuser()} to run postgres as")

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
        """Start it and wait until it answers; the first time, make the guarded user too."""
        super().start()
        if not self.sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{self.guarded_user}'"):
            self.sql(f"CREATE ROLE {self.guarded_user} LOGIN PASSWORD '{self.guarded_password}'")

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
