"""The ledger: the history of a test, in files that no fault can change.

Each process appends to a file of its own, one line with one write. So a line is written in whole
or not at all, whatever kills the writer, and no writer waits for another. Nothing is synced to the
disk: processes die here, never the machine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A record of the history, with its time by the monotonic clock of the machine."""

    at: float = msgspec.field(default_factory=time.monotonic)


class Attempted(Record, frozen=True, kw_only=True):
    """A producer is about to send a task."""

    key: str  # the sender's name of the task, which is an argument of it
    task: str
    task_id: str = ""  # if the sender chose it
    countdown: float = 0.0  # seconds


class Acknowledged(Record, frozen=True, kw_only=True):
    """A producer got the acknowledgement of a task."""

    key: str
    task_id: str


class Refused(Record, frozen=True, kw_only=True):
    """A producer got an error, after all attempts of the library to send a task."""

    key: str
    error: str


class Started(Record, frozen=True, kw_only=True):
    """A run of a task began."""

    key: str
    task_id: str
    task: str
    attempt: int
    pid: int


class Ended(Record, frozen=True, kw_only=True):
    """A run of a task ended."""

    key: str
    task_id: str
    attempt: int
    pid: int
    how: str  # "returned", or the name of the exception


class Up(Record, frozen=True, kw_only=True):
    """A worker process takes tasks."""

    pid: int
    worker: str


class Down(Record, frozen=True, kw_only=True):
    """A worker process has closed everything."""

    pid: int
    worker: str


class Said(Record, frozen=True, kw_only=True):
    """A worker process has emitted an event."""

    pid: int
    event: str
    about: str = ""
    note: str = ""


class Fault(Record, frozen=True, kw_only=True):
    """A fault on purpose, from `at` until `until`."""

    kind: str
    pids: tuple[int, ...] = ()  # the worker processes that it hit; empty: it may have hit any run
    until: float
    note: str = ""


class Sampled(Record, frozen=True, kw_only=True):
    """A sample of a final outcome."""

    task_id: str
    status: str
    print: str  # a digest of its content, which shows that it changed


class Finished(Record, frozen=True, kw_only=True):
    """A producer has sent all its tasks."""

    pid: int


Line: TypeAlias = (
    Attempted
    | Acknowledged
    | Refused
    | Started
    | Ended
    | Up
    | Down
    | Said
    | Fault
    | Sampled
    | Finished
)
R = TypeVar("R", bound=Record)


class Writer:
    """A writer of the file of this process, which is a new one in a forked child."""

    def __init__(self, folder: Path, role: str) -> None:
        self._folder = folder
        self._role = role
        self._pid = 0
        self._file = -1
        self._encoder = msgspec.json.Encoder()

    def write(self, *lines: Line) -> None:
        """Append lines, which others can read when the call returns."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            path = self._folder / f"{self._role}-{self._pid}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        text = self._encoder.encode_lines(lines)
        written = os.write(self._file, text)
        if written != len(text):
            raise OSError(f"the ledger took {written} of {len(text)} bytes")


class Ledger:
    """A reader of the files that all processes write into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        self._read: dict[Path, int] = {}
        self._decoder = msgspec.json.Decoder(Line)

    def refresh(self) -> list[Line]:
        """Read new lines, and return all lines in order of time."""
        new: list[Line] = []
        for path in self.folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            new += [self._decoder.decode(line) for line in whole.splitlines()]
        if new:
            self.lines = sorted([*self.lines, *new], key=lambda line: line.at)
        return self.lines

    def of(self, kind: type[R]) -> list[R]:
        """Return all lines of one kind."""
        return [line for line in self.refresh() if isinstance(line, kind)]

    def forget(self, *kept: type[Record]) -> None:
        """Forget all lines but those of some kinds, the files included."""
        self.refresh()
        self.lines = [line for line in self.lines if isinstance(line, kept)]
        for path in self._read:
            os.truncate(path, 0)  # its writer appends at the new end
            self._read[path] = 0

    async def until(
        self, true: Callable[[Iterable[Line]], bool], what: str, *, within: float
    ) -> None:
        """Wait until a function of all lines is true.

        Raises:
            AssertionError: It was not, within that many seconds.
        """
        end = time.monotonic() + within
        while not true(self.refresh()):
            assert time.monotonic() < end, f"never: {what}"
            await asyncio.sleep(0.02)

    async def count(
        self,
        kind: type[R],
        wanted: int,
        *,
        within: float,
        where: Callable[[R], bool] = lambda line: True,
    ) -> list[R]:
        """Wait for that many lines of one kind, and return them."""
        found: list[R] = []

        def enough(lines: Iterable[Line]) -> bool:
            found[:] = [line for line in lines if isinstance(line, kind) and where(line)]
            return len(found) >= wanted

        await self.until(enough, f"{wanted} {kind.__name__}", within=within)
        return found
