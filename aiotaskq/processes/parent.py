"""A child's watch on its parent.

Theory of operation. A child that has lost its parent is an orphan: nobody replaces it, watches its
event loop or passes signals on to it, and it must not go on as if somebody did. The kernel gives
an orphan another parent at once, so `os.getppid` changes when the parent dies and never changes
back. The parent may die before the child asks for the first time; so the pid to compare with is
the one that the parent had when it started the child, not the first answer of `os.getppid`.

Each child looks for itself: worker processes and processes of a pool in a thread (`watch_parent`),
as user code may keep them busy; the lease keeper and the file watcher in their main loops
(`is_parent`). Nobody relies on the end of a pipe: children of the parent may hold it open.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection

from aiotaskq.processes.operating_system import open_pidfd

_LOOK_INTERVAL = 0.5  # seconds


def parent_pid() -> int:
    """Return the pid of the process that started this one, alive or not."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        return parent.pid
    return os.getppid()  # not started by `multiprocessing`


def is_parent(pid: int) -> bool:
    """Return whether a process is still the parent of this one, which it is until it dies."""
    return os.getppid() == pid


def _wait_for_death(parent: int) -> None:
    pidfd = open_pidfd(parent)
    while is_parent(parent):  # asked first: the pidfd may be that of a stranger otherwise
        if pidfd is None:
            time.sleep(_LOOK_INTERVAL)
        else:
            connection.wait([pidfd], _LOOK_INTERVAL)
    if pidfd is not None:
        os.close(pidfd)


def watch_parent(
    on_death: Callable[[], object], *, patience: float, on_exit: Callable[[], object]
) -> None:
    """Call a function from a thread when the parent has died, and exit for good later.

    Args:
        on_death: Must be safe to call from a thread.
        patience: Seconds that the process gets to end by itself.
        on_exit: Called from the thread before it exits for good.
    """
    parent = parent_pid()

    def watch() -> None:
        _wait_for_death(parent)
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the process is ending
            on_death()
        time.sleep(patience)
        sys.stderr.flush()
        on_exit()
        os._exit(1)

    threading.Thread(target=watch, name="aiotaskq-parent", daemon=True).start()
