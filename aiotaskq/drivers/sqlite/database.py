"""One SQLite file, seen from one thread: the address, the connection, transactions, the schema."""

from __future__ import annotations

import contextlib
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit
from weakref import WeakSet

import msgspec

from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.caller import Caller
from aiotaskq.errors import ConfigError

Row = tuple[Any, ...]
T = TypeVar("T")

_SYNCHRONOUS = ("full", "normal")
_OPTIONS = {
    "synchronous": "full or normal",
    "busy_timeout": "seconds to wait for other processes",
}
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a URL of this driver says.

    Attributes:
        url: As it was given.
        path: Of the file; may be relative until it is opened.
        prefix: Of the tables.
        synchronous: "full": what was accepted survives a power cut; "normal": a crash of any
            process, but a power cut may take the last moments.
        busy_timeout: Seconds to wait while another process writes.
    """

    url: str
    path: Path
    prefix: str
    synchronous: str = "full"
    busy_timeout: float = 10.0

    @classmethod
    def parse(cls, url: str, prefix: str) -> Settings:
        """Read a URL.

        Raises:
            ConfigError: It is none of this driver.
        """
        parts = urlsplit(url)
        path = unquote(parts.path)[1:]
        if parts.scheme != "sqlite" or parts.netloc or not path or path == ":memory:":
            raise ConfigError(
                f"{url!r} names no file: write sqlite:///name.db for a file in the working"
                " folder, or sqlite:////folder/name.db; what need not last goes to memory://"
            )
        if not prefix:
            raise ConfigError("the prefix of the tables is empty")
        options: dict[str, Any] = {}
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            options[name] = _option(name, value)
        return cls(url=url, path=Path(path), prefix=prefix, **options)


def _option(name: str, value: str) -> str | float:
    if name == "synchronous" and value.lower() in _SYNCHRONOUS:
        return value.lower()
    if name == "busy_timeout":
        with contextlib.suppress(ValueError):  # refused below, with the rest
            seconds = float(value)
            if 0 <= seconds < float("inf"):
                return seconds
    known = ", ".join(f"{option} ({meaning})" for option, meaning in _OPTIONS.items())
    raise ConfigError(f"an SQLite URL has no option {name}={value}; there is: {known}")


class Database:
    """A connection, for the use of one thread. All methods block; SQLite's errors pass through.

    What uses it does so inside ``with database.in_use():``. A fork waits for all such uses, and
    closes the connections before: SQLite's own locks, and what it remembers of the file's,
    would be wrong in the child. Each opens again when it is next used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._use = threading.RLock()
        self._closed_for_fork = False
        self._caller = Caller()
        self._connection: sqlite3.Connection | None = None
        self._synchronous = ""
        self._rendered: dict[str, str] = {}
        self._topics: set[str] = set()
        with _registering:
            _all.add(self)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other threads from forking meanwhile."""
        with self._use:
            if self._closed_for_fork:
                self.open()
                self._closed_for_fork = False
            yield

    def open(self) -> None:
        """Connect, and create the tables if they are not there.

        Raises:
            ConfigError: The path can never be such a database, or a later version wrote it.
        """
        path = self._settings.path
        _check_place(path)
        self._synchronous = ""
        # The thread that forks closes it.
        self._connection = connection = sqlite3.connect(
            path, isolation_level=None, timeout=0, check_same_thread=False
        )
        _ours.add(connection)
        # SQLite's own waiting starts with 1 ms and ends with naps of 100 ms, in which faster
        # processes take turn after turn. It gets a short try, and `_patiently` does the rest.
        connection.execute("PRAGMA busy_timeout = 10")
        mode = self._patiently(lambda: connection.execute("PRAGMA journal_mode = wal").fetchone())
        if mode != ("wal",):
            raise ConfigError(f"{path}: the file system has no shared memory, which SQLite needs")
        connection.execute(f"PRAGMA journal_size_limit = {64 * 2**20}")
        # On macOS a plain fsync stops at the disk's own cache; elsewhere this means nothing.
        connection.execute("PRAGMA fullfsync = 1")
        self._prepare()

    def close(self) -> None:
        """Disconnect."""
        with self._use:
            self._closed_for_fork = False
            self._caller.close()
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            _ours.discard(connection)

    def before_fork(self) -> None:
        """Wait until nobody uses it, and close the connection; `after_fork` must follow."""
        self._use.acquire()
        if self._connection is not None:
            self._disconnect()
            self._closed_for_fork = True

    def after_fork(self) -> None:
        """Let it be used again."""
        self._use.release()

    @contextlib.contextmanager
    def write(self, *, relaxed: bool = False) -> Iterator[None]:
        """Run a transaction that may change something.

        Args:
            relaxed: A power cut may undo it. For what no process can rely on after one: who
                holds what, leases, housekeeping. Never reorders: a later strict transaction
                makes all the earlier ones last too.
        """
        self._synchronise("normal" if relaxed else self._settings.synchronous)
        self._topics.clear()
        self._patiently(lambda: self._run("BEGIN IMMEDIATE"))
        try:
            yield
            ports = self._listeners()
            self._run("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # the first error tells what is wrong
                self._run("ROLLBACK")
            raise
        self._caller.call(ports)

    def wake(self, topic: str) -> None:
        """Wake those who wait for a topic, once the transaction is committed."""
        self._topics.add(topic)

    def rows(self, template: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
        """Run a query and return what it finds."""
        return self._patiently(lambda: self._run(template, parameters).fetchall())

    def change(self, template: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> int:
        """Run a statement, inside `write`, and return how many rows it changed."""
        return self._run(template, parameters).rowcount

    def change_many(self, template: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement for each row, inside `write`."""
        self._live.executemany(self._render(template), rows)

    def insert(self, template: str, parameters: Sequence[Any]) -> int:
        """Insert one row, inside `write`, and return its number."""
        number = self._run(template, parameters).lastrowid
        assert number is not None
        return number

    @property
    def _live(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.ProgrammingError("the connection is closed")
        return self._connection

    def _run(
        self, template: str, parameters: Sequence[Any] | dict[str, Any] = ()
    ) -> sqlite3.Cursor:
        return self._live.execute(self._render(template), parameters)

    def _render(self, template: str) -> str:
        text = self._rendered.get(template)
        if text is None:
            prefix = self._settings.prefix.replace('"', '""')
            text = re.sub(r"~(\w+)", lambda found: f'"{prefix}_{found[1]}"', template)
            self._rendered[template] = text
        return text

    def _patiently(self, step: Callable[[], T]) -> T:
        """Run a step, again and again while others lock the file and the timeout is not over."""
        deadline = time.monotonic() + self._settings.busy_timeout
        while True:
            try:
                return step()
            except sqlite3.OperationalError as error:
                # The low byte is the kind; the rest only says more of it.
                code: int = getattr(error, "sqlite_errorcode", 0)
                if code & 0xFF not in _BUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(random.uniform(0.0005, 0.005))

    def _synchronise(self, mode: str) -> None:
        if mode != self._synchronous:
            self._run(f"PRAGMA synchronous = {mode}")
            self._synchronous = mode

    def _listeners(self) -> list[int]:
        if not self._topics:
            return []
        since = time.time() - Caller.stale_after
        return sorted(
            {
                row[0]
                for topic in self._topics
                for row in self.rows(sql.WHO_LISTENS, (topic, self._caller.network, since))
            }
        )

    def _prepare(self) -> None:
        if self._version() == sql.VERSION:
            return
        with self.write():
            # Another process may have been first.
            version = self._version()
            if version is None:
                self._run_all(sql.SCHEMA)
            else:
                for older in range(version, sql.VERSION):
                    self._run_all(sql.MIGRATIONS[older])
            self._run(sql.WRITE_VERSION, (str(sql.VERSION),))

    def _run_all(self, statements: Iterable[str]) -> None:
        for statement in statements:
            self._run(statement)

    def _version(self) -> int | None:
        if not self.rows(sql.HAS_TABLE, (f"{self._settings.prefix}_meta",)):
            return None
        version = int(self.rows(sql.READ_VERSION)[0][0])
        if version > sql.VERSION:
            raise ConfigError(
                f"{self._settings.path} has tables of version {version}, and this aiotaskq knows"
                f" version {sql.VERSION}: a later release made it"
            )
        return version


# Where a fork comes without our knowing (from C), the child must not so much as close a connection
# of its parent: that would undo the parent's locks. Held here, none is closed by being collected.
_ours: set[sqlite3.Connection] = set()

_all: WeakSet[Database] = WeakSet()
_registering = threading.RLock()
_stopped: list[Database] = []
_forking = False


def _before_fork() -> None:
    global _forking
    _registering.acquire()
    _forking = True
    for database in list(_all):
        database.before_fork()
        _stopped.append(database)


def _after_fork() -> None:
    global _forking
    if not _forking:
        return  # this module was imported when the fork had begun
    while _stopped:
        _stopped.pop().after_fork()
    _forking = False
    _registering.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )


def _check_place(path: Path) -> None:
    """Refuse what SQLite would only call "unable to open database file"."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a database file")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to keep {path.name} in")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{path} is read-only for this user")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"the folder of {path} is read-only for this user")


def sentence(error: sqlite3.Error, settings: Settings) -> str:
    """Return what went wrong, for people."""
    path = settings.path
    name: str = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"{path}: another process kept it locked for {settings.busy_timeout:g} seconds"
    for start, reason in _REASONS.items():
        if name.startswith(start):
            return f"{path}: {reason} ({error})"
    return f"{path}: {error}"


FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
"""Errors that mean a full disk; the second comes from the index file, which cannot grow."""

_REASONS = {
    **dict.fromkeys(FULL, "the disk is full"),
    "SQLITE_READONLY": "it cannot be written to",
    "SQLITE_CANTOPEN": "it cannot be opened or created",
    "SQLITE_PERM": "it must not be accessed",
    "SQLITE_IOERR": "the disk fails to read or write",
    "SQLITE_CORRUPT": "it is damaged",
    "SQLITE_NOTADB": "it is no SQLite database",
}
"""What an error means, by the start of SQLite's name for it."""

LASTING = ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_NOTADB", "SQLITE_CORRUPT")
"""Errors that trying again does not cure, where they come up while opening."""
