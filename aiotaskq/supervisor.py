"""The parent of worker processes: starts them, replaces one that dies, passes signals on.

It imports none of the user's code and holds no connection, so there is little that can go wrong
with it. Children are forked before any thread or event loop exists here, which makes a start
cheap; where there is no fork they are spawned.

A child tells by a `Ready` over its pipe that it takes tasks, and how the application is set up:
only children know its code. How it ended is its exit status:

==============  ==========================================================================
0               it was told to stop, or the queues were empty in a burst
`SETUP_ERROR`   the set-up is wrong, and it has said so
`RECYCLE`       it has reached a limit of its own and wants to be replaced, at once
anything else   it died
==============  ==========================================================================

Before the first `Ready`, any failure ends everything: it would only be repeated. Later a child
that ended, for whatever reason, is replaced after a pause that grows while it keeps ending.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import msgspec

from aiotaskq.errors import ConfigError

logger = logging.getLogger("aiotaskq.supervisor")

SETUP_ERROR = 2
RECYCLE = 75  # EX_TEMPFAIL: nothing else uses it


class Ready(msgspec.Struct, frozen=True):
    """What a child sends when it takes tasks.

    Args:
        processes: How many children the application wants in all.
        patience: Seconds that each needs to end.
    """

    processes: int
    patience: float


ChildMain: TypeAlias = Callable[[int, bool, Connection], None]
"""What a child runs: its number, counted from 1, whether it replaces another, and its pipe."""

_PAUSE = (0.5, 30.0)  # seconds before a child that died is replaced: at first, and the longest
_PATIENCE = 30.0  # seconds to end for children that have not said how long they need
_STEADY = 10.0  # seconds of life after which a death counts as the first
_PARENT_LOOK = 0.5  # seconds between a child's looks whether its parent lives
_WATCH_LOOK = 200  # milliseconds between looks of the process that watches files
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Child:
    """One process, and what is known of it."""

    def __init__(self, number: int, again: bool, main: ChildMain) -> None:
        context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
        self.number = number
        self.pipe, theirs = context.Pipe(duplex=False)
        self.ready = False
        self.started = time.monotonic()
        self.process: BaseProcess = context.Process(
            target=_be_child, args=(main, number, again, theirs), name=f"worker-{number}"
        )
        with _signals_held_back():  # one that came now would be noted by the child's copy of us
            self.process.start()
        theirs.close()

    def signal(self, number: signal.Signals) -> None:
        pid = self.process.pid
        if pid is not None and self.process.is_alive():
            os.kill(pid, number)

    def status(self) -> int:
        """Collect the dead process and return its exit status; negative for a signal."""
        self.process.join()
        self.pipe.close()
        status = self.process.exitcode
        self.process.close()
        return 1 if status is None else status


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _be_child(main: ChildMain, number: int, again: bool, pipe: Connection) -> None:
    """Be a child that a signal ends, until it says otherwise."""
    signal.set_wakeup_fd(-1)  # a fork has ours
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    main(number, again, pipe)


class Supervisor:
    """Keeps as many children running as the first one asks for, until told to stop.

    Args:
        main: What each child runs.
        finite: A child that ends by itself has nothing more to do, and is not replaced.
        reload: Replace all children when a Python file below the working folder changes.
    """

    def __init__(self, main: ChildMain, *, finite: bool = False, reload: bool = False) -> None:
        self._main = main
        self._finite = finite
        self._wanted = 1
        self._patience = _PATIENCE
        self._reload = reload
        self._children: dict[int, _Child] = {}
        self._begun: set[int] = set()  # the numbers of those that were started at all
        self._due: dict[int, float] = {}  # when a child that died is to be replaced
        self._pauses: dict[int, float] = {}
        self._ever_ready = False
        self._signals = 0
        self._kill_at: float | None = None
        self._watcher: _Watcher | None = None
        self._leaving: set[_Child] = set()  # told to end since a file changed
        self._broken = False  # a child ended, and the next change is waited for
        self._status = 0

    def run(self) -> int:
        """Run to the end and return the exit status."""
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        before = {each: signal.signal(each, self._note) for each in _SIGNALS}
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            if self._reload:
                self._watcher = _Watcher()
            # The first one alone: what is wrong with the set-up is then said once.
            self._start(1)
            while self._children or self._due or self._broken:
                self._step()
        finally:
            if self._watcher is not None:
                self._watcher.stop()
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._wake.close()
            waker.close()
        return self._status

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _step(self) -> None:
        self._wait()
        for child in list(self._children.values()):
            self._hear(child)
        for number, child in list(self._children.items()):
            if not child.process.is_alive():
                del self._children[number]
                self._ended(child)
        self._pass_signals_on()
        if self._watcher is not None and self._watcher.heard() and not self._stopping:
            self._restart_all()
        self._start_due()

    @property
    def _stopping(self) -> bool:
        return self._kill_at is not None

    def _wait(self) -> None:
        now = time.monotonic()
        moments = list(self._due.values()) + ([self._kill_at] if self._kill_at else [])
        timeout = max(0.0, min(moments) - now) if moments else None
        watched: list[Any] = [self._wake]
        if self._watcher is not None and not self._watcher.pipe.closed:
            watched.append(self._watcher.pipe)
        watched += [child.process.sentinel for child in self._children.values()]
        watched += [child.pipe for child in self._children.values() if not child.ready]
        connection.wait(watched, timeout)
        with contextlib.suppress(BlockingIOError):  # it was not a signal that ended the wait
            self._wake.recv(4096)

    def _hear(self, child: _Child) -> None:
        if child.ready or not child.pipe.poll():
            return
        try:
            ready = msgspec.msgpack.decode(child.pipe.recv_bytes(), type=Ready)
        except EOFError:
            child.process.join(1.0)  # it is about to end
            return
        child.ready = self._ever_ready = True
        self._wanted, self._patience = ready.processes, ready.patience
        for number in range(1, self._wanted + 1):
            # Not one that was there before: it had nothing more to do.
            if number not in self._begun and not self._stopping:
                self._due.setdefault(number, 0.0)

    def _start(self, number: int) -> None:
        self._due.pop(number, None)
        again = number in self._begun
        self._begun.add(number)
        try:
            self._children[number] = _Child(number, again, self._main)
        except OSError as error:  # no memory, or too many processes, for now
            self._replace_later(number, 0.0, f"no worker process can be started: {error}")

    def _start_due(self) -> None:
        for number, moment in list(self._due.items()):
            if moment <= time.monotonic():
                self._start(number)

    def _ended(self, child: _Child) -> None:
        lived = time.monotonic() - child.started
        pid = child.process.pid
        status = child.status()
        if self._stopping:
            return
        if child in self._leaving or status == RECYCLE:
            self._leaving.discard(child)
            self._due[child.number] = 0.0
        elif self._reload and status != 0:
            logger.error("worker process %d ended %s; waiting for a change", pid, _how(status))
            self._broken = True
        elif status != 0 and not self._ever_ready:
            if status != SETUP_ERROR:  # it has said so itself otherwise
                logger.error("worker process %d ended %s at its start", pid, _how(status))
            self._status = status if status > 0 else 1
            self._stop()
        elif status != 0 or not self._finite:  # somebody else may have told it to stop
            self._replace_later(child.number, lived, f"worker process {pid} ended {_how(status)}")

    def _replace_later(self, number: int, lived: float, what: str) -> None:
        first, longest = _PAUSE
        pause = first if lived > _STEADY else self._pauses.get(number, first)
        self._pauses[number] = min(pause * 2, longest)
        self._due[number] = time.monotonic() + pause
        logger.error("%s; starting another in %.1f s", what, pause)

    def _restart_all(self) -> None:
        logger.warning("a file changed, starting anew")
        self._broken = False
        self._begun = set(self._children)
        if not self._children:
            self._due[1] = 0.0
        for child in set(self._children.values()) - self._leaving:  # a second one means: hurry
            child.signal(signal.SIGTERM)
        self._leaving.update(self._children.values())

    def _pass_signals_on(self) -> None:
        """Tell the children of each signal: the first asks them to end, the second to hurry."""
        signals, self._signals = self._signals, 0
        for _ in range(signals):
            self._stop()
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            for child in self._children.values():
                logger.error("worker process %d does not end, killing it", child.process.pid)
                child.signal(signal.SIGKILL)
            self._kill_at = time.monotonic() + self._patience

    def _stop(self) -> None:
        self._due.clear()
        self._broken = False
        self._kill_at = time.monotonic() + self._patience
        for child in self._children.values():
            child.signal(signal.SIGTERM)


class _Watcher:
    """A process that looks for changed files: its threads must not be there when we fork.

    Attributes:
        pipe: Readable when something changed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("watchfiles") is None:
            raise ConfigError(
                "--reload needs the library 'watchfiles': pip install 'aiotaskq[reload]'"
            )
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe(duplex=False)
        self._process = spawn.Process(target=_watch_files, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.pipe.recv_bytes()  # what changes from now on is seen
        except EOFError:
            raise ConfigError(f"--reload cannot look for changes in {Path.cwd()}") from None

    def heard(self) -> bool:
        """Whether anything changed since the last time."""
        changed = False
        while not self.pipe.closed and self.pipe.poll():
            try:
                self.pipe.recv_bytes()
                changed = True
            except EOFError:
                logger.error("nobody looks for changed files any more: start me anew")
                self.pipe.close()
        return changed

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self.pipe.close()


def _watch_files(pipe: Connection) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which ends us
    from watchfiles import PythonFilter, watch

    parent = os.getppid()
    begun = False
    for changes in watch(
        ".", watch_filter=PythonFilter(), rust_timeout=_WATCH_LOOK, yield_on_timeout=True
    ):
        if os.getppid() != parent:
            return
        if changes or not begun:
            pipe.send_bytes(b"changed" if begun else b"begun")
        begun = True


def _how(status: int) -> str:
    if status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with exit status {status}"


def watch_parent(gone: Callable[[], object], *, patience: float) -> None:
    """In a child: call `gone` from a thread when the parent has died, and exit for good later.

    An orphan must not go on as if somebody still looked after it.

    Args:
        gone: Must be safe to call from a thread.
        patience: Seconds that the process gets to end by itself.
    """
    started_by = multiprocessing.parent_process()
    # Not getppid() alone: it may have died before we got here.
    parent = os.getppid() if started_by is None else started_by.pid

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_LOOK)
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is ending anyway
            gone()
        time.sleep(patience)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=look, name="aiotaskq-parent", daemon=True).start()
