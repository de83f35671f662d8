"""A Redis master, its replicas, and the sentinels that promote a replica."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence

from tests.servers.base import (
    START_TIMEOUT,
    ServerFailed,
    ServerMissing,
    Watchdog,
)
from tests.servers.redis import RedisServer

SERVICE = "mymaster"
_PORT = re.compile(r"address=[^,]*:(\d+),")
# Milliseconds until a sentinel takes a silent master for dead. On a busy machine a living master
# may be silent for a while, so the time is short only during a failover on purpose.
_BRISK, _CALM = 1000, 20_000


class SentinelServer(RedisServer):
    """One sentinel, which keeps its state in its configuration file.

    Args:
        watchdog: Ends it if the tests are killed.
        port: Of the master.
        quorum: The number of sentinels that have to agree on a dead master.
        options: More options, as in sentinel.conf.
    """

    name = "redis-sentinel"

    def __init__(
        self, watchdog: Watchdog, port: int, quorum: int, options: Sequence[str] = ()
    ) -> None:
        super().__init__(watchdog)
        self.identity = f"{uuid.uuid4().hex}{uuid.uuid4().hex[:8]}"
        self.conf = self.folder / "sentinel.conf"
        self._write(
            f"bind {self.host}",
            f"port {self.port}",
            f"dir {self.folder}",
            *options,
            f"sentinel myid {self.identity}",
            f"sentinel monitor {SERVICE} {self.host} {port} {quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {_CALM}",
            f"sentinel failover-timeout {SERVICE} 4000",
            f"sentinel parallel-syncs {SERVICE} 2",
        )

    def introduce(
        self, replicas: Sequence[RedisServer], sentinels: Sequence[SentinelServer]
    ) -> None:
        """Write the other servers into its configuration, which saves it some seconds."""
        self._write(
            *(f"sentinel known-replica {SERVICE} {one.host} {one.port}" for one in replicas),
            *(
                f"sentinel known-sentinel {SERVICE} {one.host} {one.port} {one.identity}"
                for one in sentinels
                if one is not self
            ),
        )

    def _write(self, *lines: str) -> None:
        with self.conf.open("a") as conf:
            conf.writelines(f"{line}\n" for line in lines)

    def _command(self) -> list[str]:
        return [self._binary, str(self.conf), "--sentinel"]


class SentinelSet:
    """Three Redis servers, one of them the master, and three sentinels.

    Args:
        watchdog: Ends them if the tests are killed.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        if shutil.which("redis-server") is None:
            raise ServerMissing("redis-server")
        options = {
            "appendfsync": "no",
            "repl-diskless-sync-delay": "0",
            "repl-backlog-size": "16mb",
        }
        first = RedisServer(watchdog, options=options)
        follow = {"replicaof": f"{first.host} {first.port}"}
        self.servers = [
            first,
            *(RedisServer(watchdog, options=options | follow) for _ in "23"),
        ]
        self.sentinels = [SentinelServer(watchdog, first.port, 2) for _ in "123"]
        for one in self.sentinels:
            one.introduce(self.servers[1:], self.sentinels)

    @property
    def url(self) -> str:
        """The URL for drivers."""
        places = ",".join(f"{one.host}:{one.port}" for one in self.sentinels)
        return f"redis+sentinel://{places}/0?service={SERVICE}"

    @property
    def limited_url(self) -> str:
        """The URL for a user with the least permissions that aiotaskq needs."""
        return self.url.replace("://", f"://{RedisServer.limited}@")

    @property
    def master(self) -> RedisServer:
        """The server that accepts writes; of several, the one that most replicas follow.

        Raises:
            ServerFailed: There is none now.
        """
        masters = [one for one in self.servers if one.running and _role(one) == "master"]
        if not masters:
            raise ServerFailed("there is no master")
        return max(masters, key=lambda one: int(one.info("replication")["connected_slaves"]))

    def start(self) -> None:
        """Start all servers, and wait until there is one master with two replicas."""
        for server in (*self.servers, *self.sentinels):
            server.start()
        wait_until(self._is_whole, "become whole")
        self._set_patience(_CALM)

    def fail_over(self) -> RedisServer:
        """Kill the master; return the promoted server."""
        dead = self.master
        self._set_patience(_BRISK)
        dead.kill()
        wait_until(lambda: self._named() not in (None, dead.port), "fail over")
        return next(one for one in self.servers if one.port == self._named())

    def flush(self) -> None:
        """Delete all keys."""
        self.master.flush()

    def stop(self) -> None:
        """Stop all servers, not the sentinels."""
        for server in self.servers:
            server.kill()

    def close(self) -> None:
        """End all."""
        for server in (*self.sentinels, *self.servers):
            server.close()

    def _set_patience(self, milliseconds: int) -> None:
        for one in self.sentinels:
            one.command(f"SENTINEL SET {SERVICE} down-after-milliseconds {milliseconds}")

    def _followers(self) -> int:
        """Return the number of replicas that have all data, except the latest changes."""
        facts = self.master.info("replication")
        return sum("state=online" in facts.get(f"slave{number}", "") for number in range(2))

    def _named(self) -> int | None:
        """Return the port of the master for most sentinels, if it is a master."""
        named = [_PORT.search(one.info("sentinel")["master0"]) for one in self.sentinels]
        ports = [int(found[1]) for found in named if found is not None]
        port = max(set(ports), key=ports.count)
        server = next(one for one in self.servers if one.port == port)
        agreed = ports.count(port) >= 2 and server.running and _role(server) == "master"
        return port if agreed else None

    def _is_whole(self) -> bool:
        """Return whether all are ready; sentinels have to know each other for a vote."""
        port = self._named()
        if port is None:
            return False
        for server in self.servers:
            # The sentinels would do the same within ten seconds.
            if server.port != port and _role(server) == "master":
                server.command(f"REPLICAOF {server.host} {port}")
        told = [one.info("sentinel")["master0"] for one in self.sentinels]
        return (
            self.master.port == port
            and self._followers() == 2
            and all("status=ok" in one and "slaves=2,sentinels=3" in one for one in told)
        )


def _role(server: RedisServer) -> str:
    with contextlib.suppress(OSError, ServerFailed):
        return server.info("replication")["role"]
    return "away"


def wait_until(condition: Callable[[], bool], what: str, timeout: float = START_TIMEOUT) -> None:
    """Wait until several servers together are in some state."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise ServerFailed(f"the servers did not {what}")
        time.sleep(0.05)
