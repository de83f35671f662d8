"""Consumers and their leases.

Theory of operation. The lease of a consumer is the file `consumers/<consumer>`, whose mtime is the
end of the lease. A consumer is given up by removing this file, and without it the consumer can
neither fetch nor settle nor renew. Each call holds the lock, so a renewal either succeeds or comes
too late, and never both.

A fetch notes in `_taken`, in the thread, which deliveries it took. If the fetch is cancelled
meanwhile, they stay there for the next fetch.
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
from aiotaskq_folder.connection import FolderConnection, Step, in_thread, portions
from aiotaskq_folder.messages import (
    MessageName,
    StoredMessage,
    fence,
    folder_of,
    hand_back,
    held,
    is_marked,
    mark,
    store,
    take_back,
    waiting,
)
from aiotaskq_folder.notify import LOOK, MESSAGES, FolderNotifier


class ConsumerRecord(msgspec.Struct):
    """The content of the file of a consumer."""

    name: str
    queues: tuple[str, ...]
    about: bytes


class FolderConsumer:
    """One incarnation of a worker; made by `FolderBroker.consumer`."""

    def __init__(self, folder: FolderConnection, record: ConsumerRecord, lease: float) -> None:
        self.id = secrets.token_hex(8)
        self.grant = Grant(self.id, record.queues, lease)
        self.folder = folder
        self._record = record
        self._notifier = FolderNotifier(folder, MESSAGES)
        self._file = f"consumers/{self.id}"
        self._begun = self._closed = False
        self._taken: list[Delivery] = []  # not yet returned by `fetch`
        self._not_cancelled: dict[str, str] = {}  # receipts of held messages, with their ids

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
            # There is no await from here to the return, so no delivery can be lost.
            if self._taken or left <= 0:
                taken, self._taken = self._taken[:limit], self._taken[limit:]
                return taken
            await self._notifier.wait(min(left, due, LOOK))

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        gone = [one for part in portions(batch) for one in await self._settle(part)]
        self._notifier.wake()  # a waiting fetch may have passed over a suspect
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

    def _is_alive(self) -> bool:
        return self.folder.until(self._file) > 0

    @in_thread
    def _take(self, limit: int, queues: Sequence[str]) -> float:
        """Take due messages and return in how many seconds the next one falls due."""
        if not self._is_alive():
            raise LeaseLost("this consumer was given up for dead, or is closed")
        now, due = self.folder.clock(), float("inf")
        if self._taken:  # by a fetch that was cancelled
            return due
        found = [(name, queue) for queue in queues for name in waiting(self.folder, queue)]
        if not held(self.folder, self.id):
            for name, queue in found:
                if name.suspect and self._hand_out(name, queue, now):
                    return due
        for name, queue in found:
            if name.due > now * 1e6:
                due = min(due, name.due / 1e6 - now)
            elif not name.suspect and len(self._taken) < limit:
                self._hand_out(name, queue, now)
        return due

    def _hand_out(self, name: MessageName, queue: str, now: float) -> bool:
        file = f"waiting/{folder_of(queue)}/{name}"
        message = self.folder.read(file, StoredMessage)
        if message is None or is_marked(self.folder, mark("cancelled", message.id)):
            self.folder.move([(file, None)])
            return False
        receipt = f"{self.folder.number():020}.{name}.{folder_of(queue)}"
        self.folder.move([(file, f"held/{self.id}/{receipt}")])
        delivery = Delivery(
            id=message.id,
            queue=queue,
            body=message.body,
            receipt=receipt,
            crashes=name.crashes,
            priority=9 - name.level,
            expired=0 < name.expires <= now * 1e6,
            expires_at=name.expires / 1e6 if name.expires else None,
            crash_note=message.crash_note,
        )
        self._not_cancelled[receipt] = message.id
        self._taken.append(delivery)
        return True

    @in_thread
    def _settle(self, batch: Sequence[Settlement]) -> list[Delivery]:
        receipts = set(held(self.folder, self.id)) if self._is_alive() else set()
        steps: list[Step] = []
        gone: list[Delivery] = []
        for one in batch:
            receipt = one.delivery.receipt
            self._not_cancelled.pop(receipt, None)
            if receipt in receipts:
                receipts.remove(receipt)
                steps += self._steps(one, f"held/{self.id}/{receipt}")
            else:
                gone.append(one.delivery)
        if all(isinstance(one, Done) for one in batch):
            self.folder.move(steps)  # single files need no journal
        else:
            self.folder.apply(steps)
            self.folder.wake(MESSAGES)
        return gone

    def _steps(self, one: Settlement, file: str) -> list[Step]:
        match one:
            case Done():
                return [(file, None)]
            case Again():
                return [*store(self.folder, [one.envelope]), (file, None)]
            case Dead():
                return [self._bury(one), (file, None)]
            case _:
                return [hand_back(self.id, one.delivery.receipt)]

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
        cancelled = {
            receipt: name
            for receipt, name in self._not_cancelled.items()
            if is_marked(self.folder, mark("cancelled", name))
        }
        for receipt in cancelled:
            del self._not_cancelled[receipt]
        queues = self.grant.queues
        suspects = any(name.suspect for one in queues for name in waiting(self.folder, one))
        return News(cancelled=set(cancelled.values()), suspects=suspects)

    @in_thread
    def _end(self) -> None:
        if self._is_alive():
            back = [hand_back(self.id, receipt) for receipt in held(self.folder, self.id)]
            self.folder.apply([*back, (self._file, None)])
            self.folder.wake(MESSAGES)


class FolderLease:
    """The lease of a consumer in any process; made by `FolderBroker.lease`."""

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
