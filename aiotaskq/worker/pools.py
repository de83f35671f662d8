"""The thread pool and the process pool of a worker, made when the first task wants one."""

from __future__ import annotations

from typing import Any

from aiotaskq.tasks.option_table import Executor
from aiotaskq.worker.process_pool import ProcessPool
from aiotaskq.worker.thread_pool import ThreadPool


class Pools:
    """Both pools of a worker. One without plain functions starts neither."""

    def __init__(
        self,
        *,
        threads: int,
        processes: int,
        codec_settings: dict[str, Any],
        worker: str,
        end_orphans: bool,
    ) -> None:
        self._thread_count = threads
        self._process_count = processes
        self._codec_settings = codec_settings
        self._worker = worker
        self._end_orphans = end_orphans
        self._threads: ThreadPool | None = None
        self._processes: ProcessPool | None = None
        self._free: dict[Executor, int] = {"thread": threads, "process": processes}

    @property
    def stuck(self) -> int:
        """The number of threads whose functions do not end, though they were cancelled."""
        return 0 if self._threads is None else self._threads.given_up

    def take(self, executor: Executor) -> bool:
        """Take a slot, that is a thread or a process; return False if none is free."""
        if not self._free[executor]:
            return False
        self._free[executor] -= 1
        return True

    def give_back(self, executor: Executor) -> None:
        """Give a slot back."""
        self._free[executor] += 1

    def has_free(self, executor: Executor) -> bool:
        """Return whether a slot is free."""
        return self._free[executor] > 0

    def threads(self) -> ThreadPool:
        """Return the thread pool."""
        if self._threads is None:
            self._threads = ThreadPool(self._thread_count)
        return self._threads

    def processes(self) -> ProcessPool:
        """Return the process pool."""
        if self._processes is None:
            self._processes = ProcessPool(
                self._process_count,
                self._codec_settings,
                worker=self._worker,
                end_orphans=self._end_orphans,
            )
        return self._processes

    async def close(self) -> None:
        """End both."""
        if self._processes is not None:
            await self._processes.close()
        if self._threads is not None:
            await self._threads.close()
        self._threads = self._processes = None
