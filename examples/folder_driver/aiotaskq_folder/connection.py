"""The folder: its thread, its lock, and changes of several files in one step.

Theory of operation. What a folder can do in one step is to rename a file. So a file is written in
`new`, where nobody looks, and counts from the moment at which it is renamed.

- **One at a time.** Every call holds `lock`, a file lock, which the system releases when the
  process ends, however it ends. What a call looks at does not change until it is done.
- **Several files in one step.** `apply` first writes down what is to be renamed and deleted, as
  `journal`, which comes to its place by being renamed itself. From then on it has happened: if the
  process is killed, the next call of whoever does the rest. It may do some of it again, which
  changes nothing: the files that were renamed or deleted are not there any more.
- **What a killed process leaves** is a journal, for the next call, and files in `new`, which are
  deleted after an hour.
- **A power cut.** New files are written through to the disk before they are renamed, and the
  folders that they come to before the call returns.

Calls that use files block, so they are made in a thread: one for each driver object. There they
take effect in the order in which they were made, also those that were cancelled meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from aiotaskq.errors import BrokerFull, BrokerUnavailable, ConfigError, Unavailable

P = ParamSpec("P")
Value = TypeVar("Value")
Step: TypeAlias = tuple[str, str | None]
"""A file and its new name, relative to the folder; None: it is deleted."""

PORTION = 100  # files that one call writes, so that others need not wait for long
_LOCK_WAIT = 5.0  # seconds; who holds the lock for longer stands still
_LOCK_PAUSE = 0.002  # seconds between two attempts
_LEFT_BEHIND = 3600.0  # seconds after which nobody goes on with a file in `new`
_locks: set[int] = set()  # files of locks that this process has open


class FolderConnection:
    """A folder, as one driver object uses it.

    Args:
        url: ``folder:///path``; with ``?fsync=false`` a power cut may undo the latest changes.
        prefix: The name of the folder in it that holds everything.
        clock: Returns the Unix time.
        error: What is raised when the folder cannot be used now.

    Raises:
        ConfigError: The URL is wrong.
    """

    def __init__(
        self, url: str, prefix: str, clock: Callable[[], float], error: type[Unavailable]
    ) -> None:
        self.url, self.prefix, self.clock = url, prefix, clock
        self.root, self._fsync = _parse(url, prefix)
        self._error = error
        self._thread: ThreadPoolExecutor | None = None
        self._lock = -1
        self._topics: set[str] = set()

    async def open(self) -> None:
        """Make the folder if it is not there."""
        await self._in_thread(lambda: (self.root / "new").mkdir(parents=True, exist_ok=True))

    def close(self) -> None:
        """Let the thread end, once it has done what it was given."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False)

    async def run(self, work: Callable[[], Value]) -> Value:
        """Do something under the lock. If this is cancelled, it may be done all the same."""
        return await self._in_thread(functools.partial(self._run, work))

    async def _in_thread(self, work: Callable[[], Value]) -> Value:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="aiotaskq-folder")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = BrokerFull if full and self._error is BrokerUnavailable else self._error
            raise kind(f"{self.root} cannot be used: {error.strerror or error}") from error

    # --- in the thread, under the lock ---

    def write(self, content: Any, *, until: float | None = None) -> str:
        """Write a file that counts for nothing yet; return its name.

        Args:
            content: Written as JSON; None: the file is empty.
            until: Its mtime.
        """
        path = self.root / (name := f"new/{secrets.token_hex(8)}")
        try:
            with path.open("xb") as file:
                file.write(b"" if content is None else msgspec.json.encode(content))
                file.flush()
                if until is not None:
                    os.utime(file.fileno(), (until, until))
                if self._fsync:
                    os.fsync(file.fileno())
        except OSError:  # the disk is full: it is not to stay so
            with suppress(OSError):
                path.unlink()
            raise
        return name

    def apply(self, steps: Sequence[Step]) -> None:
        """Rename and delete files, all in one step."""
        if len(steps) > 1:
            self.move([(self.write(steps), "journal")])
        self.move(steps)
        if len(steps) > 1:
            (self.root / "journal").unlink()

    def move(self, steps: Sequence[Step]) -> None:
        """Rename and delete files one by one, but for those that are not there."""
        changed = {target.rpartition("/")[0] for _, target in steps if target is not None}
        for folder in list(changed):
            if not (self.root / folder).exists():
                (self.root / folder).mkdir(parents=True)
                changed.add(folder.rpartition("/")[0])
        for source, target in steps:
            with suppress(FileNotFoundError):
                if target is None:
                    (self.root / source).unlink()
                else:
                    (self.root / source).rename(self.root / target)
        if self._fsync and any(source.startswith("new/") for source, _ in steps):
            for folder in changed:
                self._sync(folder)

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if it is not there."""
        try:
            return sorted(path.name for path in (self.root / folder).iterdir())
        except FileNotFoundError:
            return []

    def read(self, file: str, kind: type[Value]) -> Value | None:
        """Return what a file holds; None if it is not there.

        One that cannot be read is put aside: it must not stop others.
        """
        try:
            return msgspec.json.decode((self.root / file).read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError:
            self.move([(file, f"broken/{secrets.token_hex(8)}")])
            return None

    def until(self, file: str) -> float:
        """Return the mtime of a file; 0 if it is not there."""
        try:
            return (self.root / file).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def number(self) -> int:
        """Return a number above all that were given before."""
        last = os.pread(self._lock, 20, 0)
        # By the clock, should `lock` be lost; above the last one, should the clock be set back.
        number = max(time.time_ns(), int(last) + 1 if last.isdigit() else 0)
        os.pwrite(self._lock, b"%020d" % number, 0)
        return number

    def wake(self, topic: str) -> None:
        """Wake those who wait, when the call is done."""
        self._topics.add(topic)

    def sweep(self, folder: str) -> None:
        """Delete the files whose time is over, and those that a killed process was writing."""
        ends = {f"{folder}/{name}": self.clock() for name in self.names(folder)}
        ends |= {f"new/{name}": time.time() - _LEFT_BEHIND for name in self.names("new")}
        self.move([(file, None) for file, end in ends.items() if 0 < self.until(file) <= end])

    def prune(self, folder: str) -> None:
        """Remove a folder if it is empty."""
        with suppress(OSError):
            (self.root / folder).rmdir()

    def _run(self, work: Callable[[], Value]) -> Value:
        with self._locked():
            if (steps := self.read("journal", list[Step])) is not None:
                self.move(steps)
                (self.root / "journal").unlink()
            value = work()
        while self._topics:
            self._notify(f"wake/{self._topics.pop()}")
        return value

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock = lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        _locks.add(lock)
        try:
            end = time.monotonic() + _LOCK_WAIT
            while not _lock(lock):
                if time.monotonic() > end:
                    raise TimeoutError(f"another process holds the lock for {_LOCK_WAIT:g} s")
                time.sleep(_LOCK_PAUSE)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
            _locks.discard(lock)
            os.close(lock)

    def _notify(self, topic: str) -> None:
        for name in self.names(topic):
            try:
                pipe = os.open(self.root / topic / name, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nobody reads it: its process died
                    self.move([(f"{topic}/{name}", None)])
                continue
            with suppress(OSError):  # it is full of such bytes, or its process died just now
                os.write(pipe, b".")
            os.close(pipe)

    def _sync(self, folder: str) -> None:
        opened = os.open(self.root / folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


class HasFolder(Protocol):
    """What has methods that are done in the thread."""

    folder: FolderConnection


Owner = TypeVar("Owner", bound=HasFolder)


def in_thread(
    method: Callable[Concatenate[Owner, P], Value],
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, Value]]:
    """Make a coroutine function of a method, which is called in the thread and under the lock."""

    @functools.wraps(method)
    async def call(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Value:
        return await owner.folder.run(functools.partial(method, owner, *args, **kwargs))

    return call


def _parse(url: str, prefix: str) -> tuple[Path, bool]:
    wrong = ConfigError("the URL of a folder is folder:///path, or folder:///path?fsync=false")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise wrong from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    fsync = options.pop("fsync", "true")
    absolute = parts.scheme == "folder" and not parts.netloc and parts.path.startswith("/")
    if not absolute or parts.fragment or options or fsync not in ("true", "false"):
        raise wrong
    return Path(unquote(parts.path)) / prefix, fsync == "true"


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close_locks() -> None:
    """Close what a forked child has of locks: it would hold them when we are gone."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks)
