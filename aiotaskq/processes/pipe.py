"""Messages between the processes of a worker, the exit statuses of worker processes, and pipes.

::

    worker process ─── WorkerProcessReady, EventLoopTick, LeaseBegun, LeaseEnded ───▶ supervisor
    supervisor ─── KeepLease, LeaseEnded, WorkerProcessDied, StopLeaseKeeper ───▶ lease keeper

Theory of operation. Each worker process has a pipe to the supervisor, and the lease keeper has one
from it; messages go one way only, and are encoded as MessagePack. Facts are named in the past
tense, orders in the imperative.

Either end may be dead or stopped between any two messages:

- The reader is dead: a message sent is lost, and no error is raised. An orphan learns of it by
  itself; see `aiotaskq.processes.parent`.
- The reader is stopped: the pipe fills, and a writer would wait until it goes on. So
  `EventLoopTick`, which is sent again and again, is left out where there is no room (`has_room`),
  and the supervisor kills a lease keeper that does not read. Limit: the few other messages of a
  worker process are written in any case, and wait if thousands of ticks have filled the pipe.
- The writer is dead: the messages that it has sent are still read, in their order, and then
  `receive` raises EOFError. So the supervisor reads a dead worker process to the end before it
  looks which leases are left over.

The last word of a worker process is its exit status:

==============  ==========================================================================
0               it was told to stop, or the queues were empty in a burst
`SETUP_ERROR`   the set-up is wrong, and the process has said so on stderr
`RECYCLE`       the process has reached a limit of its own and wants to be replaced, at once
anything else   it died
==============  ==========================================================================
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

from aiotaskq.contract.records import Grant
from aiotaskq.forks import keep_private

SETUP_ERROR = 2
RECYCLE = 75  # EX_TEMPFAIL: nothing else uses it

# --- from a worker process to the supervisor ------------------------------------------------------


class WorkerProcessReady(msgspec.Struct, frozen=True, tag=True):
    """A worker process takes tasks from now on.

    Only worker processes know the application, so this is where the supervisor learns how it is
    set up.

    Args:
        processes: How many worker processes the application wants in all.
        patience: Seconds that each needs to end.
        block_limit: Seconds without an `EventLoopTick` after which the process is to be killed;
            None: it sends none.
        end_orphans: Whether the processes that it leaves behind are to be killed.
    """

    processes: int
    patience: float
    block_limit: float | None = None
    end_orphans: bool = True


class EventLoopTick(msgspec.Struct, frozen=True, tag=True):
    """The event loop of a worker process runs.

    Args:
        more: Whether another tick will follow.
    """

    more: bool


class LeaseBegun(msgspec.Struct, frozen=True, tag=True):
    """A worker process has begun a lease.

    Args:
        grant: The lease.
        url: The broker's URL, with its password; it must not be logged.
        prefix: The prefix of the broker's names.
        folder: The working folder, which the URL may be relative to.
        beat: Seconds between renewals.
    """

    grant: Grant
    url: str
    prefix: str
    folder: str
    beat: float

    def __repr__(self) -> str:
        return f"<LeaseBegun {self.grant.consumer}>"


class LeaseEnded(msgspec.Struct, frozen=True, tag=True):
    """A worker process has ended the lease of a consumer itself. The supervisor passes it on."""

    consumer: str


# --- from the supervisor to the lease keeper ------------------------------------------------------


class KeepLease(msgspec.Struct, frozen=True, tag=True):
    """Renew a lease for as long as its process runs.

    Args:
        pid: The worker process.
        name: Its name, for people.
        lease: The lease.
    """

    pid: int
    name: str
    lease: LeaseBegun


class WorkerProcessDied(msgspec.Struct, frozen=True, tag=True):
    """A worker process is dead: its leases are to be ended now.

    Args:
        pid: The process.
        how: How it ended, such as "was killed by signal 9 (Killed)".
    """

    pid: int
    how: str


class StopLeaseKeeper(msgspec.Struct, frozen=True, tag=True):
    """The lease keeper is not needed any more."""


SupervisorMessage: TypeAlias = WorkerProcessReady | EventLoopTick | LeaseBegun | LeaseEnded
"""A message that the supervisor reads."""

LeaseKeeperMessage: TypeAlias = KeepLease | LeaseEnded | WorkerProcessDied | StopLeaseKeeper
"""A message that the lease keeper reads."""

supervisor_messages: msgspec.msgpack.Decoder[SupervisorMessage] = msgspec.msgpack.Decoder(
    SupervisorMessage
)
lease_keeper_messages: msgspec.msgpack.Decoder[LeaseKeeperMessage] = msgspec.msgpack.Decoder(
    LeaseKeeperMessage
)

# --- pipes ----------------------------------------------------------------------------------------

_Message = TypeVar("_Message")


def send(pipe: Connection, message: SupervisorMessage | LeaseKeeperMessage) -> None:
    """Write a message to a pipe; it is lost where the reader is dead."""
    with contextlib.suppress(OSError):
        pipe.send_bytes(msgspec.msgpack.encode(message))


def has_room(pipe: Connection) -> bool:
    """Return whether a short message can be written without waiting for the reader."""
    return bool(select.select([], [pipe], [], 0)[1])


def receive(pipe: Connection, decoder: msgspec.msgpack.Decoder[_Message]) -> Iterator[_Message]:
    """Yield the messages that have arrived, without waiting for more.

    Raises:
        EOFError: The writer has closed its end, and everything was read.
    """
    while True:
        try:
            if not pipe.poll():
                return
            data = pipe.recv_bytes()
        except OSError as error:
            raise EOFError from error
        yield decoder.decode(data)


class SupervisorPipe:
    """A worker process's end of its pipe to the supervisor. No method raises."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        keep_private(pipe.fileno())

    def ready(self, message: WorkerProcessReady) -> None:
        """Tell that tasks are taken."""
        send(self._pipe, message)

    def tick(self, *, more: bool) -> None:
        """Tell that the event loop runs. See `EventLoopTick`."""
        if has_room(self._pipe):
            send(self._pipe, EventLoopTick(more))

    def lease_begun(self, grant: Grant, *, url: str, prefix: str, beat: float) -> None:
        """Tell of a lease that has begun. See `LeaseBegun`."""
        try:
            folder = str(Path.cwd())
        except OSError:  # it was removed: nothing is relative to it
            folder = "/"
        send(self._pipe, LeaseBegun(grant, url, prefix, folder, beat))

    def lease_ended(self, grant: Grant) -> None:
        """Tell of a lease that this process has ended. See `LeaseEnded`."""
        send(self._pipe, LeaseEnded(grant.consumer))
