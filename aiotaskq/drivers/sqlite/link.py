"""The thread that a driver object keeps its connection in, and the way there from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import msgspec

from aiotaskq.drivers.sqlite.database import FULL, LASTING, Database, Settings, sentence
from aiotaskq.errors import ConfigError, Unavailable

T = TypeVar("T")


class _Thread:
    """One thread that runs jobs in the order in which they were given.

    A daemon, unlike the standard library's executors, which refuse jobs once the main thread has
    ended: other threads of a program may still send tasks then.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._main, name="aiotaskq-sqlite", daemon=True).start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def end(self) -> None:
        """End the thread after the jobs that it was given."""
        self._jobs.put(None)

    def _main(self) -> None:
        while (work := self._jobs.get()) is not None:
            future, job = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # whoever waits is told
                    future.set_exception(error)
            del work, future, job  # a waiting thread holds nothing alive


class Link:
    """Runs jobs on one connection, one after the other, in the order in which they were given.

    A job that has begun is finished, whether or not somebody still waits for it: cancelling
    never cuts a transaction short.

    Args:
        settings: Where to connect to.
        unavailable: What to raise when it fails.
        full: What to raise instead when the disk is full.
    """

    def __init__(
        self,
        settings: Settings,
        unavailable: type[Unavailable],
        full: type[Unavailable] | None = None,
    ) -> None:
        self.settings = settings
        self._unavailable = unavailable
        self._full = unavailable if full is None else full
        self._lock = asyncio.Lock()
        self._thread: _Thread | None = None
        self._database = Database(settings)
        self._pid = 0

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._thread is not None

    async def open(self) -> None:
        """Start the thread and connect. Idempotent.

        Raises:
            ConfigError: The path can never be opened.
            Unavailable: It cannot be opened now.
        """
        async with self._lock:
            if self._thread is not None:
                return
            thread = _Thread()
            try:
                await asyncio.wrap_future(thread.submit(self._connect))
            except BaseException:
                # Cancelled, it may still be connecting; this is done after it.
                thread.submit(self._disconnect)
                thread.end()
                raise
            self._thread, self._pid = thread, os.getpid()

    async def close(self) -> None:
        """Finish what was submitted, disconnect and end the thread. Idempotent, never raises."""
        async with self._lock:
            thread, self._thread = self._thread, None
            if thread is None or self._pid != os.getpid():
                return  # after a fork, connection and thread are the parent's
            last = thread.submit(self._disconnect)
            thread.end()
            await asyncio.shield(asyncio.wrap_future(last))

    def submit(self, job: Callable[[Database], T]) -> Future[T]:
        """Have a job run in the thread.

        Raises:
            Unavailable: The driver is not open.
        """
        thread = self._thread
        if thread is None:
            raise self._unavailable(f"{self.settings.url} is not open")
        if self._pid != os.getpid():
            raise ConfigError(
                f"{self.settings.url} was opened by process {self._pid}, before a fork: a child"
                " opens a clone() of its own"
            )
        return thread.submit(lambda: self._attempt(job))

    async def run(self, job: Callable[[Database], T]) -> T:
        """Run a job in the thread and return what it returns.

        Raises:
            Unavailable: SQLite failed, or the driver is not open.
        """
        return await asyncio.wrap_future(self.submit(job))

    def _attempt(self, job: Callable[[Database], T]) -> T:
        try:
            with self._database.in_use():
                return job(self._database)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _connect(self) -> None:
        # A later change of the working folder must not lead to another file.
        self.settings = msgspec.structs.replace(self.settings, path=self.settings.path.absolute())
        self._database = Database(self.settings)
        try:
            with self._database.in_use():
                self._database.open()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith(LASTING):
                raise ConfigError(sentence(error, self.settings)) from error
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> Unavailable:
        is_full = getattr(error, "sqlite_errorname", "") in FULL
        return (self._full if is_full else self._unavailable)(sentence(error, self.settings))

    def _disconnect(self) -> None:
        # The connection is given up in any case, and nobody could do more about it.
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
