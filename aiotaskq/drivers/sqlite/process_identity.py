"""Identities of processes on this machine, and whether another process still runs.

A process is written down as ``boot id/pid namespace/pid/start time``. The boot id and the
namespace tell whether a pid means the same here; the start time tells whether it is the same
process or a later one with the same number.

A process can end at any time, also between a check and the use of its answer. So only one answer
is final: a process that is gone stays gone. "Alive" holds for the moment of the check.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

_PROC = Path("/proc")
_PID, _STATE, _STARTED = 0, 1, 20  # places in /proc/<pid>/stat without the command, see proc(5)


def this_process() -> str | None:
    """Return the identity of this process, or None where the system has no such facts."""
    where, status = _here(), _status("self")
    if where is None or status is None:
        return None
    if status[_PID] != str(os.getpid()):
        return None  # this /proc counts in another pid namespace than this process
    return f"{where}/{status[_PID]}/{status[_STARTED]}"


def is_gone(process: object) -> bool:
    """Return whether a process is certainly dead; False where that cannot be known from here."""
    return _lives(process) is False


def is_alive(process: object) -> bool:
    """Return whether a process certainly lives; False where that cannot be known from here."""
    return _lives(process) is True


def _lives(process: object) -> bool | None:
    # Another program may have written anything in its place.
    if not isinstance(process, str) or process.count("/") < 2:
        return None
    where, pid, started = process.rsplit("/", 2)
    if where != _here() or not (pid.isascii() and pid.isdigit() and len(pid) < 10):
        return None  # another container, another machine, or before a reboot
    status = _status(pid)
    if status is None or len(status) <= _STARTED:
        return None if _exists(int(pid)) else False
    # A zombie runs nothing; it only waits for its parent to notice.
    return status[_STARTED] == started and status[_STATE] not in "ZX"


def this_network() -> str:
    """Return the identity of the network whose loopback device this process uses."""
    try:
        return f"{_boot()}/{(_PROC / 'self/ns/net').stat().st_ino}"
    except OSError:
        return platform.node()


def _here() -> str | None:
    try:
        return f"{_boot()}/{(_PROC / 'self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _status(pid: str) -> list[str] | None:
    """Return pid, state and so on of a process, or None if it cannot be seen."""
    try:
        text = (_PROC / pid / "stat").read_text(errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")  # the command may hold anything, parentheses included
    return [head.split(" ", 1)[0], *tail.split()]


def _exists(pid: int) -> bool:
    """Ask the system itself: /proc may hide the processes of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
