"""Programs that run as processes, with their own environment, and their output."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE = 120.0  # seconds; the machine may be busy
ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def environment(**more: str) -> dict[str, str]:
    """Return an environment without settings of aiotaskq, with this installation first in PATH.

    Variables of make are removed too: a make that a test starts is not part of an outer make.
    """
    foreign = ("AIOTASKQ_", "PYTHON", "MAKE", "MFLAGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Without a terminal, Python would buffer its output until it ends.
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", **more}


class Program:
    """A running program; its output is read while it runs.

    Args:
        command: A shell line, or the words of a command.
        folder: Its working folder.
        env: Its environment.
    """

    def __init__(self, command: str | list[str], folder: Path, env: Mapping[str, str]) -> None:
        self.command = command
        self._lines: list[str] = []
        self._printed = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            ["sh", "-c", f"exec {command}"] if isinstance(command, str) else command,
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._printed:
                self._lines.append(line)
                self._printed.notify_all()
        with self._printed:
            self._ended = True
            self._printed.notify_all()

    @property
    def text(self) -> str:
        """The output so far."""
        with self._printed:
            return "".join(self._lines)

    def wait_for(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Wait until its output matches a pattern, and return the match."""
        end = time.monotonic() + PATIENCE
        with self._printed:
            while True:
                text = "".join(self._lines)
                if found := re.search(pattern, text):
                    return found
                left = end - time.monotonic()
                if self._ended or left <= 0:
                    break
                self._printed.wait(left)
        why = "ended" if self._ended else "went on"
        raise AssertionError(f"{self.command} {why} without printing {pattern!r}:\n{text}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, unless it has ended, and return its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._process.wait()
            self._reader.join()
            assert self._process.stdout is not None
            self._process.stdout.close()


@contextmanager
def running(command: str | list[str], folder: Path, env: Mapping[str, str]) -> Iterator[Program]:
    """Run a program during the block; it must end with status 0 when it is told to stop."""
    program = Program(command, folder, env)
    try:
        yield program
    except BaseException as error:
        program.stop(signal.SIGKILL)
        error.add_note(f"{command} had printed:\n{program.text}")
        raise
    status = program.stop()
    assert status == 0, f"{command} ended with status {status}:\n{program.text}"


@contextmanager
def working(
    app: str, folder: Path, env: Mapping[str, str], *, options: str = ""
) -> Iterator[Program]:
    """Run a worker during the block, which begins when the worker is ready."""
    with running(f"aiotaskq worker {app} {options}", folder, env) as worker:
        worker.wait_for(r" ready\n")
        yield worker


def run(
    command: str | list[str],
    folder: Path,
    env: Mapping[str, str],
    *,
    stdin: str = "",
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        ["sh", "-c", command] if isinstance(command, str) else command,
        cwd=folder,
        env=dict(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def printed(
    command: str | list[str], folder: Path, env: Mapping[str, str], *, stdin: str = ""
) -> str:
    """Run a program, which must end with status 0, and return its output."""
    done = run(command, folder, env, stdin=stdin)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


def copied(name: str, to: Path) -> Path:
    """Copy a folder or a file of the examples, so that the project stays clean."""
    source = EXAMPLES / name if name else EXAMPLES
    target = to / source.name
    ignored = shutil.ignore_patterns("__pycache__", "aiotaskq.db*")
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignored)
        return target
    shutil.copy(source, target)
    return to


def fetch(url: str) -> Any:
    """Return the JSON that a URL gives."""
    return httpx.get(url, timeout=PATIENCE).raise_for_status().json()
