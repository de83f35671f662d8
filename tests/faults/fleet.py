"""Worker programs and producers as real processes, which are started, found and ended here.

Signals go only to processes that were started here, and to their children. Each is identified by
its pid and the time of its creation, so that no signal goes to another process of the same pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

import aiotaskq
from tests.faults.ledger import Ledger, Up
from tests.process_tree import children
from tests.servers import Watchdog

LONG = 120.0  # seconds until something that must happen has failed
_ROOT = Path(__file__).parent.parent.parent
_PATHS = (str(Path(aiotaskq.__file__).parent.parent), str(_ROOT))


class Program:
    """One process, in a session of its own, with a log in a file.

    Attributes:
        pid: Of the process itself: for a worker program, of its supervisor.
        name: The name of its log.
    """

    def __init__(
        self, name: str, arguments: tuple[str, ...], *, folder: Path, more: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("AIOTASKQ")
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=folder,
                env={
                    **kept,
                    "PYTHONPATH": os.pathsep.join(dict.fromkeys(_PATHS)),
                    "PYTHONUNBUFFERED": "1",
                    **more,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.known: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            self.known[self.pid] = psutil.Process(self.pid)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Return the living processes of the program, itself first."""
        for process in list(self.known.values()):
            for child in children(process.pid, recursive=True) if lives(process) else ():
                self.known.setdefault(child.pid, child)
        return [process for process in self.known.values() if lives(process)]

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            self._process.send_signal(number)

    async def wait(self, within: float = LONG) -> int:
        """Wait for its end and return the exit status."""
        end = time.monotonic() + within
        while (status := self._process.poll()) is None:
            assert time.monotonic() < end, f"{self.name} does not end:\n{self.output[-5000:]}"
            self.family()
            await asyncio.sleep(0.02)
        return status

    def close(self) -> None:
        """Kill its living processes."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(LONG)


class Fleet:
    """All programs of a scene."""

    def __init__(self, folder: Path, ledger: Ledger, watchdog: Watchdog) -> None:
        self.folder = folder
        self.ledger = ledger
        self.programs: list[Program] = []
        self.more: dict[str, str] = {}
        self._watchdog = watchdog
        self._started = 0

    def start(self, name: str, *arguments: str, **more: str) -> Program:
        """Start ``python -m arguments`` with these variables beside those of the scene."""
        self._started += 1
        program = Program(
            f"{name}-{self._started}",
            arguments,
            folder=self.folder,
            more={**self.more, **more},
        )
        self.programs.append(program)
        self._watchdog.add(program.pid)
        return program

    async def worker(
        self,
        *options: str,
        target: str = "tests.faults.application:app",
        processes: int = 1,
        module: str = "aiotaskq",
        ready: bool = True,
        **more: str,
    ) -> Program:
        """Start a worker program, and wait until its processes take tasks."""
        given = ("worker", target, "-w", str(processes), *options)
        program = self.start("worker", module, *given, **more)
        if ready:
            await self.ready(program, processes)
        return program

    async def team(
        self, number: int, *options: str, processes: int = 1, **more: str
    ) -> list[Program]:
        """Start that many worker programs at once."""
        team = [
            await self.worker(*options, processes=processes, ready=False, **more)
            for _ in range(number)
        ]
        for program in team:
            await self.ready(program, processes)
        return team

    async def ready(self, program: Program, processes: int = 1) -> None:
        """Wait until that many processes of a program take tasks."""
        end = time.monotonic() + LONG
        while len(self.workers(program)) < processes:
            assert program.running, f"{program.name} ended:\n{program.output[-5000:]}"
            assert time.monotonic() < end, f"{program.name} is not ready:\n{program.output[-5000:]}"
            await asyncio.sleep(0.02)

    def workers(self, *programs: Program) -> list[psutil.Process]:
        """Return the living processes that take tasks: of these programs, or of all."""
        ready = {line.pid for line in self.ledger.of(Up)}
        return [
            process
            for program in programs or self.programs
            for process in program.family()
            if process.pid in ready
        ]

    async def stop(self, *programs: Program) -> list[int]:
        """Stop programs in order and return their exit statuses; by default all workers."""
        chosen = programs or [each for each in self.programs if each.name.startswith("worker")]
        for program in chosen:
            program.family()
            program.signal(signal.SIGTERM)
        return [await program.wait() for program in chosen]

    def forget(self) -> None:
        """Forget the programs that have ended, and empty the logs of the others."""
        for program in [each for each in self.programs if not each.running and not each.family()]:
            self.programs.remove(program)
            self._watchdog.discard(program.pid)
            program.log.unlink()
        for program in self.programs:
            os.truncate(program.log, 0)  # it is open in append mode

    def alive(self) -> list[str]:
        """Return the living processes of programs that were stopped."""
        left = [process for program in self.programs for process in program.family()]
        return [told for process in left if (told := describe(process))]

    async def all_gone(self, within: float) -> list[str]:
        """Wait for the end of all processes; return those that still live."""
        end = time.monotonic() + within
        while (left := self.alive()) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return left

    def close(self) -> None:
        for program in self.programs:
            program.close()
            self._watchdog.discard(program.pid)


def lives(process: psutil.Process) -> bool:
    """Return whether a process lives: it is no zombie, and its pid is not used by another one."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return ""


def pids_of(process: psutil.Process) -> tuple[int, ...]:
    """Return the pids of a process and of all its descendants."""
    return (process.pid, *(child.pid for child in children(process.pid, recursive=True)))
