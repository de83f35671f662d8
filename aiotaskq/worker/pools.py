"""The thread pool and the process pool of a worker, made when the first task wants one."""

from __future__ import annotations

import asyncio
from typing import Any

from aiotaskq.tasks.option_table import Executor
from aiotaskq.worker.process_pool import ProcessPool
from aiotaskq.worker.thread_pool import ThreadPool


class Pools:
    """Both pools of a worker. One without plain functions starts neither."""

    def __init__(
        self, *, threads: int, processes: int, codec_settings: dict[str, Any], worker: str
    ) -> None:
        self._thread_count = threads
        self._process_count = processes
        self._codec_settings = codec_settings
        self._worker = worker
        self._threads: ThreadPool | None = None
        self._processes: ProcessPool | None = None
        self._slots = {
            "thread": asyncio.Semaphore(threads),
            "process": asyncio.Semaphore(processes),
        }

    @property
    def stuck(self) -> int:
        """The number of threads whose functions do not end, though they were cancelled."""
        return 0 if self._threads is None else self._threads.given_up

    async def take(self, executor: Executor) -> None:
        """Wait for a free thread or process, and take its slot.

        A worker takes more tasks than it has threads. A task that waits here does not run yet, and
        its timeout has not begun.
        """
        await self._slots[executor].acquire()

    def free(self, executor: Executor) -> None:
        """Give a slot back."""
        self._slots[executor].release()

    def threads(self) -> ThreadPool:
        """Return the thread pool."""
        if self._threads is None:
            self._threads = ThreadPool(self._thread_count)
        return self._threads

    def processes(self) -> ProcessPool:
        """Return the process pool."""
        if self._processes is None:
            self._processes = ProcessPool(
                self._process_count, self._codec_settings, worker=self._worker
            )
        return self._processes

    async def close(self) -> None:
        """End both."""
        if self._processes is not None:
            await self._processes.close()
        if self._threads is not None:
            await self._threads.close()
        self._threads = self._processes = None
