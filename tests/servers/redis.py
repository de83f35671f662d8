"""A Redis server."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Sequence
from typing import ClassVar

from aiotaskq.drivers.redis.permissions import ROLES
from tests.servers.base import Server, ServerFailed, ServerMissing, Watchdog


class RedisServer(Server):
    """A Redis server that writes each command to disk before it answers, unless not durable.

    Args:
        watchdog: Ends it if the tests are killed.
        durable: Whether its data survives its end.
        options: More options, as in redis.conf.

    Attributes:
        limited: The user and the password before the @ of a URL, of a user that may do only what
            aiotaskq needs.
    """

    name = "redis-server"
    databases = 64
    limited: ClassVar[str] = "limited:pass"
    topology_commands: ClassVar[Sequence[str]] = ("role", "wait")

    def __init__(
        self, watchdog: Watchdog, *, durable: bool = True, options: dict[str, str] | None = None
    ) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise ServerMissing("redis-server")
        super().__init__(watchdog)
        self._binary = binary
        self._durable = durable
        users = self.folder / "users.acl"
        self._options = {"aclfile": str(users), **(options or {})}
        user, _, password = self.limited.partition(":")
        users.write_text(
            "user default on nopass ~* &* +@all\n"
            f"user {user} on >{password} {' '.join(self._rules())}\n"
        )

    def url(self, database: int = 0, *, account: str = "") -> str:
        """Return the URL of a database; an account is a user and a password."""
        return f"redis://{account and f'{account}@'}{self.host}:{self.port}/{database}"

    def _rules(self) -> list[str]:
        return ROLES["all"].rules(more=self.topology_commands)

    def flush(self, database: int | None = None) -> None:
        """Delete all keys of one database, or of all."""
        if database is None:
            self.command("FLUSHALL")
        else:
            self.command(f"SELECT {database}", "FLUSHDB")

    def command(self, *lines: str) -> list[str]:
        """Send inline commands; return the first line of each answer.

        Raises:
            ServerFailed: A command was answered with an error.
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

    def bulk(self, line: str) -> str:
        """Send an inline command that is answered with a text; return the text.

        Raises:
            ServerFailed: It answered with something else.
        """
        with (
            socket.create_connection((self.host, self.port), timeout=10) as connection,
            connection.makefile("rb") as answers,
        ):
            connection.sendall(f"{line}\r\n".encode())
            head = answers.readline().decode().strip()
            if not head.startswith("$"):
                raise ServerFailed(f"redis-server answered {head!r}")
            return answers.read(int(head[1:])).decode()

    def info(self, section: str) -> dict[str, str]:
        """Return the fields of the answer to INFO."""
        pairs = (line.partition(":") for line in self.bulk(f"INFO {section}").splitlines())
        return {name: value for name, colon, value in pairs if colon}

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
            **self._options,
        }
        return [self._binary, *(part for key in options for part in (f"--{key}", options[key]))]

    def _answers(self) -> bool:
        # Another process may have taken the port meanwhile, and answer in its place.
        with contextlib.suppress(OSError, ServerFailed):
            is_it = self.info("server")["process_id"] == str(self.pid)
            return is_it and self.command("PING") == ["+PONG"]
        return False
