"""The parent of worker processes: starts them, replaces one that dies, passes signals on.

It imports none of the user's code and holds no connection, so there is little that can go wrong
with it. Children are forked before any thread or event loop exists here, which makes a start
cheap; where there is no fork they are spawned.

A child tells over its `Line`, a pipe, that it takes tasks, and how the application is set up: only
children know its code. It also tells of the leases that it works under; these are renewed, and
ended when it dies, by yet another process: see
`aiotaskq.processes.lease_keeper`. How it ended is its exit status:

==============  ==========================================================================
0               it was told to stop, or the queues were empty in a burst
`SETUP_ERROR`   the set-up is wrong, and it has said so
`RECYCLE`       it has reached a limit of its own and wants to be replaced, at once
anything else   it died
==============  ==========================================================================

Before the first `Ready`, any failure ends everything: it would only be repeated. Later a child
that ended, for whatever reason, is replaced after a pause that grows while it keeps ending; the
first one is hardly any.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import msgspec

from aiotaskq.contract.records import Grant
from aiotaskq.errors import ConfigError
from aiotaskq.processes.lease_keeper import SIGNALS, Holding, Keeper, LetGo, start_process

logger = logging.getLogger("aiotaskq.supervisor")

SETUP_ERROR = 2
RECYCLE = 75  # EX_TEMPFAIL: nothing else uses it


class Ready(msgspec.Struct, frozen=True, tag=True):
    """What a child sends when it takes tasks.

    Args:
        processes: How many children the application wants in all.
        patience: Seconds that each needs to end.
        block_limit: Seconds without a `Tick` after which it is to be killed; None: it sends none.
    """

    processes: int
    patience: float
    block_limit: float | None = None


class Tick(msgspec.Struct, frozen=True, tag=True):
    """The event loop of a child runs.

    Args:
        more: Another one will follow.
    """

    more: bool


_Word: TypeAlias = Ready | Tick | Holding | LetGo


class Line:
    """A child's line to its supervisor. It never raises: an orphan learns of it by itself."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ready(self, *, processes: int, patience: float, block_limit: float | None) -> None:
        """Tell that tasks are taken. See `Ready`."""
        self._send(Ready(processes, patience, block_limit))

    def tick(self, *, more: bool) -> None:
        """Tell that the event loop runs. See `Tick`."""
        # A supervisor that is stopped must not stop us as well: what nobody reads is not sent.
        if select.select([], [self._pipe], [], 0)[1]:
            self._send(Tick(more))

    def holding(self, grant: Grant, *, url: str, prefix: str, beat: float) -> None:
        """Tell of a lease that has begun. See `Holding`."""
        try:
            folder = str(Path.cwd())
        except OSError:  # it was removed: nothing is relative to it
            folder = "/"
        self._send(Holding(grant, url, prefix, folder, beat))

    def let_go(self, grant: Grant) -> None:
        """Tell of a lease that has been ended."""
        self._send(LetGo(grant.consumer))

    def _send(self, word: _Word) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(msgspec.msgpack.encode(word))


ChildMain: TypeAlias = Callable[[int, bool, Line], None]
"""What a child runs: its number, counted from 1, whether it replaces another, and its line."""

# Seconds before a child that died is replaced: the first time, the second, and the longest.
_PAUSE = (0.1, 0.5, 30.0)
_PATIENCE = 30.0  # seconds to end for children that have not said how long they need
_STEADY = 10.0  # seconds of life after which a death counts as the first
_PARENT_LOOK = 0.5  # seconds between a child's looks whether its parent lives
_WATCH_LOOK = 200  # milliseconds between looks of the process that watches files
_BLOCK_LOOK = 1.0  # seconds between looks whether the event loops of children run


class _Child:
    """One process, and what is known of it."""

    def __init__(self, number: int, again: bool, main: ChildMain) -> None:
        self.number = number
        self.name = f"worker-{number}"
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        self.open = True  # its end of the pipe
        self.ready = False
        self.block_limit = math.inf
        self.ticked = 0.0
        self.doom: str | None = None  # why we killed it
        self.started = time.monotonic()
        try:
            self.process = start_process(_be_child, (main, number, again, theirs), self.name)
        except OSError:
            self.pipe.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        if self.pid is not None and self.process.is_alive():
            os.kill(self.pid, number)

    def words(self) -> Iterator[_Word]:
        """Read what it has sent."""
        try:
            while self.open and self.pipe.poll():
                yield msgspec.msgpack.decode(self.pipe.recv_bytes(), type=_Word)
        except (EOFError, OSError):
            self.open = False  # it is about to end

    def status(self) -> int:
        """Collect the dead process and return its exit status; negative for a signal."""
        self.process.join()
        self.pipe.close()
        status = self.process.exitcode
        self.process.close()
        return 1 if status is None else status


def _be_child(main: ChildMain, number: int, again: bool, pipe: Connection) -> None:
    """Be a child that a signal ends, until it says otherwise."""
    signal.set_wakeup_fd(-1)  # a fork has ours
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    main(number, again, Line(pipe))


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
        self._keeper = Keeper()
        self._looked = 0.0  # when we last looked whether the event loops of children run

    def run(self) -> int:
        """Run to the end and return the exit status."""
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        before = {each: signal.signal(each, self._note) for each in SIGNALS}
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            if self._reload:
                self._watcher = _Watcher()
            # The first one alone: what is wrong with the set-up is then said once.
            self._start(1)
            while self._children or self._due or self._broken:
                self._step()
        finally:
            self._keeper.stop()
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
        self._end_the_stuck()
        self._start_due()
        self._keeper.look()  # after the rest: no start of a child is to wait for it

    @property
    def _stopping(self) -> bool:
        return self._kill_at is not None

    def _wait(self) -> None:
        now = time.monotonic()
        moments = list(self._due.values())
        moments += [moment for moment in (self._kill_at, self._keeper.due) if moment is not None]
        if any(child.block_limit < math.inf for child in self._children.values()):
            moments.append(now + _BLOCK_LOOK)
        timeout = max(0.0, min(moments) - now) if moments else None
        watched: list[Any] = [self._wake]
        if self._watcher is not None and not self._watcher.pipe.closed:
            watched.append(self._watcher.pipe)
        watched += self._keeper.sentinels
        watched += [child.process.sentinel for child in self._children.values()]
        watched += [child.pipe for child in self._children.values() if child.open]
        connection.wait(watched, timeout)
        with contextlib.suppress(BlockingIOError):  # it was not a signal that ended the wait
            self._wake.recv(4096)

    def _hear(self, child: _Child) -> None:
        for word in child.words():
            match word:
                case Ready():
                    self._become_ready(child, word)
                case Tick():
                    child.ticked = time.monotonic()
                    if not word.more:
                        child.block_limit = math.inf
                case Holding():
                    assert child.pid is not None  # it was started
                    self._keeper.hold(child.pid, child.name, word)
                case LetGo():
                    self._keeper.let_go(word.consumer)

    def _become_ready(self, child: _Child, ready: Ready) -> None:
        child.ready = self._ever_ready = True
        child.ticked = time.monotonic()
        if ready.block_limit is not None:
            child.block_limit = ready.block_limit
        self._wanted, self._patience = ready.processes, ready.patience
        for number in range(1, self._wanted + 1):
            # Not one that was there before: it had nothing more to do.
            if number not in self._begun and not self._stopping:
                self._due.setdefault(number, 0.0)

    def _end_the_stuck(self) -> None:
        """Kill the children whose event loops have been stuck for longer than they may."""
        now = time.monotonic()
        # Where we were stopped ourselves, they may have been so with us: they get another look.
        awake, self._looked = now - self._looked < 2 * _BLOCK_LOOK, now
        for child in self._children.values() if awake else ():
            stuck = now - child.ticked
            if stuck > child.block_limit and child.doom is None:
                child.doom = f"was killed, as its event loop had been stuck for {stuck:.1f} s"
                logger.error("worker process %d %s", child.pid, child.doom)
                child.signal(signal.SIGKILL)

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
        pid = child.pid
        self._hear(child)  # its last words
        status = child.status()
        if pid is not None:
            self._keeper.died(pid, child.doom or _how(status))
        if self._stopping:
            return
        if child in self._leaving or status == RECYCLE:
            self._leaving.discard(child)
            self._due[child.number] = 0.0
        elif self._reload and status != 0:
            logger.error("worker process %d %s; waiting for a change", pid, _how(status))
            self._broken = True
        elif status != 0 and not self._ever_ready:
            if status != SETUP_ERROR:  # it has said so itself otherwise
                logger.error("worker process %d %s at its start", pid, _how(status))
            self._status = status if status > 0 else 1
            self._stop()
        elif status != 0 or not self._finite:  # somebody else may have told it to stop
            self._replace_later(child.number, lived, f"worker process {pid} {_how(status)}")

    def _replace_later(self, number: int, lived: float, what: str) -> None:
        first, second, longest = _PAUSE
        pause = first if lived > _STEADY else self._pauses.get(number, first)
        self._pauses[number] = min(max(pause * 2, second), longest)
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
        # Children take a second SIGTERM for the same wish, which somebody sent to all of us.
        wish = signal.SIGINT if self._stopping else signal.SIGTERM
        self._due.clear()
        self._broken = False
        self._kill_at = time.monotonic() + self._patience
        for child in self._children.values():
            child.signal(wish)


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
    for each in SIGNALS:
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
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with exit status {status}"


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
