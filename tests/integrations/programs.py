"""Programs of this package as real processes, read line by line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from aiotaskq.cli import main
from aiotaskq.processes.lease_keeper_process import PROCESS_TITLE
from tests.integrations.shell import Shell
from tests.process_tree import children

LONG = 120.0  # seconds that a test waits for an event before it fails
COMMAND = (sys.executable, "-m", "aiotaskq")

TASKS = """\
import asyncio, os, signal, sys, time
from aiotaskq import TaskQueue, current_task
app = TaskQueue("tasks"{options})

@app.task
async def add(x: int, y: int) -> int:
    return x + y

@app.task
async def fail(text: str) -> None:
    raise ValueError(text)

@app.task
async def pid() -> int:
    return os.getpid()

@app.task
async def nap(seconds: float, marker: str = "") -> str:
    print("napping", marker, os.getpid(), current_task().attempt, flush=True)
    await asyncio.sleep(seconds)
    return marker
"""


def environment(**more: str) -> dict[str, str]:
    """Return this environment without the settings of aiotaskq."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIOTASKQ_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "NO_COLOR": "1", **more}


class Program:
    """A process whose lines of both streams are gathered as they come."""

    def __init__(self, *arguments: str, folder: Path, **more: str) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=folder,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def line(self, pattern: str, *, after: int = 0, times: int = 1) -> re.Match[str]:
        """Wait for as many lines of this pattern, and return the match of the last one."""
        end = time.monotonic() + LONG
        with self._more:
            while True:
                found = [m for line in self.lines[after:] if (m := re.search(pattern, line))]
                if len(found) >= times:
                    return found[times - 1]
                assert not self._ended, f"it ended without {pattern!r}:\n{self.output}"
                left = end - time.monotonic()
                assert left > 0, f"no {pattern!r} in:\n{self.output}"
                self._more.wait(left)

    @property
    def here(self) -> int:
        """The number of lines so far, for `after`."""
        return len(self.lines)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def children(self) -> list[psutil.Process]:
        """Return the worker processes, each the leader of a process group of its own."""
        found = []
        for child in children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(child.pid) == child.pid:
                    found.append(child)
        return found

    def worker_pids(self, count: int) -> list[int]:
        """Wait until there are so many worker processes, and return their pids."""
        wait_for(lambda: len(self.children()) == count, f"{count} children")
        return sorted(child.pid for child in self.children())

    def lease_keepers(self) -> list[psutil.Process]:
        """Return the processes that keep leases: one, for most of the time."""
        found = []
        for child in children(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == PROCESS_TITLE:
                    found.append(child)
        return found

    def lease_keeper_pid(self) -> int:
        """Wait until there is a lease keeper, and return its pid."""
        wait_for(self.lease_keepers, "a lease keeper")
        [keeper] = self.lease_keepers()
        return keeper.pid

    def all_pids(self) -> list[int]:
        """Return the pids of all processes below it, with a lease keeper among them."""
        self.lease_keeper_pid()
        return [process.pid for process in children(self.pid, recursive=True)]

    def wait(self) -> int:
        """Wait until it and all that hold its output have ended; return the exit status."""
        status = self.process.wait(LONG)
        self._reader.join(LONG)
        assert not self._reader.is_alive(), "somebody still holds its output"
        return status

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        """Kill it and its descendants, as far as they still run."""
        left = children(self.pid, recursive=True)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LONG)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._reader.join(LONG)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Programs:
    """Starts programs in a folder with a ``tasks.py``."""

    def __init__(self, folder: Path, shell: Shell) -> None:
        self.folder = folder
        self._shell = shell
        self._started: list[Program] = []

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def start(self, *arguments: str, **more: str) -> Program:
        program = Program(*arguments, folder=self.folder, **more)
        self._started.append(program)
        return program

    def worker(self, *arguments: str, **more: str) -> Program:
        """Start a worker and wait until it is ready."""
        program = self.start("worker", *(arguments or ("tasks:app",)), **more)
        program.line(r" ready$")
        return program

    def run(
        self,
        *arguments: str,
        typed: str | None = None,
        stdin: str | None = None,
        stdout: str | None = None,
        stderr: str | None = None,
        **more: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; for other streams see `Shell.run`."""
        streams = {"in": stdin, "out": stdout, "err": stderr}
        return self._shell.run(
            *arguments,
            cwd=self.folder,
            env=environment(**more),
            typed=typed,
            timeout=LONG,
            streams={name: to for name, to in streams.items() if to is not None},
        )

    def call(self, *arguments: str) -> str:
        """Send a task and return the printed text."""
        done = self.run("call", "tasks:app", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def close(self) -> None:
        for program in self._started:
            program.close()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(true: object, what: str) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + LONG
    while not true():  # type: ignore[operator]  # a function without arguments
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


def assert_help(command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fail if the help of a command lacks one of these words, or is wider than 80 columns."""
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    printed = capsys.readouterr()
    assert (ended.value.code or 0, printed.err) == (0, "")
    for word in words:
        assert word in " ".join(printed.out.split())
    assert all(len(line) <= 80 for line in printed.out.splitlines())
