"""The result backend.

Theory of operation. Each outcome is one file, which is replaced as a whole. Storing an outcome
looks for a final one and replaces the file, both under the lock. So if several callers store a
final outcome at the same time, exactly one of them is the first. Subscribers receive no ids, only
the advice to look again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.outcome import Outcome
from aiotaskq.errors import BackendUnavailable
from aiotaskq_folder.connection import FolderConnection, in_thread, portions
from aiotaskq_folder.messages import hashed
from aiotaskq_folder.notify import LOOK, RESULTS, FolderNotifier

_SWEEP_PERIOD = 60.0  # seconds


class FolderBackend:
    """A result backend that keeps outcomes in a folder; its arguments are those of `FolderBroker`.

    See `aiotaskq.contract.results.ResultBackend`.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(
        self, url: str, *, prefix: str = "aiotaskq", clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = FolderConnection(url, prefix, clock, BackendUnavailable)
        self._sweep_at = 0.0

    @property
    def url(self) -> str:
        return self.folder.url

    def clone(self) -> Self:
        return type(self)(self.url, prefix=self.folder.prefix, clock=self.folder.clock)

    async def open(self) -> None:
        await self.folder.open()

    async def close(self) -> None:
        self.folder.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        return [one for part in portions(batch) for one in await self._store(part, ttl)]

    async def subscribe(self) -> AsyncGenerator[Sequence[str], None]:
        notifier = FolderNotifier(self.folder, RESULTS)
        try:
            while True:
                try:
                    await notifier.open()
                    break
                except BackendUnavailable:
                    await asyncio.sleep(LOOK)
            while True:
                yield []
                await notifier.wait(LOOK)
        finally:
            await notifier.close()

    # --- in the thread, under the lock ---

    @in_thread
    def _store(self, batch: Sequence[Outcome], ttl: float | None) -> list[str]:
        folder, now = self.folder, self.folder.clock()
        until = 0.0 if ttl is None else now + ttl
        refused: list[str] = []
        for one in batch:
            there = self._read(one.task_id)
            if there is not None and there.status.final:
                refused.append(one.task_id)
            else:
                folder.move([(folder.write(one, until=until), _file(one.task_id))])
        if any(one.status.final for one in batch):
            folder.wake(RESULTS)
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_PERIOD
            folder.sweep("results")
        return refused

    @in_thread
    def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        read = ((task_id, self._read(task_id)) for task_id in ids)
        return {task_id: outcome for task_id, outcome in read if outcome is not None}

    @in_thread
    def forget(self, ids: Collection[str]) -> int:
        there = [one for one in set(ids) if self._read(one) is not None]
        self.folder.move([(_file(one), None) for one in there])
        return len(there)

    def _read(self, task_id: str) -> Outcome | None:
        """Return an outcome; None if there is none, or if it has expired."""
        file, now = _file(task_id), self.folder.clock()
        return None if 0 < self.folder.until(file) <= now else self.folder.read(file, Outcome)


def _file(task_id: str) -> str:
    return f"results/{hashed(task_id)}"
