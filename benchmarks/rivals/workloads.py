"""The tasks that every contestant runs, and the counter that shows from outside that they ran.

This module runs in the environment of a contestant, so it may import only the standard library.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable

SLOTS = 512  # of 8 bytes each; the first one holds how many are taken
COUNTER_BYTES = SLOTS * 8

TEXT = "x" * 100_000

# The workloads; each name is a task.
NAMES = ("noop", "sync", "sleep", "cpu", "payload")

Value = int | float | str


def value(workload: str, number: int) -> Value:
    """Return the argument of the task with this number."""
    match workload:
        case "noop" | "sync":
            return number
        case "sleep":
            return (1 + number % 50) / 1000
        case "cpu":
            return 0.0002
        case "payload":
            return TEXT
    raise ValueError(workload)


class _Counter:
    """A counter of ended tasks that another process can read, without a system call.

    Each process has its own slot in a shared file, `BENCH_COUNTER`. Without the file nothing is
    shared. A forked process takes a new slot.
    """

    def __init__(self) -> None:
        self._path = os.environ.get("BENCH_COUNTER")
        self._slots, self._mine = self._take()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._renew)

    def add(self) -> None:
        """Count one task; for tasks of one event loop."""
        self._slots[self._mine] += 1

    def add_from_thread(self) -> None:
        """Count one task; for tasks in threads."""
        with self._lock:
            self._slots[self._mine] += 1

    def _renew(self) -> None:
        self._slots, self._mine = self._take()
        self._lock = threading.Lock()

    def _take(self) -> tuple[memoryview, int]:
        if self._path is None:
            return memoryview(mmap.mmap(-1, COUNTER_BYTES)).cast("Q"), 1
        with open(self._path, "r+b") as file:  # noqa: PTH123 - fcntl wants the file itself
            slots = memoryview(mmap.mmap(file.fileno(), COUNTER_BYTES)).cast("Q")
            fcntl.flock(file, fcntl.LOCK_EX)
            slots[0] += 1
            mine = slots[0]
            fcntl.flock(file, fcntl.LOCK_UN)  # mmap has a duplicate of the file, and keeps it open
            return slots, mine


_finished = _Counter()


# --- coroutines ---


async def noop(value: int) -> int:
    _finished.add()
    return value


async def sleep(value: float) -> float:
    await asyncio.sleep(value)
    _finished.add()
    return value


async def cpu(value: float) -> float:
    _spin(value)
    _finished.add()
    return value


async def payload(value: str) -> int:
    _finished.add()
    return len(value)


# --- plain functions ---


def plain_noop(value: int) -> int:
    _finished.add_from_thread()
    return value


def plain_sleep(value: float) -> float:
    time.sleep(value)
    _finished.add_from_thread()
    return value


def plain_cpu(value: float) -> float:
    _spin(value)
    _finished.add_from_thread()
    return value


def plain_payload(value: str) -> int:
    _finished.add_from_thread()
    return len(value)


def _spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


# The functions of the workloads, as coroutines and as plain functions.
FUNCTIONS: dict[str, Callable[..., object]] = {
    "noop": noop,
    "sync": plain_noop,
    "sleep": sleep,
    "cpu": cpu,
    "payload": payload,
}
PLAIN_FUNCTIONS: dict[str, Callable[..., object]] = {
    "noop": plain_noop,
    "sync": plain_noop,
    "sleep": plain_sleep,
    "cpu": plain_cpu,
    "payload": plain_payload,
}
