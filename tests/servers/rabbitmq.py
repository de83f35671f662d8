"""A RabbitMQ node."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.servers.base import LOOPBACK, Server, ServerFailed, ServerMissing, Watchdog, free_port
from tests.servers.certificates import Certificates

_GREETING = b"AMQP\x00\x00\x09\x01"


class RabbitServer(Server):
    """A RabbitMQ node with an epmd of its own, on the loopback device only.

    Attributes:
        tls_port: The port on which it listens with TLS.
    """

    name = "rabbitmq-server"

    def __init__(self, watchdog: Watchdog, certificates: Certificates) -> None:
        """Prepare its folder and its configuration.

        Args:
            watchdog: Ends its processes if the tests are killed.
            certificates: For TLS.
        """
        self._scripts = _find_scripts()
        self._erl_call = _find_tool("erl_call")
        epmd = _find_tool("epmd")
        super().__init__(watchdog)
        self._node = f"aqt{self.port}@localhost"
        self._epmd_port = free_port()
        self.tls_port = free_port()
        settings = (
            f"listeners.tcp.1 = {self.host}:{self.port}",
            "log.console.level = error",
            f"listeners.ssl.1 = {self.host}:{self.tls_port}",
            f"ssl_options.cacertfile = {certificates.authority}",
            f"ssl_options.certfile = {certificates.certificate}",
            f"ssl_options.keyfile = {certificates.key}",
            "ssl_options.verify = verify_peer",
            "ssl_options.fail_if_no_peer_cert = false",
        )
        (self.folder / "rabbitmq.conf").write_text("".join(f"{line}\n" for line in settings))
        (self.folder / "plugins").write_text("[].\n")
        self._environment = self._make_environment(free_port())
        self._epmd = subprocess.Popen(
            [epmd, "-port", str(self._epmd_port), "-address", self.host],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        watchdog.add(self._epmd.pid)

    def url(self, *, user: str = "guest", password: str = "guest", query: str = "") -> str:
        """Return its URL."""
        return f"amqp://{user}:{password}@{self.host}:{self.port}/{query}"

    def tls_url(self, query: str = "") -> str:
        """Return its URL with TLS."""
        return f"amqps://guest:guest@localhost:{self.tls_port}/{query}"

    def evaluate(self, expression: str) -> str:
        """Evaluate an Erlang expression on the node; return the result as Erlang writes it.

        It is much faster than `rabbitmqctl`.

        Raises:
            ServerFailed: The expression failed.
        """
        cookie = (self.folder / ".erlang.cookie").read_text().strip()
        done = subprocess.run(
            [self._erl_call, "-sname", self._node, "-c", cookie, "-timeout", "30", "-e"],
            env=self._environment,
            cwd=self.folder,
            input=f"{expression}.\n",
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        if done.returncode != 0 or not done.stdout.startswith("{ok, "):
            raise ServerFailed(done.stdout + done.stderr)
        return done.stdout.strip().removeprefix("{ok, ").removesuffix("}")

    def close_connections(self) -> None:
        """Close all connections of clients, as an operator can."""
        self.evaluate(
            'rabbit_networking:close_connections(rabbit_networking:connections(), "by a test")'
        )

    def close(self) -> None:
        """End it and its epmd, and remove its folder."""
        super().close()
        self._epmd.kill()
        self._epmd.wait()
        self._watchdog.discard(self._epmd.pid)

    def _make_environment(self, distribution: int) -> dict[str, str]:
        folder = str(self.folder)
        return {
            **{name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ},
            "HOME": folder,  # for the cookie
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/environment",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/logs",
            "RABBITMQ_LOGS": "-",
            # Few threads, which do not spin while idle: the machine is shared.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 2:2 +SDcpu 1 +SDio 1 +sbwt none +sbwtdcpu none +sbwtdio none"
                " -kernel inet_dist_use_interface {127,0,0,1}"
                # It looks for deliveries that are held too long each second instead of each minute.
                " -rabbit channel_tick_interval 1000"
                # After a restart a queue may have to send a message to another that is not ready
                # yet: it tries again in two seconds instead of three minutes.
                " -rabbit dead_letter_worker_publisher_confirm_timeout 2000"
            ),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            # Then the script becomes the server, instead of waiting for it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _command(self) -> list[str]:
        return [str(self._scripts / "rabbitmq-server")]

    def _spawn_options(self) -> dict[str, Any]:
        return {"env": self._environment}

    def _answers(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((self.host, self.port), timeout=5) as connection,
        ):
            connection.sendall(_GREETING)
            return connection.recv(1) == b"\x01"
        return False


def _find_scripts() -> Path:
    """Return the folder of the scripts; those of Debian on the path need another user."""
    found = glob.glob("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server")  # noqa: PTH207 - an absolute pattern
    on_path = shutil.which("rabbitmq-server")
    if on_path is not None:
        found.insert(0, on_path)
    for name in reversed(found):
        folder = Path(name).parent
        if (folder / "rabbitmqctl").exists():
            return folder
    raise ServerMissing("rabbitmq-server")


def _find_tool(name: str) -> str:
    pattern = f"/usr/lib/erlang/**/bin/{name}"
    found = shutil.which(name) or next(glob.iglob(pattern, recursive=True), None)  # noqa: PTH207 - an absolute pattern
    if found is None:
        raise ServerMissing(f"{name} (of Erlang)")
    return found
