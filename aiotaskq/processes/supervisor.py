"""The parent of worker processes: starts them, replaces those that end, passes signals on.

Theory of operation. The supervisor imports none of the user's code, holds no connection and has
neither threads nor an event loop. So little can go wrong with it, and a fork is cheap and safe. It
knows the application only by the messages of its children; see `aiotaskq.processes.pipe`, also for
the exit statuses by which a child says how it ended.

Worker processes have numbers, from 1 up to as many as the application wants. Each number is in one
of these states::

    (not begun) ──▶ due ──▶ running ──▶ done
                     ▲         │
                     └─────────┘ it ended and is to be replaced

- *due*: in `_due`, with the time of the start;
- *running*: in `_children`; ready once it has said so;
- *done*: in neither. It had nothing more to do (in a burst), or the supervisor stops, or the code
  is broken and the next change of a file is waited for.

Process 1 starts alone, so that a mistake in the set-up is reported once. The others are due when
it is ready. Until then any failure ends everything, as it would only be repeated. Later a process
that ended, for whatever reason, is replaced after a pause that grows while it keeps ending; the
first pause is short.

`run` is a loop: wait for an event (`_wait`), then do all that is to be done (`_step`). An event is
the end of a process, a message, a signal, a changed file, or a moment. What may happen between any
two steps:

- A child dies. The kernel keeps its last messages in the pipe; they are read before its leases are
  given up (`_handle_end`), so a lease that began just before is not forgotten.
- A signal arrives. Its handler only counts, and `_wait` is woken by a socket, so none is lost
  between two waits. Signals are held back while a process is started.
- A process cannot be started: its number is due again later, as if the process had died.
- The supervisor itself is stopped and goes on. The ticks of its children are old then through no
  fault of theirs, so `_kill_stuck` does not act on its first look after a gap.
- The supervisor is killed. Its children notice it; see `aiotaskq.processes.parent`.

To stop: each child gets SIGTERM, at a second signal SIGINT, and SIGKILL when its patience is over.
From the first signal on no number is due any more, so the loop ends with the last child.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeAlias

from aiotaskq.backoff import Backoff
from aiotaskq.forks import STOP_SIGNALS, keep_private
from aiotaskq.processes.lease_keeper import LeaseKeeper
from aiotaskq.processes.operating_system import (
    adopts_orphans,
    describe_exit_status,
    kill_session,
    reap_orphans,
    start_process,
    wait_for,
)
from aiotaskq.processes.pipe import (
    RECYCLE,
    SETUP_ERROR,
    EventLoopTick,
    LeaseBegun,
    LeaseEnded,
    SupervisorMessage,
    SupervisorPipe,
    WorkerProcessReady,
    receive,
    supervisor_messages,
)
from aiotaskq.processes.reload import FileWatcher
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.supervisor")

WorkerProcessMain: TypeAlias = Callable[[int, bool, SupervisorPipe], None]
"""The function that a worker process runs.

Its arguments: the number of the process, counted from 1; whether it replaces another one; and the
pipe to the supervisor.
"""

_FIRST_PAUSE = 0.1  # seconds before a process that died is replaced for the first time
_LATER_PAUSES = (0.5, 30.0)  # seconds: the second pause, and the longest; each is twice the last
_STEADY_LIFE = 10.0  # seconds of life after which a death counts as the first
_PATIENCE = 30.0  # seconds to end for processes that have not said how long they need
_STUCK_LOOK_INTERVAL = 1.0  # seconds between looks whether the event loops of children run
_ORPHAN_LOOK_INTERVAL = 5.0  # seconds between looks for dead orphans


class _RestartPauses:
    """The pauses before one worker process is replaced, again and again."""

    def __init__(self) -> None:
        self._first = True
        self._later = Backoff(*_LATER_PAUSES, jitter=False)

    def next(self, lived: float) -> float:
        """Return the seconds to wait after a process has lived for so many seconds."""
        if self._first or lived > _STEADY_LIFE:
            self._first = False
            self._later.reset()
            return _FIRST_PAUSE
        return self._later.next()


class _SupervisedProcess:
    """A worker process, and its state as the supervisor knows it."""

    def __init__(self, number: int, replaces: bool, main: WorkerProcessMain) -> None:
        self.number = number
        self.name = f"worker-{number}"
        self.pipe, childs_end = multiprocessing.Pipe(duplex=False)
        keep_private(self.pipe.fileno())
        self.pipe_open = True  # the child's end
        self.block_limit = math.inf
        self.ticked = 0.0  # when its event loop last ran
        self.end_orphans = True
        self.killed_because: str | None = None
        self.started = time.monotonic()
        try:
            self.process = start_process(
                _run_worker_process, (main, number, replaces, childs_end), name=self.name
            )
        except OSError:
            self.pipe.close()
            raise
        finally:
            childs_end.close()
        self.pid = self.process.pid

    def messages(self) -> Iterator[SupervisorMessage]:
        """Yield the messages that have arrived since the last call."""
        try:
            if self.pipe_open:
                yield from receive(self.pipe, supervisor_messages)
        except EOFError:
            self.pipe_open = False  # the process is about to end

    def collect(self) -> int | None:
        """Free the resources of the dead process, and return its exit status."""
        self.pipe.close()
        if self.end_orphans:
            orphans = kill_session(self.pid)
            if orphans:
                logger.warning(
                    "killed %d processes that worker process %d has left behind", orphans, self.pid
                )
        return self.process.collect()


def _run_worker_process(
    main: WorkerProcessMain, number: int, replaces: bool, pipe: Connection
) -> None:
    main(number, replaces, SupervisorPipe(pipe))


class Supervisor:
    """Keeps as many worker processes running as the first one asks for, until told to stop.

    Args:
        main: The function that each worker process runs.
        finite: A process that ends by itself has nothing more to do, and is not replaced.
        reload: Replace all processes when a Python file below the working folder changes.
    """

    def __init__(
        self, main: WorkerProcessMain, *, finite: bool = False, reload: bool = False
    ) -> None:
        self._main = main
        self._finite = finite
        self._reload = reload
        self._patience = _PATIENCE
        self._children: dict[int, _SupervisedProcess] = {}  # by number, as all of these
        self._due: dict[int, float] = {}  # when it is to be started
        self._begun: set[int] = set()  # those that were started at all
        self._pauses: dict[int, _RestartPauses] = {}
        self._ever_ready = False
        self._signals = 0  # that have arrived and were not acted on yet
        self._kill_at: float | None = None  # set from the first stop signal on
        self._lease_keeper = LeaseKeeper()
        self._stuck_look = 0.0  # when we last looked whether the event loops of children run
        self._file_watcher: FileWatcher | None = None
        self._leaving: set[_SupervisedProcess] = set()  # told to end since a file changed
        self._broken = False  # a child failed, and the next change of a file is waited for
        self._status = 0

    def run(self) -> int:
        """Run to the end and return the exit status."""
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
            keep_private(end.fileno())
        before = {number: signal.signal(number, self._count_signal) for number in STOP_SIGNALS}
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            if self._reload:
                self._file_watcher = FileWatcher()
            self._start(1)
            while self._children or self._due or self._broken:
                self._wait()
                self._step()
        finally:
            self._lease_keeper.stop()
            if self._file_watcher is not None:
                self._file_watcher.stop()
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                # A further signal may come until the process has ended, and must not end it.
                signal.signal(number, signal.SIG_IGN if self._stopping else handler)
            self._wake.close()
            waker.close()
        return self._status

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _wait(self) -> None:
        """Wait for an event."""
        now = time.monotonic()
        moments = list(self._due.values())
        moments += [
            moment for moment in (self._kill_at, self._lease_keeper.due) if moment is not None
        ]
        if any(child.block_limit < math.inf for child in self._children.values()):
            moments.append(now + _STUCK_LOOK_INTERVAL)
        if adopts_orphans():  # the end of one is no event
            moments.append(now + _ORPHAN_LOOK_INTERVAL)
        timeout = max(0.0, min(moments) - now) if moments else None
        watched: list[Any] = [self._wake]
        if self._file_watcher is not None and not self._file_watcher.pipe.closed:
            watched.append(self._file_watcher.pipe)
        watched += [child.pipe for child in self._children.values() if child.pipe_open]
        processes = [child.process for child in self._children.values()]
        wait_for(watched, processes + self._lease_keeper.processes, timeout)
        with contextlib.suppress(BlockingIOError):  # it was not a signal that ended the wait
            self._wake.recv(4096)

    def _step(self) -> None:
        """Do all that is to be done now."""
        for child in list(self._children.values()):
            self._read_messages(child)
        for number, child in list(self._children.items()):
            if not child.process.is_alive():
                del self._children[number]
                self._handle_end(child)
        self._act_on_signals()
        if self._file_watcher is not None and self._file_watcher.changed() and not self._stopping:
            self._restart_all()
        self._kill_stuck()
        self._start_due()
        self._lease_keeper.check()  # last: no start of a child has to wait for it
        if adopts_orphans():
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        processes = [child.process for child in self._children.values()]
        reap_orphans({process.pid for process in processes + self._lease_keeper.processes})

    # --- messages ---

    def _read_messages(self, child: _SupervisedProcess) -> None:
        for message in child.messages():
            match message:
                case WorkerProcessReady():
                    self._become_ready(child, message)
                case EventLoopTick():
                    child.ticked = time.monotonic()
                    if not message.more:
                        child.block_limit = math.inf
                case LeaseBegun():
                    self._lease_keeper.lease_begun(child.pid, child.name, message)
                case LeaseEnded():
                    self._lease_keeper.lease_ended(message.consumer)

    def _become_ready(self, child: _SupervisedProcess, ready: WorkerProcessReady) -> None:
        self._ever_ready = True
        child.ticked = time.monotonic()
        if ready.block_limit is not None:
            child.block_limit = ready.block_limit
        child.end_orphans = ready.end_orphans
        self._patience = ready.patience
        for number in range(1, ready.processes + 1):
            # Not one that has begun before: it is running, due, or done.
            if number not in self._begun and not self._stopping:
                self._due.setdefault(number, 0.0)

    def _kill_stuck(self) -> None:
        """Kill the children whose event loops have been stuck for longer than they may."""
        now = time.monotonic()
        on_time = now - self._stuck_look < 2 * _STUCK_LOOK_INTERVAL
        self._stuck_look = now
        if not on_time:
            return  # we were stopped ourselves, perhaps, and our children with us
        for child in self._children.values():
            stuck = now - child.ticked
            if stuck > child.block_limit and child.killed_because is None:
                child.killed_because = (
                    f"was killed, as its event loop had been stuck for {stuck:.1f} s"
                )
                logger.error("worker process %d %s", child.pid, child.killed_because)
                child.process.send_signal(signal.SIGKILL)

    # --- starts and ends ---

    def _start(self, number: int) -> None:
        self._due.pop(number, None)
        replaces = number in self._begun
        self._begun.add(number)
        try:
            self._children[number] = _SupervisedProcess(number, replaces, self._main)
        except OSError as error:
            self._replace_later(number, 0.0, f"no worker process can be started: {error}")

    def _start_due(self) -> None:
        for number, moment in list(self._due.items()):
            if moment <= time.monotonic():
                self._start(number)

    def _handle_end(self, child: _SupervisedProcess) -> None:
        lived = time.monotonic() - child.started
        self._read_messages(child)  # its last ones
        status = child.collect()
        how = describe_exit_status(status)
        self._lease_keeper.process_died(child.pid, child.killed_because or how)
        if self._stopping:
            return
        if child in self._leaving or status == RECYCLE:
            self._leaving.discard(child)
            self._due[child.number] = 0.0
        elif self._reload and status != 0:
            logger.error("worker process %d %s; waiting for a change", child.pid, how)
            self._broken = True
        elif status != 0 and not self._ever_ready:
            if status != SETUP_ERROR:  # else the process has said what is wrong
                logger.error("worker process %d %s at its start", child.pid, how)
            self._status = status if status is not None and status > 0 else 1
            self._stop()
        elif status != 0 or not self._finite:  # status 0: somebody else told it to stop
            self._replace_later(child.number, lived, f"worker process {child.pid} {how}")

    def _replace_later(self, number: int, lived: float, what: str) -> None:
        pause = self._pauses.setdefault(number, _RestartPauses()).next(lived)
        self._due[number] = time.monotonic() + pause
        logger.error("%s; starting another in %.1f s", what, pause)

    def _restart_all(self) -> None:
        """Have all children replaced, as a file has changed."""
        logger.warning("a file changed, restarting all worker processes")
        self._broken = False
        self._begun = set(self._children)
        if not self._children:
            self._due[1] = 0.0
        for child in set(self._children.values()) - self._leaving:  # a second signal means: hurry
            child.process.send_signal(signal.SIGTERM)
        self._leaving.update(self._children.values())

    # --- stopping ---

    @property
    def _stopping(self) -> bool:
        return self._kill_at is not None

    def _act_on_signals(self) -> None:
        """Tell the children of each signal: the first asks them to end, the second to hurry."""
        signals, self._signals = self._signals, 0
        for _ in range(signals):
            self._stop()
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            for child in self._children.values():
                logger.error("worker process %d does not end, killing it", child.pid)
                child.process.send_signal(signal.SIGKILL)
            self._kill_at = time.monotonic() + self._patience

    def _stop(self) -> None:
        # A second SIGTERM is no haste for a child: a service manager sends one to all of us.
        number = signal.SIGINT if self._stopping else signal.SIGTERM
        self._due.clear()
        self._broken = False
        self._kill_at = time.monotonic() + self._patience
        for child in self._children.values():
            child.process.send_signal(number)
