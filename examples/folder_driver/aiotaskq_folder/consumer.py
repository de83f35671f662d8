"""A consumer and its lease.

Theory of operation. The lease of a consumer is the file `consumers/<consumer>`; its mtime is when
the lease ends. Whoever gives the consumer up removes the file, and a consumer without its file can
neither fetch nor settle nor renew. Each call holds the lock, so a renewal holds or comes too late,
and never both.

What a fetch takes is noted in `_taken`, in the thread. If the fetch is cancelled meanwhile, the
next one finds it there.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import DeadLetter, Grant, News
from aiotaskq.contract.settlement import Again, Dead, Done, Settlement
from aiotaskq.errors import LeaseLost, Unavailable
from aiotaskq_folder.connection import FolderConnection, Step, in_thread
from aiotaskq_folder.messages import (
    Name,
    Stored,
    back,
    fence,
    folder_of,
    is_marked,
    mark,
    store,
    take_back,
    waiting,
)
from aiotaskq_folder.notify import LOOK, MESSAGES, FolderNotifier


class Record(msgspec.Struct):
    """What the file of a consumer holds."""

    name: str
    queues: tuple[str, ...]
    about: bytes


class FolderConsumer:
    """One incarnation of a worker; made by `FolderBroker.consumer`."""

    def __init__(self, folder: FolderConnection, record: Record, lease: float) -> None:
        self.id = secrets.token_hex(8)
        self.grant = Grant(self.id, record.queues, lease)
        self.folder = folder
        self._record = record
        self._notifier = FolderNotifier(folder, MESSAGES)
        self._file, self._held = f"consumers/{self.id}", f"held/{self.id}"
        self._begun = self._closed = False
        self._taken: list[Delivery] = []  # and not returned yet
        self._untold: dict[str, str] = {}  # receipts and ids of what it holds, until cancelled

    async def open(self) -> None:
        await self._notifier.open()
        await self._begin()

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            due = await self._take(limit, order or self.grant.queues)
            left = end - loop.time()
            # Nothing is awaited from here to the return: what was taken cannot be lost.
            if self._taken or left <= 0:
                taken, self._taken = self._taken[:limit], self._taken[limit:]
                return taken
            await self._notifier.wait(min(left, due, LOOK))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        gone = await self._settle(batch)
        self._notifier.wake()  # a fetch that waits may have been passed over for a suspect
        return gone

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            with suppress(Unavailable):
                await self._end()
            await self._notifier.close()

    # --- in the thread, under the lock ---

    @in_thread
    def _begin(self) -> None:
        if not self._begun:
            until = self.folder.clock() + self.grant.seconds
            self.folder.move([(self.folder.write(self._record, until=until), self._file)])
            self._begun = True

    def _lives(self) -> bool:
        return self.folder.until(self._file) > 0

    @in_thread
    def _take(self, limit: int, queues: Sequence[str]) -> float:
        """Take what is due; return in how many seconds more is."""
        if not self._lives():
            raise LeaseLost("this consumer was given up for dead, or is closed")
        now, due = self.folder.clock(), float("inf")
        if self._taken:  # by a call that was cancelled
            return due
        found = [(name, queue) for queue in queues for name in waiting(self.folder, queue)]
        if not self.folder.names(self._held):
            for name, queue in found:
                if name.suspect and self._hand_out(name, queue, now):
                    return due
        for name, queue in found:
            if name.due > now * 1e6:
                due = min(due, name.due / 1e6 - now)
            elif not name.suspect and len(self._taken) < limit:
                self._hand_out(name, queue, now)
        return due

    def _hand_out(self, name: Name, queue: str, now: float) -> bool:
        file = f"waiting/{folder_of(queue)}/{name}"
        stored = self.folder.read(file, Stored)
        if stored is None or is_marked(self.folder, mark("cancelled", stored.id)):
            self.folder.move([(file, None)])
            return False
        receipt = f"{self.folder.number():020}.{name}.{folder_of(queue)}"
        self.folder.move([(file, f"{self._held}/{receipt}")])
        delivery = Delivery(
            id=stored.id,
            queue=queue,
            body=stored.body,
            receipt=receipt,
            crashes=name.crashes,
            priority=9 - name.level,
            expired=0 < name.expires <= now * 1e6,
            expires_at=name.expires / 1e6 if name.expires else None,
            crash_note=stored.crash_note,
        )
        self._untold[receipt] = stored.id
        self._taken.append(delivery)
        return True

    @in_thread
    def _settle(self, batch: Sequence[Settlement]) -> list[Delivery]:
        there = set(self.folder.names(self._held)) if self._lives() else set()
        steps: list[Step] = []
        gone: list[Delivery] = []
        for one in batch:
            receipt = one.delivery.receipt
            self._untold.pop(receipt, None)
            if receipt not in there:
                gone.append(one.delivery)
                continue
            there.remove(receipt)
            steps += self._steps(one, f"{self._held}/{receipt}")
        # Where each file stands for itself, it needs no journal.
        alone = all(isinstance(one, Done) for one in batch)
        (self.folder.move if alone else self.folder.apply)(steps)
        if not alone:
            self.folder.wake(MESSAGES)
        return gone

    def _steps(self, one: Settlement, held: str) -> list[Step]:
        match one:
            case Done():
                return [(held, None)]
            case Again():
                return [*store(self.folder, [one.envelope]), (held, None)]
            case Dead():
                return [self._bury(one), (held, None)]
            case _:
                return [back(self.id, one.delivery.receipt)]

    def _bury(self, one: Dead) -> Step:
        letter = DeadLetter(
            key=f"{self.folder.number():020}",
            id=one.delivery.id,
            queue=one.delivery.queue,
            body=one.delivery.body,
            reason=one.reason,
            crashes=one.delivery.crashes,
            died_at=self.folder.clock(),
            details=one.details,
        )
        return self.folder.write(letter), f"dead/{folder_of(letter.queue)}/{letter.key}"

    @in_thread
    def news(self) -> News:
        told = [
            (receipt, name)
            for receipt, name in self._untold.items()
            if is_marked(self.folder, mark("cancelled", name))
        ]
        for receipt, _ in told:
            del self._untold[receipt]
        queues = self.grant.queues
        suspects = any(name.suspect for one in queues for name in waiting(self.folder, one))
        return News(cancelled={name for _, name in told}, suspects=suspects)

    @in_thread
    def _end(self) -> None:
        if self._lives():
            released = [back(self.id, receipt) for receipt in self.folder.names(self._held)]
            self.folder.apply([*released, (self._file, None)])
            self.folder.wake(MESSAGES)


class FolderLease:
    """The lease of a consumer of any process; made by `FolderBroker.lease`."""

    def __init__(self, folder: FolderConnection, grant: Grant) -> None:
        self.folder = folder
        self._grant = grant
        self._file = f"consumers/{grant.consumer}"

    async def close(self) -> None:
        self.folder.close()

    @in_thread
    def renew(self) -> bool:
        if not self.folder.until(self._file):
            return False
        until = self.folder.clock() + self._grant.seconds
        os.utime(self.folder.root / self._file, (until, until))
        return True

    @in_thread
    def end(self, note: str) -> int:
        if not self.folder.until(self._file):
            return 0
        fence(self.folder, self._grant.consumer, note)
        return take_back(self.folder, self._grant.consumer)
