"""The children of a process, from the kernel where possible: a scan of all processes is slow."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def child_pids(pid: int) -> set[int]:
    """Return the pids of the children of a process; none if it has ended."""
    threads = Path(f"/proc/{pid}/task")
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        with contextlib.suppress(psutil.NoSuchProcess):
            return {child.pid for child in psutil.Process(pid).children()}
        return set()
    found: set[int] = set()
    with contextlib.suppress(OSError):  # it ends meanwhile
        for thread in threads.iterdir():
            with contextlib.suppress(OSError):
                found.update(map(int, (thread / "children").read_text().split()))
    return found


def children(pid: int, *, recursive: bool = False) -> list[psutil.Process]:
    """Return the children of a process, or all its descendants."""
    found = []
    left = sorted(child_pids(pid))
    while left:
        child = left.pop(0)
        if recursive:
            left += sorted(child_pids(child))
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(child))
    return found
