"""Outcomes that a process has received: in memory, and on disk beyond a limit.

Theory of operation
-------------------
`RabbitOutcomes` is used from several threads under a lock. The first final outcome of an id stays.
Listeners are notified after the outcome was put, so that they find it.

An entry is in memory or on disk, and leaves when it is forgotten, when its time is over (`sweep`
looks at all), or as the oldest of more than `_KEPT`. When those in memory have more than
`_MOST_BYTES`, a thread moves the oldest ones to a database that SQLite keeps in a temporary file,
which vanishes with the process. Until an entry is written it stays in memory, so it is found at any
moment. If it was replaced or forgotten meanwhile, the written one is dropped.

Nobody may read a result, or only long after it came, so it is neither kept in memory for ever nor
dropped early: its caller would wait for it in vain.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from aiotaskq.contract.outcome import Outcome
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.rabbitmq")

_KEPT = 100_000  # outcomes, the latest
_MOST_BYTES = 64 * 2**20  # in memory
_OVERHEAD = 1000  # bytes of an outcome beside its result, roughly
_AT_ONCE = 50  # outcomes that are written in one step

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Outcome).decode


class _Entry:
    """One outcome; None in place of one that is on disk."""

    __slots__ = ("final", "outcome", "size", "until")

    def __init__(self, outcome: Outcome, until: float) -> None:
        self.outcome: Outcome | None = outcome
        self.final: bool = outcome.status.final
        self.size = memoryview(outcome.result).nbytes + _OVERHEAD
        self.until = until


class RabbitOutcomes:
    """The outcomes that a process has received, for all its event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._size = 0  # bytes in memory
        self._listeners: set[RabbitOutcomeListener] = set()
        self._disk = _Disk()
        self._moving = threading.Lock()  # held while the disk changes
        self._spilling = False
        self._disk_failed = False

    def put(self, outcomes: Sequence[Outcome], ttl: float | None = None) -> list[str]:
        """Keep outcomes for some seconds; return the ids of those whose task has ended before."""
        until = math.inf if ttl is None else time.monotonic() + ttl
        refused: list[str] = []
        final: list[Outcome] = []
        with self._lock:
            for outcome in outcomes:
                known = self._find(outcome.task_id)
                if known is not None and known.final:
                    refused.append(outcome.task_id)
                    continue
                self._remove(outcome.task_id)
                entry = self._entries[outcome.task_id] = _Entry(outcome, until)
                self._size += entry.size
                if entry.final:
                    final.append(outcome)
            while len(self._entries) > _KEPT:
                self._remove(next(iter(self._entries)))
            listeners = list(self._listeners)
            spill = self._size > _MOST_BYTES and not self._spilling and not self._disk_failed
            self._spilling = self._spilling or spill
        if spill:
            threading.Thread(target=self._spill, name="aiotaskq-results", daemon=True).start()
        if final:
            for listener in listeners:
                listener.notify(final)
        return refused

    async def get(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        """Return the outcomes of those ids that have one."""
        with self._lock:
            entries = {one: entry for one in ids if (entry := self._find(one)) is not None}
        found = {one: told for one, entry in entries.items() if (told := entry.outcome) is not None}
        if away := entries.keys() - found:
            found |= await asyncio.to_thread(self._disk.read, away)
        return found

    def forget(self, ids: Collection[str]) -> int:
        """Drop outcomes; return how many there were."""
        with self._lock:
            there = [one for one in set(ids) if self._find(one) is not None]
            for one in there:
                self._remove(one)
        return len(there)

    async def sweep(self) -> None:
        """Drop the outcomes whose time is over, and from the disk those that were dropped."""
        with self._lock:
            for one in list(self._entries):
                self._find(one)
        if self._disk.is_used:
            await asyncio.to_thread(self._sweep_disk)

    def _sweep_disk(self) -> None:
        with self._moving:
            with self._lock:
                kept = {one for one, entry in self._entries.items() if entry.outcome is None}
            self._disk.keep(kept)

    def _find(self, task_id: str) -> _Entry | None:
        entry = self._entries.get(task_id)
        if entry is not None and time.monotonic() >= entry.until:
            self._remove(task_id)
            return None
        return entry

    def _remove(self, task_id: str) -> None:
        entry = self._entries.pop(task_id, None)
        if entry is not None and entry.outcome is not None:
            self._size -= entry.size

    def _spill(self) -> None:
        """Move the oldest outcomes to the disk, until half of the limit is free."""
        try:
            while some := self._oldest():
                with self._moving:
                    self._disk.write([one.outcome for one in some if one.outcome is not None])
                    self._mark_written(some)
        except sqlite3.Error as error:
            self._disk_failed = True
            logger.warning(
                "Results that nobody has read stay in memory: they cannot be written to the disk",
                extra={"event": "rabbitmq_results_unwritten", "error": str(error)},
            )
        finally:
            with self._lock:
                self._spilling = False

    def _mark_written(self, entries: Iterable[_Entry]) -> None:
        with self._lock:
            for entry in entries:
                outcome, entry.outcome = entry.outcome, None
                if outcome is not None and self._entries.get(outcome.task_id) is entry:
                    self._size -= entry.size

    def _oldest(self) -> list[_Entry]:
        with self._lock:
            some: list[_Entry] = []
            for entry in self._entries.values() if self._size > _MOST_BYTES // 2 else ():
                if entry.outcome is not None:
                    some.append(entry)
                    if len(some) == _AT_ONCE:
                        break
            return some

    # --- listeners ------------------------------------------------------------------------------

    def notify_missed(self) -> None:
        """Notify all listeners that they may have missed outcomes."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.notify([])

    def listen(self) -> RabbitOutcomeListener:
        """Return a new listener for the running event loop."""
        listener = RabbitOutcomeListener()
        with self._lock:
            self._listeners.add(listener)
        return listener

    def unlisten(self, listener: RabbitOutcomeListener) -> None:
        """Drop a listener."""
        with self._lock:
            self._listeners.discard(listener)


class _Disk:
    """Outcomes in a temporary database. Its calls block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    @property
    def is_used(self) -> bool:
        """Return whether any outcome may be there."""
        return self._database is not None

    def write(self, outcomes: Iterable[Outcome]) -> None:
        """Add outcomes.

        Raises:
            sqlite3.Error: The disk is full, or cannot be written to.
        """
        with self._lock:
            if self._database is None:
                # No name: SQLite makes a file of its own when it needs one, and removes it.
                database = sqlite3.connect("", check_same_thread=False)
                database.execute("CREATE TABLE outcomes (id TEXT PRIMARY KEY, body BLOB)")
                self._database = database
            with self._database as database:
                database.executemany(
                    "INSERT OR REPLACE INTO outcomes VALUES (?, ?)",
                    [(one.task_id, _encode(one)) for one in outcomes],
                )

    def read(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        """Return outcomes by id; those that are gone are missing."""
        found: dict[str, Outcome] = {}
        with self._lock:
            database = self._database
            if database is None:
                return found
            for one in ids:
                rows = database.execute("SELECT body FROM outcomes WHERE id = ?", (one,))
                for [body] in rows:
                    found[one] = _decode(body)
        return found

    def keep(self, ids: Collection[str]) -> None:
        """Remove all but these."""
        with self._lock:
            if self._database is None:
                return
            if not ids:
                self._database.close()
                self._database = None
                return
            with self._database as database:
                there = list(database.execute("SELECT id FROM outcomes"))
                database.executemany(
                    "DELETE FROM outcomes WHERE id = ?", [one for one in there if one[0] not in ids]
                )


class RabbitOutcomeListener:
    """Passes outcomes from any thread to the event loop in which it was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.batches: asyncio.Queue[Sequence[Outcome]] = asyncio.Queue()

    def notify(self, outcomes: Sequence[Outcome]) -> None:
        """Pass outcomes on. Safe to call in any thread."""
        with contextlib.suppress(RuntimeError):  # its event loop is closed
            self._loop.call_soon_threadsafe(self.batches.put_nowait, outcomes)
