"""Processes as the operating system has them: starting, signalling, observing and ending them.

Theory of operation. Every process of ours is started by `start_process`, and three things are true
of all of them:

- `_run_in_child` is the first code of ours in the new process, and sets its signals. The stop
  signals are held back from before the start until then, so none is handled by a copy of the
  parent's handler. All else that a fork must not share is cut off by `aiotaskq.forks`.
- `ChildProcess` is the only source for "this process has ended" (`is_alive` to ask, `wait_for` to
  wait) and for its exit status. It asks the kernel about the process itself, and relies on nothing
  that a child of that process may hold open. A dead process stays a zombie, and its pid is not
  given to another process, until it is collected; so a signal never reaches a stranger.
- Code of users may wait for any child of its process (`os.wait`), and so take an exit status that
  is ours. The end of the process is seen all the same, and its status is None.

Processes that tasks have started, and that outlive their worker process, are found by their
session: a worker process leads one, and its children are in it unless they begin one themselves
(`kill_session`). Each process of a pool leads a process group within it
(`ChildProcess.signal_group`).

Limits: without /proc only the process group of a worker process is found. Without pidfds (before
Linux 5.3) the end of a process is noticed up to a tenth of a second late.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from aiotaskq.forks import STOP_SIGNALS, register

_PROC = Path("/proc")
_NOT_RUNNING = frozenset("TtZXx")  # states in /proc/<pid>/stat: stopped, dead; see proc(5)
_DEAD = frozenset("ZXx")
_LOOK_INTERVAL = 0.1  # seconds between looks where there are no pidfds
_END_LOOK_INTERVAL = 0.02  # seconds between looks whether processes that were told to end have

_running: WeakSet[ChildProcess] = WeakSet()  # those that were not collected


class ChildProcess:
    """A process that this process has started. It may be used from several threads.

    Attributes:
        pid: Its process id.
        daemon: Whether it is killed at our exit.
        sentinel: A file descriptor that becomes readable when the process ends, whoever has a copy
            of what it held open; None where the system has no pidfds.
    """

    def __init__(self, process: BaseProcess, *, daemon: bool) -> None:
        assert process.pid is not None, "the process was not started"
        self.daemon = daemon
        self.pid = process.pid
        self.sentinel = open_pidfd(self.pid)
        self._process = process
        self._lock = threading.Lock()  # held while it is signalled or collected
        self._collected = False
        _running.add(self)

    def is_alive(self) -> bool:
        """Return whether the process has not ended yet."""
        if self._collected:
            return False
        if self.sentinel is not None:
            return not _is_readable(self.sentinel)
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:  # somebody else has waited for it
            return False

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if not self.is_alive():
                return
            if self.sentinel is not None:
                signal.pidfd_send_signal(self.sentinel, number)
            else:
                os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process group that the process leads, whether it lives or not.

        It has no effect once the process is collected, as another group may have the number then,
        nor while the process does not lead a group yet.
        """
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if not self._collected:
                os.killpg(self.pid, number)

    def join(self, timeout: float | None) -> None:
        """Wait for the end of the process, for so many seconds at most; None: for ever."""
        wait_for([], [self], timeout)

    def collect(self) -> int | None:
        """Wait for the end of the process, free its resources, and return its exit status.

        A negative status is the number of the signal that killed the process; None: other code of
        this process has waited for it, and its status is not known. The object is of no use
        afterwards.
        """
        self.join(None)
        with self._lock:
            self._process.join()
            status = self._process.exitcode
            self.forget()
        return status

    def forget(self) -> None:
        """Free the resources of the process, which has ended or is no child of this process."""
        self._collected = True
        if self._process.exitcode is None:
            # `multiprocessing` takes it for alive, for ever, and would send signals to its pid.
            popen: Any = self._process._popen  # type: ignore[attr-defined]  # private, see above
            popen.returncode = 0
        self._process.close()
        if self.sentinel is not None:
            os.close(self.sentinel)
        _running.discard(self)


def wait_for(
    readable: Iterable[Any], processes: Iterable[ChildProcess], timeout: float | None
) -> None:
    """Wait until an object is readable or a process has ended.

    Args:
        readable: Objects and file descriptors, as for `multiprocessing.connection.wait`.
        processes: The processes.
        timeout: The most seconds to wait; None: any time.
    """
    processes = list(processes)
    sentinels = [process.sentinel for process in processes if process.sentinel is not None]
    watched = [*readable, *sentinels]
    if len(sentinels) == len(processes):
        connection.wait(watched, timeout)
        return
    end = None if timeout is None else time.monotonic() + timeout
    while all(process.is_alive() for process in processes):
        left = _LOOK_INTERVAL if end is None else min(end - time.monotonic(), _LOOK_INTERVAL)
        if left <= 0:
            return
        if not watched:
            time.sleep(left)
        elif connection.wait(watched, left):
            return


def open_pidfd(pid: int) -> int | None:
    """Return a file descriptor that becomes readable when a process ends; None: there is none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # no Linux, an old one, a sandbox, or no such process
        return None


def _is_readable(fd: int) -> bool:
    poll = select.poll()  # `select.select` takes no file descriptor above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


@atexit.register
def _kill_daemons() -> None:
    # Before `multiprocessing` does: it sends SIGTERM, which processes of ours may ignore, and then
    # waits for their end.
    for process in list(_running):
        if process.daemon:
            process.send_signal(signal.SIGKILL)


def _forget_all() -> None:
    """Make a forked child leave alone what its parent has started, at its exit too."""
    for process in list(_running):
        process.forget()


register(in_child=_forget_all)


def adopts_orphans() -> bool:
    """Return whether dead processes are given to this one when their parents have died."""
    return os.getpid() == 1


def reap_orphans(own: Container[int]) -> None:
    """Free the dead processes that were given to this one when their parents died.

    That is the task of process 1, which the supervisor is where it is all that a container runs.

    Args:
        own: The pids of processes of ours. Where one of them is dead, the others come later.
    """
    with contextlib.suppress(ChildProcessError):  # there are none
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in own:
                return
            os.waitpid(found.si_pid, 0)


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
        daemon: Whether the process is killed at our exit; else our exit waits for its end. It may
            have children either way.
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
    if method == "spawn":
        resource_tracker.ensure_running()  # its own start would let the signals through
    with _stop_signals_held_back():
        process.start()
    return ChildProcess(process, daemon=daemon)


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
    """Set the signals of a new process, then run the target."""
    multiprocessing.current_process().daemon = False  # a daemon may not have children
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    # Last: a signal that came since the start is handled now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    target(*args)


def set_process_title(title: str) -> None:
    """Set the name that `ps` and `top` show for this process, where the system allows it."""
    with contextlib.suppress(OSError):  # no Linux
        (_PROC / "self/comm").write_text(title)


def describe_exit_status(status: int | None) -> str:
    """Return how a process ended, in words; a negative status stands for a signal."""
    if status is None:
        return "ended with an exit status that other code has taken"
    if status < 0:
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with exit status {status}"


class _Stat(NamedTuple):
    """A process as /proc shows it."""

    state: str
    session: int


def _read_stat(pid: int | str) -> _Stat | None:
    """Return what /proc knows about a process; None: there is no such process, or no /proc."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The command stands in parentheses, and may hold any character.
    state, _parent, _group, session, *_ = text.rpartition(")")[2].split()
    return _Stat(state, int(session))


def is_running(pid: int) -> bool:
    """Return whether a process surely lives and is not stopped; False where there is no /proc."""
    found = _read_stat(pid)
    return found is not None and found.state not in _NOT_RUNNING


def kill_session(leader: int) -> int:
    """Kill the processes of a session except its leader, and return their number.

    Those that come to be meanwhile are killed as well. The process that frees the shared memory of
    `multiprocessing` is left alone: it ends by itself when its work is done.

    Args:
        leader: The pid of the leader, dead or alive, which must not have been collected.
    """
    if not _PROC.joinpath("self/stat").exists():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if leader != os.getpid():
                os.killpg(leader, signal.SIGKILL)
        return 0
    killed: set[int] = set()
    while new := set(_session_members(leader)) - killed:
        for pid in new:
            _signal_in_session(pid, leader, signal.SIGKILL)
        killed |= new
    return len(killed)


def end_own_session(patience: float) -> None:
    """End the other processes of the session that this process leads.

    Args:
        patience: Seconds that they get to end by themselves, after SIGTERM.
    """
    leader = os.getpid()
    end = time.monotonic() + patience
    for pid in _session_members(leader):
        _signal_in_session(pid, leader, signal.SIGTERM)
    while _session_members(leader) and time.monotonic() < end:
        time.sleep(_END_LOOK_INTERVAL)
    kill_session(leader)


def _session_members(leader: int) -> list[int]:
    """Return the pids of the living processes of a session, without its leader."""
    members = []
    for entry in _PROC.glob("[0-9]*"):
        found = _read_stat(entry.name)
        if found is None or found.session != leader or found.state in _DEAD:
            continue
        pid = int(entry.name)
        if pid != leader and not _is_resource_tracker(pid):
            members.append(pid)
    return members


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def _signal_in_session(pid: int, leader: int, number: signal.Signals) -> None:
    """Send a signal to a process that is still in a session; its pid may be another's by now."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        pidfd = open_pidfd(pid)
        if pidfd is None:
            os.kill(pid, number)
            return
        try:
            found = _read_stat(pid)
            if found is not None and found.session == leader:
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


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
