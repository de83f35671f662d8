"""The base of the servers: a process, a port and a folder, and the watchdog of all servers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
START_TIMEOUT = 180.0  # seconds; the machine may be busy
STOP_TIMEOUT = 120.0


class ServerMissing(Exception):
    """The binaries of a server are not installed."""


class ServerFailed(Exception):
    """A server did not start, stop or answer."""


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


class Watchdog:
    """A process that kills the servers if this process ends without having stopped them.

    It reads the pids of the servers, one list a line, and kills the last list when the pipe closes.
    """

    # PostgreSQL ends its children on QUIT; KILL is for servers that ignore QUIT.
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
        """The pids of the servers and of the watchdog itself."""
        return frozenset(self._pids | {self._process.pid})

    def add(self, pid: int) -> None:
        """Add a process."""
        self._pids.add(pid)
        self._tell()

    def discard(self, pid: int) -> None:
        """Remove a process that has ended."""
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
        port: The port on which it listens.
        folder: Its data and its log; removed by `close`.
    """

    name = "server"

    def __init__(self, watchdog: Watchdog) -> None:
        self.host = LOOPBACK
        self.port = free_port()
        # Not the folder of pytest, which the user of PostgreSQL may not read; and the path of a
        # Unix socket must be short.
        base = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="aqt-", dir=base if len(base) < 60 else "/tmp"))
        self._watchdog = watchdog
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The process of the server.

        Raises:
            ServerFailed: It does not run.
        """
        if self._process is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Return whether its process runs."""
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
                start_new_session=True,  # Ctrl-C is for pytest, which stops the servers
                **self._spawn_options(),
            )
        self._watchdog.add(self._process.pid)
        self._wait_until(self._answers, START_TIMEOUT, "start")

    def stop(self) -> None:
        """Stop it in order; does nothing if it does not run."""
        self._end(self._stop_signal())

    def kill(self) -> None:
        """Kill it; does nothing if it does not run."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it in order and start it again, same port, same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay, and get no answer."""
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
