"""The broker: publishing, maintenance, cancelling and dead letters."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import ConsumerInfo, DeadLetter, DeadLimits, Depth, Grant, Maintained
from aiotaskq.errors import BrokerUnavailable, ConfigError
from aiotaskq_folder.connection import FolderConnection, Step, in_thread, portions
from aiotaskq_folder.consumer import ConsumerRecord, FolderConsumer, FolderLease
from aiotaskq_folder.messages import (
    AT_ONCE,
    CALL_TIME,
    CANCELLED_TIME,
    UNIQUE_TIME,
    StoredMessage,
    fence,
    folder_of,
    held,
    is_marked,
    mark,
    put_mark,
    queue_of,
    store,
    take_back,
    waiting,
)
from aiotaskq_folder.notify import MESSAGES
from aiotaskq_folder.results import FolderBackend
from aiotaskq_folder.schedules import FolderSchedules

_SWEEP_PERIOD = 60.0  # seconds
_KEY = re.compile(r"[0-9]{20}")  # of a dead letter


class FolderBroker:
    """A broker that keeps messages in a folder. See `aiotaskq.contract.broker.Broker`.

    Args:
        url: ``folder:///path``, or ``folder:///path?fsync=false``.
        prefix: The name of the subfolder that holds everything.
        clock: Returns the Unix time; tests pass one that they can move.

    Raises:
        ConfigError: The URL is wrong.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(
        self, url: str, *, prefix: str = "aiotaskq", clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = FolderConnection(url, prefix, clock, BrokerUnavailable)
        self._sweep_at = 0.0

    @property
    def url(self) -> str:
        return self.folder.url

    def clone(self) -> Self:
        return type(self)(self.url, prefix=self.folder.prefix, clock=self.folder.clock)

    def backend(self) -> FolderBackend:
        return FolderBackend(self.url, prefix=self.folder.prefix, clock=self.folder.clock)

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> FolderConsumer:
        return FolderConsumer(self.folder, ConsumerRecord(name, tuple(queues), about), lease)

    def schedules(self) -> FolderSchedules:
        return FolderSchedules(self.folder)

    def lease(self, grant: Grant) -> FolderLease:
        return FolderLease(self.clone().folder, grant)

    async def open(self) -> None:
        await self.folder.open()

    async def close(self) -> None:
        self.folder.close()

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        refused: list[str] = []
        for number, part in enumerate(portions(batch)):
            call = None if call_id is None else mark("call", f"{number} of {call_id}")
            refused += await self._publish(part, call)
        return refused

    async def cancel(self, ids: Collection[str], *, running: bool = True) -> Collection[str]:
        return {one for part in portions(list(ids)) for one in await self._cancel(part, running)}

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        return [one for part in portions(letters) for one in await self._revive(queue, part)]

    # --- in the thread, under the lock ---

    @in_thread
    def _publish(self, batch: Sequence[Envelope], call: str | None) -> list[str]:
        if call is not None and is_marked(self.folder, call):
            return self.folder.read(call, list[str]) or []
        refused: list[str] = []
        steps: list[Step] = []
        claimed: set[str] = set()  # by envelopes of this batch
        for one in batch:
            unique = mark("unique", one.id)
            if one.unique and (unique in claimed or is_marked(self.folder, unique)):
                refused.append(one.id)
                continue
            steps += store(self.folder, [one])
            if one.unique:
                claimed.add(unique)
                steps.append(put_mark(self.folder, unique, UNIQUE_TIME))
        if call is not None:
            steps.append(put_mark(self.folder, call, CALL_TIME, refused))
        self.folder.apply(steps)
        self.folder.wake(MESSAGES)
        return refused

    @in_thread
    def consumers(self) -> Sequence[ConsumerInfo]:
        now = self.folder.clock()
        return [
            ConsumerInfo(id=consumer, queues=record.queues, about=record.about)
            for consumer, record in self._records()
            if self.folder.until(f"consumers/{consumer}") > now
        ]

    def _records(self) -> list[tuple[str, ConsumerRecord]]:
        names = self.folder.names("consumers")
        read = [(one, self.folder.read(f"consumers/{one}", ConsumerRecord)) for one in names]
        return [(consumer, record) for consumer, record in read if record is not None]

    @in_thread
    def _cancel(self, ids: Sequence[str], running: bool) -> set[str]:
        spared = set() if running else self._held().intersection(ids)
        marks = [mark("cancelled", one) for one in set(ids) - spared]
        self.folder.apply([put_mark(self.folder, one, CANCELLED_TIME) for one in marks])
        return spared

    @in_thread
    def cancelled_among(self, ids: Collection[str]) -> set[str]:
        return {one for one in ids if is_marked(self.folder, mark("cancelled", one))}

    def _held(self) -> set[str]:
        """Return the ids of the held messages that were not cancelled."""
        read = [
            self.folder.read(f"held/{consumer}/{receipt}", StoredMessage)
            for consumer in self.folder.names("held")
            for receipt in held(self.folder, consumer)
        ]
        ids = {message.id for message in read if message is not None}
        return {one for one in ids if not is_marked(self.folder, mark("cancelled", one))}

    @in_thread
    def maintain(self, limits: DeadLimits = DeadLimits()) -> Maintained:  # noqa: B008 - frozen
        folder, now = self.folder, self.folder.clock()
        for consumer, record in self._records():
            if folder.until(f"consumers/{consumer}") <= now:
                fence(folder, consumer, f"{record.name}: its lease ran out")
        reclaimed = trimmed = 0
        for consumer in folder.names("fenced"):
            if reclaimed < AT_ONCE:  # the next round continues
                reclaimed += take_back(folder, consumer)
        for queue in folder.names("dead"):
            trimmed += self._trim(f"dead/{queue}", limits, AT_ONCE - trimmed)
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_PERIOD
            folder.sweep("marks")
            for place in ("waiting", "held", "dead"):
                for name in folder.names(place):
                    folder.prune(f"{place}/{name}")
        return Maintained(reclaimed=reclaimed, trimmed=trimmed)

    def _trim(self, place: str, limits: DeadLimits, most: int) -> int:
        keys = self.folder.names(place)
        edge = float("-inf") if limits.age is None else self.folder.clock() - limits.age
        dropped = 0
        for key in keys[:most]:
            letter = self.folder.read(f"{place}/{key}", DeadLetter)
            if letter and letter.died_at > edge and len(keys) - dropped <= limits.most:
                break
            self.folder.move([(f"{place}/{key}", None)])
            dropped += 1
        return dropped

    @in_thread
    def depth(self) -> Mapping[str, Depth]:
        folder, now = self.folder, self.folder.clock() * 1e6
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for name in folder.names("waiting"):
            for message in waiting(folder, queue_of(name)):
                counts[name]["delayed" if message.due > now else "ready"] += 1
        for consumer in folder.names("held"):
            for receipt in held(folder, consumer):
                counts[receipt.split(".", 2)[2]]["held"] += 1
        for name in folder.names("dead"):
            counts[name]["dead"] = len(folder.names(f"dead/{name}"))
        return {queue_of(name): Depth(**count) for name, count in counts.items() if count.total()}

    @in_thread
    def purge(self, queue: str) -> int:
        place = f"waiting/{folder_of(queue)}"
        names = self.folder.names(place)
        self.folder.move([(f"{place}/{name}", None) for name in names])
        return len(names)

    @in_thread
    def dead(
        self, queue: str, limit: int = 100, *, before: str | None = None
    ) -> Sequence[DeadLetter]:
        if before is not None and not _KEY.fullmatch(before):
            raise ConfigError(f"{before!r} is not the key of a dead letter")
        place = f"dead/{folder_of(queue)}"
        keys = [key for key in self.folder.names(place) if before is None or key < before]
        newest = keys[::-1][:limit]
        read = [self.folder.read(f"{place}/{key}", DeadLetter) for key in newest]
        return [letter for letter in read if letter is not None]

    @in_thread
    def _revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> list[str]:
        place, absent = f"dead/{folder_of(queue)}", list[str]()
        there = set(self.folder.names(place))
        for key, one in letters:
            if key not in there:
                absent.append(key)
                continue
            there.remove(key)
            steps = [*store(self.folder, [one]), (f"{place}/{key}", None)]
            steps.append((mark("cancelled", one.id), None))
            if one.unique:
                steps.append(put_mark(self.folder, mark("unique", one.id), UNIQUE_TIME))
            self.folder.apply(steps)
        self.folder.wake(MESSAGES)
        return absent

    @in_thread
    def discard(self, queue: str, keys: Collection[str]) -> int:
        place = f"dead/{folder_of(queue)}"
        there = set(keys).intersection(self.folder.names(place))
        self.folder.move([(f"{place}/{key}", None) for key in there])
        return len(there)
