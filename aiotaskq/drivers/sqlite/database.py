"""An SQLite file as one thread sees it: the connection, transactions, the schema, forks.

Theory of operation. An object of this kind is connected or not. A use that finds it not connected,
after a fork or after an attempt that failed, connects again.

*Transactions.* Every change of the file runs inside `SQLiteDatabase.write`, which takes the file's
lock for writing at its beginning. So two transactions that write never overlap, a transaction sees
all that earlier ones have committed, and it never fails midway because another one was faster. A
process that dies inside a transaction leaves nothing of it. Ports to notify are read inside the
transaction and used after the commit; see `aiotaskq.drivers.sqlite.notify`. Single queries run
outside of transactions and may be out of date at once: a decision that depends on one is made
again inside `write`.

*Locks of others.* A statement that finds the file locked is repeated until `busy_timeout` is over
(`_retry_while_busy`), then SQLite's error passes through.

*Foreign files.* The path may come to lead to another file: the old one was removed, or replaced by
a backup. A connection to a file that nobody else can find is deaf for ever, so each use begins with
`follow`, which connects anew then. What was held in the old file is lost with it: a consumer whose
id is not in the file that is there now finds that its lease is lost, and its worker begins a new
one. Numbers of rows prove nothing, as they begin at 1 again. `generation` counts the files. A file
that was removed while there was no connection may have left its number to the next one, so the
secret in it counts as well.

*Hostile values.* Another program may have written any value into any column. Text that is not UTF-8
is read with replacements, and `renumber` replaces keys after which SQLite would have no other.

*Forks.* SQLite must not be used on both sides of a fork: the locks of its connections, and what it
remembers about those of the file, are wrong in the child. Any thread of the program may fork at
any time. So each use stands inside ``with database.in_use():``, and a fork waits for all uses in
the process and closes all connections first. Parent and child connect again at the next use. A
wait that Ctrl-C ends leaves no lock taken.
*Invariant: at a fork, no connection of this driver is open.*
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from aiotaskq import forks
from aiotaskq.backoff import jittered
from aiotaskq.drivers.sqlite import spoilt_keys, sql
from aiotaskq.drivers.sqlite.notify import SQLiteNotifier
from aiotaskq.drivers.sqlite.process_identity import this_network, this_process
from aiotaskq.drivers.sqlite.url import SQLiteUrl
from aiotaskq.errors import ConfigError
from aiotaskq.native import make_reentrant_lock
from aiotaskq.readable import get_logger

Row = tuple[Any, ...]
T = TypeVar("T")

_logger = get_logger("aiotaskq.drivers.sqlite")

_SECRET = "secret"  # the key in the table `meta`
_KEY_GAP = 1_000_000
_LONGEST_SECRET = 64  # bytes
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_BUSY_PAUSE = 0.004  # seconds between attempts at a locked file


class SQLiteDatabase:
    """A connection for one thread. All methods block; SQLite's errors pass through.

    Args:
        url: The file, and how to use it.
        prefix: The beginning of the names of all tables.
    """

    def __init__(self, url: SQLiteUrl, prefix: str) -> None:
        self._url = url
        self._prefix = prefix
        self._use = make_reentrant_lock()
        self._notifier = SQLiteNotifier()
        self._connection: sqlite3.Connection | None = None
        self._synchronous = ""  # the mode that the connection is in
        self._rendered: dict[str, str] = {}  # statements by their templates
        self._file: tuple[int, int] | None = None  # the device and the number of the open file
        self.generation = 0
        """The number of files that the path has led to, less one."""
        self.secret = b""
        """The contents of datagrams, which only programs that can read the file know."""
        self._topics: set[str] = set()  # to notify after the commit
        with _registering:
            _databases.add(self)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other threads from forking meanwhile."""
        with self._use:
            yield

    def reconnect(self) -> None:
        """Connect again if a fork or a failure has ended the connection.

        Raises:
            ConfigError: There can be no such database at present.
        """
        if self._connection is None:
            self.open()

    def follow(self) -> None:
        """Connect to the file that the path leads to now, if there is no connection to it.

        Raises:
            ConfigError: There can be no such database at present.
        """
        if self._connection is None or self._file != _file_at(self._url.path):
            self.open()

    def open(self) -> None:
        """Connect, and create the tables if they are missing; end an earlier connection.

        A new file can be read by its owner only, and so can its companions. After an error there
        is no connection.

        Raises:
            ConfigError: The path can never be such a database, or a later version wrote it.
        """
        path = self._url.path
        self._disconnect()
        _check_place(path)
        _create_private(path)
        # Before connecting: where it is replaced in between, the next use finds another one.
        file, secret = _file_at(path), self.secret
        # Not only in this thread: a thread that forks closes it.
        self._connection = connection = sqlite3.connect(
            path, isolation_level=None, timeout=0, check_same_thread=False
        )
        _connections.add(connection)
        try:
            self._set_up(connection)
        except BaseException:  # Ctrl-C as well: no connection is left half set up
            self._disconnect()
            raise
        if self._file is not None and (file, self.secret) != (self._file, secret):
            _logger.error(
                "%s was removed or replaced: what this process held in it is given up, and it goes"
                " on with the file that is there now",
                path,
            )
            self.generation += 1
        self._file = file

    def _set_up(self, connection: sqlite3.Connection) -> None:
        # SQLite's own pauses grow from 1 ms to 100 ms, in which faster processes take turn after
        # turn. It gets a short try, and `_retry_while_busy` does the rest.
        connection.execute("PRAGMA busy_timeout = 10")
        mode = self._retry_while_busy(
            lambda: connection.execute("PRAGMA journal_mode = wal").fetchone()
        )
        if mode != ("wal",):
            raise ConfigError(
                f"{self._url.path}: the file system has no shared memory, which SQLite needs"
            )
        connection.execute(f"PRAGMA journal_size_limit = {64 * 2**20}")
        # On macOS a plain fsync stops at the disk's own cache; elsewhere this means nothing.
        connection.execute("PRAGMA fullfsync = 1")
        self._prepare()

    def close(self) -> None:
        """Disconnect."""
        with self._use:
            self._notifier.close()
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._synchronous = ""
        if connection is not None:
            try:
                connection.close()
            finally:
                _connections.discard(connection)

    def before_fork(self) -> None:
        """Wait for the end of the current use and close the connection.

        A call of `after_fork` must follow, also after an error; until then nobody else can use
        this object.
        """
        self._use.acquire()
        self._disconnect()

    def after_fork(self) -> None:
        """Allow uses again. Does nothing if `before_fork` was interrupted while it waited."""
        _release(self._use)

    @contextlib.contextmanager
    def write(self, *, relaxed: bool = False) -> Iterator[None]:
        """Run a transaction that may change something.

        Args:
            relaxed: Whether a power cut may undo the transaction. For facts that are worthless
                after a power cut: holds, leases, maintenance. The order is kept all the same: a
                later strict transaction makes all the earlier ones last as well.
        """
        self._synchronise("normal" if relaxed else self._url.synchronous)
        self._topics.clear()
        self._retry_while_busy(lambda: self._run("BEGIN IMMEDIATE"))
        try:
            yield
            ports = self._ports_to_notify()
            self._run("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # the first error tells the cause
                self._run("ROLLBACK")
            raise
        self._notifier.notify(ports, self.secret)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Undo the statements of the block alone if one of them fails, inside `write`."""
        self._run("SAVEPOINT apart")
        try:
            yield
        except BaseException:
            self._run("ROLLBACK TO apart")
            self._run("RELEASE apart")
            raise
        self._run("RELEASE apart")

    def notify(self, topic: str) -> None:
        """Notify the listeners of a topic after the commit; inside `write`."""
        self._topics.add(topic)

    def rows(self, template: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
        """Run a query and return its rows."""
        try:
            return self._retry_while_busy(lambda: self._run(template, parameters).fetchall())
        except sqlite3.OperationalError as error:
            if "decode to UTF-8" not in str(error):
                raise
        # Not always, because a function of Python for each text costs time.
        self._live.text_factory = _decode
        try:
            return self._retry_while_busy(lambda: self._run(template, parameters).fetchall())
        finally:
            self._live.text_factory = str

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

    def write_port(self, port: int, topics: Collection[str]) -> bytes:
        """Write a port of this process into the table of wake-ups, once for each topic.

        Returns:
            The contents of the datagrams that come to it.
        """
        network, process, now = this_network(), this_process(), time.time()
        with self.write(relaxed=True):
            for topic in topics:
                self.change(sql.WRITE_PORT, (topic, network, port, now, process))
        return self.secret

    def erase_port(self, port: int) -> None:
        """Delete the rows of a port of this process."""
        with self.write(relaxed=True):
            self.change(sql.ERASE_PORT, (this_network(), port))

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
            prefix = self._prefix.replace('"', '""')
            text = re.sub(r"~(\w+)", lambda found: f'"{prefix}_{found[1]}"', template)
            self._rendered[template] = text
        return text

    def _retry_while_busy(self, step: Callable[[], T]) -> T:
        """Run a step, repeatedly while others lock the file, until the timeout is over."""
        deadline = time.monotonic() + self._url.busy_timeout
        while True:
            try:
                return step()
            except sqlite3.OperationalError as error:
                # The low byte is the primary code; the rest makes it more precise.
                code: int = getattr(error, "sqlite_errorcode", 0)
                if code & 0xFF not in _BUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(jittered(_BUSY_PAUSE))

    def _synchronise(self, mode: str) -> None:
        if mode != self._synchronous:
            self._run(f"PRAGMA synchronous = {mode}")
            self._synchronous = mode

    def _ports_to_notify(self) -> list[int]:
        if not self._topics:
            return []
        since = time.time() - SQLiteNotifier.stale_after
        found = {
            row[0]
            for topic in self._topics
            for row in self.rows(sql.PORTS_OF, (topic, self._notifier.network, since))
        }
        return [port for port in found if isinstance(port, int) and 0 < port < 65536]

    def _has_impossible_keys(self) -> bool:
        limit = (spoilt_keys.LAST_KEY,)
        if any(self.rows(keys, limit) for keys, _, _ in spoilt_keys.SPOILT_KEYS.values()):
            return True
        names = [(f"{self._prefix}_{table}",) for table in spoilt_keys.COUNTED]
        last = [seq for name in names for [seq] in self.rows(spoilt_keys.READ_SEQUENCE, name)]
        return any(isinstance(seq, int) and seq >= spoilt_keys.LAST_KEY for seq in last)

    def renumber(self) -> None:
        """Replace keys after which there would be hardly another one; inside `write`."""
        for table, (keys, last, move) in spoilt_keys.SPOILT_KEYS.items():
            found = self.rows(keys, (spoilt_keys.LAST_KEY,))
            name = (f"{self._prefix}_{table}",)
            counter = (
                self.rows(spoilt_keys.READ_SEQUENCE, name) if table in spoilt_keys.COUNTED else ()
            )
            spoilt = any(isinstance(seq, int) and seq >= spoilt_keys.LAST_KEY for [seq] in counter)
            if not found and not spoilt:
                continue
            first, key = self._room(last)
            found = self.rows(keys, (first,))
            _logger.error("the keys of %s were spoilt; %d rows get new ones", *name, len(found))
            for [old] in found:
                key += 1
                self._run(move, (key, old))
            if counter:
                self._run(spoilt_keys.WRITE_SEQUENCE, (key, *name))

    def _room(self, last: str) -> tuple[int, int]:
        """Return from which key on rows have to move, and a key after which there is room."""
        first = spoilt_keys.LAST_KEY
        while True:
            # Beyond the keys of rows that are gone, which must not come back.
            key: int = (self.rows(last, (first,))[0][0] or 0) + _KEY_GAP
            # A key right before the limit is spoilt as well: the next ones would be beyond it.
            if key + _KEY_GAP < first or first < 4 * _KEY_GAP:
                return first, key
            first //= 2

    def _prepare(self) -> None:
        if self._version() != sql.VERSION:
            with self.write():
                version = self._version()  # again: another process may have been faster
                if version is None:
                    self._run_all(sql.SCHEMA)
                else:
                    for older in range(version, sql.VERSION):
                        self._run_all(sql.MIGRATIONS[older])
                self._run(sql.WRITE_VERSION, (str(sql.VERSION),))
        found = self.rows(sql.READ_META, (_SECRET,))
        if not found:
            with self.write():
                self._run(sql.ADD_META, (_SECRET, secrets.token_hex(16)))
                found = self.rows(sql.READ_META, (_SECRET,))
        if self._has_impossible_keys():
            with self.write():
                self.renumber()
        self.secret = str(found[0][0]).encode(errors="replace")[:_LONGEST_SECRET]

    def _run_all(self, statements: Iterable[str]) -> None:
        for statement in statements:
            self._run(statement)

    def _version(self) -> int | None:
        if not self.rows(sql.HAS_TABLE, (f"{self._prefix}_meta",)):
            return None
        found = self.rows(sql.READ_VERSION)
        text = str(found[0][0]) if found else ""
        version = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        if version < 1:
            raise ConfigError(
                f"{self._url.path} has tables of the version {text!r:.50}, which no release has"
                " written: restore it, or remove it"
            )
        if version > sql.VERSION:
            raise ConfigError(
                f"{self._url.path} has tables of version {version}, and this aiotaskq knows"
                f" version {sql.VERSION}: a later release made it"
            )
        return version


# C code may fork without the hooks below. Then the child must not even close a connection of its
# parent, as that would undo the parent's locks. This set keeps them from being closed by the
# garbage collector.
_connections: set[sqlite3.Connection] = set()

_databases: WeakSet[SQLiteDatabase] = WeakSet()
_registering = make_reentrant_lock()  # held during a fork, so that no object is made then
_stopped: list[SQLiteDatabase] = []  # those that the current fork has stopped, or is stopping


def _before_fork() -> None:
    try:
        _registering.acquire()
        for database in list(_databases):
            _stopped.append(database)  # first: an interruption may come at any point
            database.before_fork()
    except BaseException:  # of a signal handler, such as Ctrl-C: no call of `_after_fork` follows
        _after_fork()
        raise


def _after_fork() -> None:
    while _stopped:
        _stopped.pop().after_fork()
    _release(_registering)


def _release(lock: Any) -> None:
    """Release a lock of this thread, unless the wait for it was interrupted."""
    with contextlib.suppress(RuntimeError):  # it is not this thread's
        lock.release()


forks.register(_before_fork, _after_fork)


def _decode(text: bytes) -> str:
    return text.decode(errors="replace")


def _file_at(path: Path) -> tuple[int, int] | None:
    """Return the identity of the file at a path; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _create_private(path: Path) -> None:
    """Create a file that its owner alone can use; SQLite gives its companions the same mode."""
    # Where this fails, the file exists, or SQLite says why it cannot be made.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _check_place(path: Path) -> None:
    """Refuse paths for which SQLite only says "unable to open database file"."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a database file")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to keep {path.name} in")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{path} is read-only for this user")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"the folder of {path} is read-only for this user")
