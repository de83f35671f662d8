"""What happened, written down where no fault can take it back.

Each process appends to a file of its own, one line with one write, so that a line is there or not,
whatever kills the writer, and no writer waits for another. Nothing is flushed: the processes die
here, never the machine.
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
    """The base: when, by the monotonic clock that all processes of a machine share."""

    at: float = msgspec.field(default_factory=time.monotonic)


class Attempted(Record, frozen=True, kw_only=True):
    """A producer is about to send a task."""

    key: str  # the sender's own name of the task, an argument of it
    task: str
    task_id: str = ""  # where the sender gives it itself
    countdown: float = 0.0  # seconds


class Acknowledged(Record, frozen=True, kw_only=True):
    """A producer was told that the task is stored."""

    key: str
    task_id: str


class Refused(Record, frozen=True, kw_only=True):
    """A producer was told that it could not be sent, after all tries of the library's own."""

    key: str
    error: str


class Started(Record, frozen=True, kw_only=True):
    """The function of a task was entered."""

    key: str
    task_id: str
    task: str
    attempt: int
    pid: int


class Ended(Record, frozen=True, kw_only=True):
    """The function of a task was left."""

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
    """A worker process has let go of everything."""

    pid: int
    worker: str


class Said(Record, frozen=True, kw_only=True):
    """A worker process has told its observers of something."""

    pid: int
    event: str
    about: str = ""
    note: str = ""


class Fault(Record, frozen=True, kw_only=True):
    """Something was broken on purpose, from `at` until `until`."""

    kind: str
    pids: tuple[int, ...] = ()  # worker processes that it hit; none: it may have hit any run
    until: float
    note: str = ""


class Sampled(Record, frozen=True, kw_only=True):
    """A final outcome as it was seen at some time."""

    task_id: str
    status: str
    print: str  # of all that it holds: another one means that the outcome changed


class Finished(Record, frozen=True, kw_only=True):
    """A producer has sent all that it was to send."""

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
    """Appends to the file of this process, a new one in a forked child."""

    def __init__(self, folder: Path, role: str) -> None:
        self._folder = folder
        self._role = role
        self._pid = 0
        self._file = -1
        self._encoder = msgspec.json.Encoder()

    def write(self, *lines: Line) -> None:
        """Write lines down; they are there when the call returns."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            path = self._folder / f"{self._role}-{self._pid}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        text = self._encoder.encode_lines(lines)
        written = os.write(self._file, text)
        if written != len(text):
            raise OSError(f"the ledger took {written} of {len(text)} bytes")


class Ledger:
    """Reads what all processes wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        self._read: dict[Path, int] = {}
        self._decoder = msgspec.json.Decoder(Line)

    def refresh(self) -> list[Line]:
        """Read what is new and return all there is, in order of time."""
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
            os.truncate(path, 0)  # its writer goes on at the end, wherever that is
            self._read[path] = 0

    async def until(
        self, true: Callable[[Iterable[Line]], bool], what: str, *, within: float
    ) -> None:
        """Wait until a function of all lines says so.

        Raises:
            AssertionError: It did not within so many seconds.
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
        """Wait for so many lines of one kind, and return them."""
        found: list[R] = []

        def enough(lines: Iterable[Line]) -> bool:
            found[:] = [line for line in lines if isinstance(line, kind) and where(line)]
            return len(found) >= wanted

        await self.until(enough, f"{wanted} {kind.__name__}", within=within)
        return found
