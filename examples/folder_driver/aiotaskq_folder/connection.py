"""Access to the folder: the thread, the lock, and changes of several files in one step.

Theory of operation. The only step that a file system takes as a whole is a rename. So each file is
written in `new`, which nothing reads, and counts from the moment at which it is renamed.

- **One call at a time.** Each call holds a lock on the file `lock`. The operating system releases
  it when the process ends, for whatever reason. So nothing changes between two steps of a call.
- **Several files in one step.** `apply` writes a list of renames and deletions, and renames the
  list to `journal`: at this moment the change has happened. If the process is killed before it has
  carried out the list, the next call of any process does so. A step may then be repeated, which
  changes nothing: its file is no longer there.
- **Leftovers.** A process that is killed leaves a journal, which the next call completes, and files
  in `new`, which are deleted after an hour.
- **A power failure.** New files, the journal and the folders that receive files are flushed to the
  disk (`fsync`) before a call returns, and files before the journal names them.
- **Cancellation.** File operations block, so they run in a thread, one for each driver object. A
  call whose caller was cancelled is still carried out, and before all later calls.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CoroutineType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from aiotaskq.errors import BrokerFull, BrokerUnavailable, ConfigError, Unavailable

P = ParamSpec("P")
Value = TypeVar("Value")
Step: TypeAlias = tuple[str, str | None]
"""A file and its new name, both relative to the folder; None deletes the file."""

logger = logging.getLogger("aiotaskq_folder")

_PORTION = 100  # items that one call processes: other processes wait for the lock meanwhile
_LOCK_WAIT = 5.0  # seconds; a process that holds the lock for longer does not run
_LOCK_PAUSE = 0.002  # seconds between two attempts
_LEFTOVER_AGE = 3600.0  # seconds after which a file in `new` belongs to no living process
_locks: set[int] = set()  # file descriptors of the locks that this process holds


class FolderConnection:
    """The access of one driver object to the folder.

    Args:
        url: ``folder:///path``; with ``?fsync=false``, a power failure may undo recent changes.
        prefix: The name of the subfolder that holds everything.
        clock: Returns the Unix time.
        error: The exception to raise when the folder cannot be used at the moment.

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
        """Create the folder if it does not exist."""
        await self._in_thread(lambda: (self.root / "new").mkdir(parents=True, exist_ok=True))

    def close(self) -> None:
        """Let the thread end after the calls that it was given."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False)

    async def run(self, work: Callable[[], Value]) -> Value:
        """Call a function in the thread and under the lock."""
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
        """Write a file in `new` and return its name.

        Args:
            content: Encoded as JSON; None leaves the file empty.
            until: The mtime of the file.
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
        except OSError:  # if the disk is full, half a file must not stay on it
            with suppress(OSError):
                path.unlink()
            raise
        return name

    def apply(self, steps: Sequence[Step]) -> None:
        """Rename and delete files: all of them, in one step."""
        if len(steps) > 1:
            self._sync("new")  # the journal must not outlive the files that it names
            self.move([(self.write(steps), "journal")])
        self.move(steps)
        if len(steps) > 1:
            (self.root / "journal").unlink()

    def move(self, steps: Sequence[Step]) -> None:
        """Rename and delete files one after the other; skip those that do not exist."""
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
        if any(source.startswith("new/") for source, _ in steps):
            for folder in changed:
                self._sync(folder)

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if there is no such folder."""
        try:
            return sorted(path.name for path in (self.root / folder).iterdir())
        except FileNotFoundError:
            return []

    def read(self, file: str, kind: type[Value]) -> Value | None:
        """Return the content of a file; None if there is no such file.

        A file that cannot be decoded is moved to `broken`: it must not stop any other message.
        """
        try:
            return msgspec.json.decode((self.root / file).read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            broken = f"broken/{secrets.token_hex(8)}"
            logger.error("%s cannot be read (%s) and becomes %s", file, error, broken)
            self.move([(file, broken)])
            return None

    def until(self, file: str) -> float:
        """Return the mtime of a file; 0 if there is no such file."""
        try:
            return (self.root / file).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def number(self) -> int:
        """Return a number that is larger than every number returned before."""
        last = os.pread(self._lock, 20, 0)
        # The clock, in case `lock` was lost; the last number, in case the clock was set back.
        number = max(time.time_ns(), int(last) + 1 if last.isdigit() else 0)
        os.pwrite(self._lock, b"%020d" % number, 0)
        return number

    def wake(self, topic: str) -> None:
        """Wake the waiting consumers or subscribers after this call."""
        self._topics.add(topic)

    def sweep(self, folder: str) -> None:
        """Delete files whose time is over, and the leftovers of killed processes."""
        ends = {f"{folder}/{name}": self.clock() for name in self.names(folder)}
        ends |= {f"new/{name}": time.time() - _LEFTOVER_AGE for name in self.names("new")}
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
                if error.errno == errno.ENXIO:  # it has no reader: the process has died
                    self.move([(f"{topic}/{name}", None)])
                continue
            with suppress(OSError):  # it is full of wake-ups, or has just lost its reader
                os.write(pipe, b".")
            os.close(pipe)

    def _sync(self, folder: str) -> None:
        if self._fsync:
            opened = os.open(self.root / folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)


class HasFolder(Protocol):
    """An object with methods that run in the thread."""

    folder: FolderConnection


Owner = TypeVar("Owner", bound=HasFolder)


def in_thread(
    method: Callable[Concatenate[Owner, P], Value],
) -> Callable[Concatenate[Owner, P], CoroutineType[Any, Any, Value]]:
    """Turn a method into a coroutine function that calls it in the thread and under the lock."""

    @functools.wraps(method)
    async def call(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Value:
        return await owner.folder.run(functools.partial(method, owner, *args, **kwargs))

    # Pyright takes this type for that of an `async def`, mypy a more general one.
    return cast("Callable[Concatenate[Owner, P], CoroutineType[Any, Any, Value]]", call)


def portions(items: Sequence[Value]) -> Iterator[Sequence[Value]]:
    """Yield the items in parts that one call can process without keeping others waiting."""
    for start in range(0, len(items), _PORTION):
        yield items[start : start + _PORTION]


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
    """Close the locks that a forked child inherits: it would hold them after its parent's death."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks)
