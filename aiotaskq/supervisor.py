"""The parent of worker processes: starts them, replaces one that dies, passes signals on.

It imports none of the user's code and holds no connection, so there is little that can go wrong
with it. Children are forked before any thread or event loop exists here, which makes a start
cheap; where there is no fork they are spawned.

A child tells by a `Ready` over its pipe that it takes tasks, and how the application is set up: only
children know its code. How it ended is its exit status:

==============  ==========================================================================
0               it was told to stop, or had nothing more to do
`SETUP_ERROR`   the set-up is wrong, and it has said so: nothing is restarted
`RECYCLE`       it has reached a limit of its own and wants to be replaced, at once
anything else   it died: it is replaced, after a pause that grows while it keeps dying
==============  ==========================================================================
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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


ChildMain: TypeAlias = Callable[[int, Connection], None]
"""What a child runs: its number, counted from 1, and its pipe."""

_PAUSE = (0.5, 30.0)  # seconds before a child that died is replaced: at first, and the longest
_PATIENCE = 30.0  # seconds to end for children that have not said how long they need
_STEADY = 10.0  # seconds of life after which a death counts as the first
_PARENT_LOOK = 0.5  # seconds between a child's looks whether its parent lives


class _Child:
    """One process, and what is known of it."""

    def __init__(self, number: int, main: ChildMain) -> None:
        context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
        self.number = number
        self.pipe, theirs = context.Pipe(duplex=False)
        self.ready = False
        self.started = time.monotonic()
        self.process: BaseProcess = context.Process(
            target=main, args=(number, theirs), name=f"worker-{number}"
        )
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


class Supervisor:
    """Keeps as many children running as the first one asks for, until told to stop.

    Args:
        main: What each child runs.
        reload: Replace all children when a Python file below the working folder changes.
    """

    def __init__(self, main: ChildMain, *, reload: bool = False) -> None:
        self._main = main
        self._wanted = 1
        self._patience = _PATIENCE
        self._reload = reload
        self._children: dict[int, _Child] = {}
        self._due: dict[int, float] = {}  # when a child that died is to be replaced
        self._pauses: dict[int, float] = {}
        self._ever_ready = False
        self._signals = 0
        self._kill_at: float | None = None
        self._changed = threading.Event()
        self._reloading = False
        self._status = 0

    def run(self) -> int:
        """Run to the end and return the exit status."""
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        stop_watching = threading.Event()
        try:
            if self._reload:
                self._watch_files(stop_watching, waker)
            # The first one alone: what is wrong with the set-up is then said once.
            self._start(1)
            while self._children or self._due:
                self._step()
        finally:
            stop_watching.set()
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
        if self._changed.is_set() and not self._stopping:
            self._changed.clear()
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
        watched += [child.process.sentinel for child in self._children.values()]
        watched += [child.pipe for child in self._children.values() if not child.ready]
        connection.wait(watched, timeout)
        try:
            self._wake.recv(4096)
        except BlockingIOError:
            pass  # it was not a signal that ended the wait

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
        self._pauses.pop(child.number, None)
        for number in range(1, self._wanted + 1):
            if number not in self._children and not self._stopping:
                self._due.setdefault(number, 0.0)

    def _start(self, number: int) -> None:
        self._due.pop(number, None)
        self._children[number] = _Child(number, self._main)

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
        if self._reloading:
            self._due[child.number] = 0.0
            self._reloading = bool(self._children)
        elif status == RECYCLE:
            self._due[child.number] = 0.0
        elif self._reload and status != 0:
            logger.error("worker process %d ended %s; waiting for a change", pid, _how(status))
        elif status == SETUP_ERROR or (status != 0 and not self._ever_ready):
            self._status = status if status > 0 else 1
            self._stop()
        elif status != 0:
            self._replace_later(child.number, lived, f"worker process {pid} died {_how(status)}")

    def _replace_later(self, number: int, lived: float, what: str) -> None:
        first, longest = _PAUSE
        pause = first if lived > _STEADY else self._pauses.get(number, first)
        self._pauses[number] = min(pause * 2, longest)
        self._due[number] = time.monotonic() + pause
        logger.error("%s; starting another in %.1f s", what, pause)

    def _restart_all(self) -> None:
        logger.warning("a file changed, starting anew")
        self._reloading = bool(self._children)
        if not self._children:
            self._due[1] = 0.0
        for child in self._children.values():
            child.signal(signal.SIGTERM)

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
        self._kill_at = time.monotonic() + self._patience
        for child in self._children.values():
            child.signal(signal.SIGTERM)

    def _watch_files(self, stop: threading.Event, waker: socket.socket) -> None:
        try:
            from watchfiles import PythonFilter, watch
        except ImportError:
            raise ConfigError(
                "--reload needs the library 'watchfiles': pip install 'aiotaskq[reload]'"
            ) from None

        def look() -> None:
            for _ in watch(".", watch_filter=PythonFilter(), stop_event=stop, rust_timeout=500):
                self._changed.set()
                waker.send(b"r")

        threading.Thread(target=look, name="aiotaskq-reload", daemon=True).start()


def _how(status: int) -> str:
    if status < 0:
        return f"by {signal.Signals(-status).name}"
    return f"with exit status {status}"


def watch_parent(gone: Callable[[], object], *, patience: float) -> None:
    """In a child: call `gone` from a thread when the parent has died, and exit for good later.

    An orphan must not go on as if somebody still looked after it.

    Args:
        gone: Must be safe to call from a thread.
        patience: Seconds that the process gets to end by itself.
    """
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_LOOK)
        gone()
        time.sleep(patience)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=look, name="aiotaskq-parent", daemon=True).start()
