"""Processes of contestants, in groups that end with this process, and their cost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rivals.contestants import Contestant, Failed
from tests.servers import Watchdog

STOP_TIMEOUT = 5.0  # seconds


class GroupWatchdog(Watchdog):
    """Kills process groups if this process ends before it has stopped them.

    A group is added by its negative number, as `kill` has it.
    """

    _SCRIPT = """
        pids=
        while read -r line; do pids=$line; done
        [ -n "$pids" ] || exit 0
        kill -s TERM -- $pids
        sleep 1
        kill -s KILL -- $pids
    """


class Group:
    """A process with all its children, in their own session."""

    def __init__(self, command: list[str], environment: dict[str, str], watchdog: Watchdog) -> None:
        # Files and no pipes: nobody reads while it runs. A folder of its own: some leave files.
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        self._watchdog = watchdog
        with self._path("out").open("wb") as out, self._path("err").open("wb") as err:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder.name,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        watchdog.add(-self.process.pid)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def output(self) -> str:
        return self._path("out").read_text(errors="replace")

    @property
    def errors(self) -> str:
        """The end of its error output."""
        return (self._path("err").read_text(errors="replace") or self.output)[-1000:]

    def tree(self) -> list[psutil.Process]:
        """Return its running processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def close(self) -> None:
        """Ask it to end, and kill it if it does not."""
        if self.running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._watchdog.discard(-self.process.pid)
        self.folder.cleanup()

    def _path(self, name: str) -> Path:
        return Path(self.folder.name) / name


def ask(
    one: Contestant, watchdog: Watchdog, timeout: float, *words: str, **variables: str
) -> dict[str, Any]:
    """Run a command of a contestant's `bench`, and return its answer.

    Raises:
        Failed: It failed, or took longer than `timeout` seconds.
    """
    group = Group(one.command(*words), one.variables(**variables), watchdog)
    try:
        group.process.wait(timeout)
        if group.process.returncode != 0:
            raise Failed(f"{' '.join(words)} failed:\n{group.errors}")
        lines = group.output.splitlines()
        answer: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(words)} took longer than {timeout:.0f} s") from None
    else:
        return answer
    finally:
        group.close()


@contextmanager
def worker_of(
    one: Contestant, workload: str, watchdog: Watchdog, **variables: str
) -> Iterator[Group]:
    """Run a worker of a contestant."""
    group = Group(one.command("worker", workload), one.variables(**variables), watchdog)
    try:
        yield group
    finally:
        group.close()


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the CPU seconds of these processes and of their children that have ended."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def peak_memory(processes: list[psutil.Process]) -> int:
    """Return the sum of the peak resident memory of each process, in bytes."""
    return sum(_peak_of(process) for process in processes)


def _peak_of(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it may end meanwhile
        if not status.exists():
            return process.memory_info().rss  # not Linux: what it has now
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def wait_until(deadline: float, step: float) -> bool:
    """Sleep for `step` seconds; return whether there is time left."""
    time.sleep(step)
    return time.monotonic() < deadline
