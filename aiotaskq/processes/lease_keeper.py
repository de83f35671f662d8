"""The supervisor's side of the lease keeper: the messages to it, and its starts.

Theory of operation. The supervisor holds no connection, so the leases of its worker processes are
kept by another process, which may die like any other. So whatever that process knows is known here
as well: `LeaseKeeper` remembers every lease that a living worker process has begun, and
every death whose leases may still have to be ended. The process itself is only a cache of that: it
is started when there is something to keep, and each new one is told everything.

Invariants:

- A lease is in `_leases` from `lease_begun` until `lease_ended` or `process_died`. The supervisor
  reads the last messages of a dead process before it reports the death, so no lease of that
  process is added afterwards.
- A death is in `_deaths` for as long as the longest of its leases would last by itself. So the
  lease keeper may hear of a death twice and try to end a lease twice, which is harmless. A death
  that it never heard of would leave tasks waiting until the lease lapses.
- No method waits for the lease keeper, but for `stop`: a process that does not read its pipe is
  killed and replaced.

Between any two steps the lease keeper may die: `check` sees it, and starts another after a pause
that grows while they keep dying.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

from aiotaskq.backoff import Backoff
from aiotaskq.forks import keep_private
from aiotaskq.processes.lease_keeper_process import run_lease_keeper_process
from aiotaskq.processes.operating_system import ChildProcess, start_process
from aiotaskq.processes.pipe import (
    KeepLease,
    LeaseBegun,
    LeaseEnded,
    LeaseKeeperMessage,
    StopLeaseKeeper,
    WorkerProcessDied,
    has_room,
    send,
)
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.keeper")

_STOP_WAIT = 1.0  # seconds that the lease keeper gets to end by itself
_RESTART_PAUSES = (0.1, 30.0)  # seconds before one that died is replaced: the first, the longest
_STEADY_LIFE = 10.0  # seconds of life after which its death counts as the first
_NO_PROCESS_PAUSE = 30.0  # seconds to the next attempt where no process can be started


class _WorkerDeath(NamedTuple):
    """A dead worker process and the leases that it left.

    Attributes:
        until: When the last of the leases has lapsed by itself, by the monotonic clock.
        leases: The leases.
        message: The message.
    """

    until: float
    leases: list[KeepLease]
    message: WorkerProcessDied


class LeaseKeeper:
    """Remembers every lease, and has a lease keeper process while there is any."""

    def __init__(self) -> None:
        self._leases: dict[str, KeepLease] = {}  # by consumer
        self._deaths: list[_WorkerDeath] = []
        self._process: ChildProcess | None = None
        self._pipe: Connection | None = None
        self._started = 0.0
        self._restarts = Backoff(*_RESTART_PAUSES, jitter=False)
        self.due: float | None = None
        """The time of the next call of `check`, by the monotonic clock."""

    @property
    def processes(self) -> list[ChildProcess]:
        """The process, if there is one; `check` is to be called when it ends."""
        return [] if self._process is None else [self._process]

    def lease_begun(self, pid: int, name: str, lease: LeaseBegun) -> None:
        """Have a lease renewed while the worker process `pid` runs."""
        kept = KeepLease(pid, name, lease)
        self._leases[lease.grant.consumer] = kept
        self._tell(kept)

    def lease_ended(self, consumer: str) -> None:
        """Have no more done for a lease, which its process has ended itself."""
        if self._leases.pop(consumer, None) is not None:
            self._tell(LeaseEnded(consumer))

    def process_died(self, pid: int, how: str) -> None:
        """Have all leases of a dead worker process ended now."""
        left = [kept for kept in self._leases.values() if kept.pid == pid]
        if not left:
            return
        for kept in left:
            del self._leases[kept.lease.grant.consumer]
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if death.until > now]
        longest = max(kept.lease.grant.seconds for kept in left)
        death = _WorkerDeath(now + longest, left, WorkerProcessDied(pid, how))
        self._deaths.append(death)
        self._tell(death.message)

    def check(self) -> None:
        """Start the process if there is something to keep, or another in place of a dead one."""
        now = time.monotonic()
        if self._process is not None and not self._process.is_alive():
            if now - self._started > _STEADY_LIFE:
                self._restarts.reset()
            pause = self._restarts.next()
            logger.warning(
                "the process that keeps the leases ended; starting another in %.1f s", pause
            )
            self._collect()
            self.due = now + pause
        wanted = bool(self._leases or self._deaths)
        if self._process is None and wanted and (self.due is None or self.due <= now):
            self._start()

    def _start(self) -> None:
        self.due = None
        childs_end, pipe = multiprocessing.Pipe(duplex=False)
        keep_private(pipe.fileno())  # no copy keeps the pipe from ending with the supervisor
        try:
            self._process = start_process(
                run_lease_keeper_process,
                (childs_end, os.getpid()),
                name="keeper",
                ignore_stop_signals=True,
                daemon=True,
            )
        except OSError as error:
            pipe.close()
            self.due = time.monotonic() + _NO_PROCESS_PAUSE
            logger.warning("no process can be started to keep the leases: %s", error)
            return
        finally:
            childs_end.close()
        self._pipe = pipe
        self._started = time.monotonic()
        self._tell_everything()

    def _tell_everything(self) -> None:
        for kept in self._leases.values():
            self._tell(kept)
        for death in self._deaths:
            if death.until > self._started:
                for kept in death.leases:
                    self._tell(kept)
                self._tell(death.message)

    def _tell(self, message: LeaseKeeperMessage) -> None:
        if self._pipe is None or self._process is None:
            return  # it is told when it starts
        if has_room(self._pipe):
            send(self._pipe, message)
        else:
            self._process.send_signal(signal.SIGKILL)  # the next one is told everything

    def stop(self) -> None:
        """Stop the process, once it has ended the leases of the dead; wait a second at most."""
        if self._process is not None:
            if self._deaths:
                self._tell(StopLeaseKeeper())
                self._process.join(_STOP_WAIT)
            self._process.send_signal(signal.SIGKILL)
            self._collect()

    def _collect(self) -> None:
        assert self._process is not None
        assert self._pipe is not None
        self._process.collect()
        self._pipe.close()
        self._process = self._pipe = None
