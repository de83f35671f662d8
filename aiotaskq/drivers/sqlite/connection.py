"""Connections to an SQLite file from asyncio, and the mapping of SQLite's errors.

Theory of operation. SQLite blocks, so each driver object has a thread, which owns one
`SQLiteDatabase` and runs jobs on it, one after the other, in the order in which they were
submitted. Nothing else touches the database; forks apart, see `aiotaskq.drivers.sqlite.database`.

States: closed, open (there is a thread), closed again. Each `open` makes a new thread.

Events that may come between any two steps:

- A call is cancelled while its job waits or runs. A job that waits is dropped; one that runs is
  finished. *Invariant: cancelling never cuts a transaction short.* A caller that needs to know what
  a cancelled call has done keeps the future of `submit`.
- `open` is cancelled while the thread connects. The thread disconnects after that, and ends.
- `close` comes while jobs wait: they are run first.
- The process forks. In the child, the thread does not exist. The object knows its process by pid:
  jobs are refused there, and `close` does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from queue import Empty
from typing import Any, TypeVar

import msgspec

from aiotaskq import native
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.drivers.sqlite.messages import UNSTORABLE_ERRORS, unstorable
from aiotaskq.drivers.sqlite.url import SQLiteUrl
from aiotaskq.errors import ConfigError, Unavailable

T = TypeVar("T")

_LOOK_EVERY = 5.0  # seconds between looks of an idle thread whether its event loop is closed
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
"""Errors that mean a full disk; the second comes from the index file, which cannot grow."""

_REASONS = {
    **dict.fromkeys(_FULL, "the disk is full"),
    "SQLITE_READONLY": "it cannot be written to",
    "SQLITE_CANTOPEN": "it cannot be opened or created",
    "SQLITE_PERM": "it must not be accessed",
    "SQLITE_IOERR": "the disk fails to read or write",
    "SQLITE_CORRUPT": "it is damaged",
    "SQLITE_NOTADB": "it is no SQLite database",
}
"""The meaning of an error, by the start of SQLite's name for it."""

_LASTING = ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_NOTADB", "SQLITE_CORRUPT")
"""Errors that another attempt does not cure, where they come up while opening."""


class _SQLiteThread:
    """A thread that runs jobs in the order in which they were submitted.

    It ends by itself, after `abandon`, when the event loop of its owner was closed and nobody has
    closed the owner: a program may close a loop without ending its async generators.

    A daemon thread. The standard library's executors refuse jobs once the main thread has ended,
    and other threads of the program may still send tasks then.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._jobs: native.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            native.SimpleQueue()
        )
        self._loop = loop
        self.abandon: Callable[[], None] = lambda: None
        native.Thread(self._main, name="aiotaskq-sqlite").start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = native.make_future()
        self._jobs.put((future, job))
        return future

    @property
    def has_ended(self) -> bool:
        """Return whether it has ended by itself, because its event loop is closed."""
        return self._loop.is_closed()

    def end(self) -> None:
        """End the thread after the jobs submitted so far."""
        self._jobs.put(None)

    def _main(self) -> None:
        while True:
            try:
                work = self._jobs.get(timeout=_LOOK_EVERY)
            except Empty:
                if self._loop.is_closed():
                    self.abandon()
                    return
                continue
            if work is None:
                return
            future, job = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # for the caller that waits for it
                    future.set_exception(error)
            del work, future, job  # while it waits, the thread keeps nothing alive


class SQLiteConnection:
    """Runs jobs on a database in a thread of its own.

    Attributes:
        url: The file. Its path is absolute once it was opened.
        prefix: The beginning of the names of all tables.

    Args:
        url: The file, and how to use it.
        prefix: The beginning of the names of all tables.
        unavailable: The error to raise when SQLite fails.
        full: The error to raise instead when the disk is full.

    Raises:
        ConfigError: The prefix is empty.
    """

    def __init__(
        self,
        url: SQLiteUrl,
        prefix: str,
        unavailable: type[Unavailable],
        full: type[Unavailable] | None = None,
    ) -> None:
        if not prefix:
            raise ConfigError("the prefix of the tables is empty")
        self.url = url
        self.prefix = prefix
        self._unavailable = unavailable
        self._full = unavailable if full is None else full
        self._lock = asyncio.Lock()
        self._thread: _SQLiteThread | None = None
        self._database = SQLiteDatabase(url, prefix)
        self._pid = 0

    @property
    def is_open(self) -> bool:
        """Return whether jobs can be run."""
        return self._thread is not None and not self._thread.has_ended

    async def open(self) -> None:
        """Start the thread and connect. Idempotent.

        Raises:
            ConfigError: The path can never be opened.
            Unavailable: It cannot be opened now.
        """
        async with self._lock:
            if self.is_open:
                return
            thread = _SQLiteThread(asyncio.get_running_loop())
            try:
                await asyncio.wrap_future(thread.submit(self._connect))
            except BaseException:
                # After a cancelled call it may still be connecting; this comes after that.
                thread.submit(self._disconnect)
                thread.end()
                raise
            # Its own database: by then another thread may have another one.
            thread.abandon = partial(_close, self._database)
            self._thread, self._pid = thread, os.getpid()

    async def close(self) -> None:
        """Run the jobs submitted so far, disconnect, end the thread. Idempotent, never raises."""
        async with self._lock:
            thread, self._thread = self._thread, None
            if thread is None or self._pid != os.getpid():
                return  # after a fork, the connection and the thread are the parent's
            if thread.has_ended:
                return
            last = thread.submit(self._disconnect)
            thread.end()
            await asyncio.shield(asyncio.wrap_future(last))

    def submit(self, job: Callable[[SQLiteDatabase], T], *, follows: bool = True) -> Future[T]:
        """Submit a job to the thread and return the future of its result.

        Args:
            job: The job.
            follows: Whether it is for the file that the path leads to now; if not, it is for the
                file that was opened, also where that was removed or replaced.

        Raises:
            Unavailable: The driver is not open.
        """
        thread = self._thread
        if thread is None:
            raise self._unavailable(f"{self.url.text} is not open")
        if self._pid != os.getpid():
            raise ConfigError(
                f"{self.url.text} was opened by process {self._pid}, before a fork: a child"
                " opens a clone() of its own"
            )
        return thread.submit(lambda: self._attempt(job, follows))

    async def run(self, job: Callable[[SQLiteDatabase], T]) -> T:
        """Run a job in the thread and return its value.

        Raises:
            Unavailable: SQLite failed, or the driver is not open.
        """
        return await asyncio.wrap_future(self.submit(job))

    @property
    def generation(self) -> int:
        """Return the number of files that the path has led to, less one."""
        return self._database.generation

    async def write_port(self, port: int, topics: Collection[str]) -> bytes:
        """Write a port into the table of wake-ups; see `aiotaskq.drivers.sqlite.notify`.

        Returns:
            The contents of the datagrams that come to it.

        Raises:
            Unavailable: SQLite failed, or the driver is not open.
        """
        return await self.run(lambda database: database.write_port(port, topics))

    async def erase_port(self, port: int) -> None:
        """Delete a port from the table of wake-ups, of the file into which it was written.

        Raises:
            Unavailable: SQLite failed, or the driver is not open.
        """
        erasing = self.submit(lambda database: database.erase_port(port), follows=False)
        await asyncio.wrap_future(erasing)

    def _attempt(self, job: Callable[[SQLiteDatabase], T], follows: bool) -> T:
        try:
            with self._database.in_use():
                self._connect_again(follows)
                return job(self._database)
        except UNSTORABLE_ERRORS as error:
            raise unstorable(error) from error
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _connect_again(self, follows: bool) -> None:
        try:
            if follows:
                self._database.follow()
            else:
                self._database.reconnect()
        except ConfigError as error:  # it worked at first, and somebody may put the file back
            raise self._unavailable(str(error)) from error

    def _connect(self) -> None:
        # A later change of the working folder must not lead to another file.
        self.url = msgspec.structs.replace(self.url, path=self.url.path.absolute())
        self._database = SQLiteDatabase(self.url, self.prefix)
        try:
            with self._database.in_use():
                self._database.open()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith(_LASTING):
                raise ConfigError(_description(error, self.url)) from error
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> Unavailable:
        is_full = getattr(error, "sqlite_errorname", "") in _FULL
        return (self._full if is_full else self._unavailable)(_description(error, self.url))

    def _disconnect(self) -> None:
        _close(self._database)


def _close(database: SQLiteDatabase) -> None:
    # The connection is given up in any case, and there is nobody to tell.
    with contextlib.suppress(sqlite3.Error):
        database.close()


def _description(error: sqlite3.Error, url: SQLiteUrl) -> str:
    """Return an error as a text for people."""
    name: str = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"{url.path}: another process kept it locked for {url.busy_timeout:g} seconds"
    for start, reason in _REASONS.items():
        if name.startswith(start):
            return f"{url.path}: {reason} ({error})"
    return f"{url.path}: {error}"
