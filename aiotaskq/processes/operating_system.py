"""Processes as the operating system has them: starting, signalling and observing them.

Theory of operation. Every process below the supervisor is started by `start_process`, and two
things are true of all of them:

- `_run_in_child` is the first code of ours in the new process. A fork copies the supervisor: its
  signal handlers, its signal mask and the file descriptor that signals wake it by. All that a new
  process must not share with the supervisor is put right there, and nowhere else. The stop signals
  are held back from before the start until then, so none is handled by a copy of the supervisor's
  handler.
- `ChildProcess` is the supervisor's only source for "this process has ended" (`sentinel` to wait
  for it, `is_alive` to ask) and for its exit status. A dead process stays a zombie, and its pid is
  not given to another process, until `is_alive`, `join` or `collect` has seen it dead; so a signal
  sent by `send_signal` never reaches a stranger.

Limit: the sentinel is the end of a pipe that the child holds open. Where the child has forked a
process of its own, that one holds the pipe open too, and the sentinel is not readable before both
have ended. `is_alive` asks the kernel and is right at any time.

The process pool of `aiotaskq.worker` spawns its processes itself: a worker has threads and sockets.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals that stop a worker. The supervisor gets them and tells the other processes."""

_PROC = Path("/proc")
_NOT_RUNNING = frozenset("TtZXx")  # states in /proc/<pid>/stat: stopped, dead; see proc(5)


class ChildProcess:
    """A process that this process has started.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None, "the process was not started"
        self.pid = process.pid
        self._process = process

    @property
    def sentinel(self) -> int:
        """A file descriptor that becomes readable when the process ends; see the limit above."""
        return self._process.sentinel

    def is_alive(self) -> bool:
        """Return whether the process has not ended yet."""
        return self._process.is_alive()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.is_alive():
            os.kill(self.pid, number)

    def join(self, timeout: float) -> None:
        """Wait for the end of the process, for so many seconds at most."""
        self._process.join(timeout)

    def collect(self) -> int:
        """Wait for the end of the process, free its resources, and return its exit status.

        A negative status is the number of the signal that killed the process. The object cannot be
        used afterwards.
        """
        self._process.join()
        status = self._process.exitcode
        self._process.close()
        return 1 if status is None else status


def start_process(
    target: Callable[..., None],
    args: tuple[Any, ...],
    *,
    name: str,
    ignore_stop_signals: bool = False,
    daemon: bool = False,
    spawn: bool = False,
) -> ChildProcess:
    """Fork a process, or spawn it where there is no fork.

    Args:
        target: The function that the process runs.
        args: Its arguments.
        name: A name, for `multiprocessing`.
        ignore_stop_signals: Whether the process ignores the signals that stop a worker; else they
            end it, until it sets handlers of its own.
        daemon: As in `multiprocessing`: the process has no children, and is ended at our exit.
        spawn: Never fork: the process begins with a new interpreter.

    Raises:
        OSError: There is no memory for another process, or there are too many.
    """
    method = "fork" if hasattr(os, "fork") and not spawn else "spawn"
    context: Any = multiprocessing.get_context(method)
    handler = signal.SIG_IGN if ignore_stop_signals else signal.SIG_DFL
    process: BaseProcess = context.Process(
        target=_run_in_child, args=(handler, target, args), name=name, daemon=daemon
    )
    with _stop_signals_held_back():
        process.start()
    return ChildProcess(process)


@contextlib.contextmanager
def _stop_signals_held_back() -> Iterator[None]:
    """Let no stop signal be handled in the block: a new process would handle it as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_in_child(
    handler: signal.Handlers, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Undo what a fork has copied from the supervisor, then run the target."""
    # First: a signal noted here would wake the supervisor, whose file descriptor this is.
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    # Last: a signal that came since the start is handled now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    target(*args)


def set_process_title(title: str) -> None:
    """Set the name that `ps` and `top` show for this process, where the system allows it."""
    with contextlib.suppress(OSError):  # no Linux
        (_PROC / "self/comm").write_text(title)


def describe_exit_status(status: int) -> str:
    """Return how a process ended, in words; a negative status stands for a signal."""
    if status < 0:
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with exit status {status}"


def is_running(pid: int) -> bool:
    """Return whether a process surely lives and is not stopped; False where there is no /proc."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    # The command stands in parentheses, and may hold any character.
    state = text.rpartition(")")[2].split(maxsplit=1)[0]
    return state not in _NOT_RUNNING


def resident_memory(pid: int | str) -> int | None:
    """Return the resident memory of a process in bytes; None where it cannot be read."""
    try:
        file = os.open(f"{_PROC}/{pid}/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        # Without a file object, as event loops look here: the kernel answers at once.
        pages = int(os.pread(file, 100, 0).split()[1])
    except OSError:  # it has just ended
        return None
    finally:
        os.close(file)
    return pages * resource.getpagesize()


def own_resident_memory() -> int:
    """Return the resident memory of this process in bytes; the peak where there is no /proc."""
    used = resident_memory("self")
    if used is not None:
        return used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
