"""The lease keeper: a process that renews the leases of worker processes, or ends them.

A worker's own thread renews its lease as well, but cannot do so while C code holds the
interpreter's lock; and a process that died tells nobody. The supervisor sees its children live and
die, but must hold neither connections nor an event loop, since it forks. So it has this process
beside it::

    worker process ── LeaseBegun, LeaseEnded ──▶ supervisor
                      supervisor ── KeepLease, WorkerProcessDied ... ──▶ lease keeper
                                           lease keeper ── renew, end ──▶ broker

Theory of operation. There is one `_KeptLease` and one asyncio task (`_keep`) for each lease. A
lease is *kept*, and renewed each `beat` seconds if its process runs; then it is *over*: its process
ended it, its process died, the broker no longer knows it, or the lease keeper stops. If its process
died it is then *ended* at the broker, so that others get the messages at once; a broker that is
away is asked again until the lease has lapsed by itself.

What may happen between any two steps:

- A worker process dies before the supervisor has seen it: it is a zombie then, and `is_running`
  keeps its lease from being renewed.
- A worker process is stopped (SIGSTOP, a debugger): its lease is not renewed, so it is given up
  after its lease, like any worker that stands still. Where the system has no /proc this cannot be
  seen: leases are not renewed here at all then, and only deaths are acted on.
- A death arrives while a renewal is under way: the renewal is finished first. Calls for one lease
  never overlap, and none is cancelled to make room for another, so a late renewal cannot follow the
  end of its lease.
- The supervisor dies: the pipe ends, or another process becomes the parent. Worker processes notice
  it themselves, so nothing is ended here; the lease keeper just stops.
- This process dies: the supervisor starts another and tells it everything again.

Invariant: a lease is in `_kept` exactly while it is to be renewed; every asyncio task of `_keep` is
in `_tasks` until it has closed its lease's connection.

The process ignores the signals that stop a worker: it is needed until the last worker has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from multiprocessing.connection import Connection

from aiotaskq.backoff import Backoff
from aiotaskq.contract.broker import Broker, Lease
from aiotaskq.drivers import create_broker
from aiotaskq.errors import Unavailable
from aiotaskq.ids import host_name
from aiotaskq.processes.operating_system import is_running, resident_memory, set_process_title
from aiotaskq.processes.parent import is_parent
from aiotaskq.processes.pipe import (
    KeepLease,
    LeaseBegun,
    LeaseEnded,
    LeaseKeeperMessage,
    StopLeaseKeeper,
    WorkerProcessDied,
    lease_keeper_messages,
    receive,
)
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.keeper")

PROCESS_TITLE = "aiotaskq-keeper"
"""The name that `ps` and `top` show for the process, where the system allows it."""

_LOOK_INTERVAL = 1.0  # seconds between looks at the memory of processes and at the parent
_CALL_TIMEOUT = 5.0  # seconds that one call of the broker may take
_END_PAUSES = (0.1, 1.0)  # seconds before a lease is ended again after a failure: first, longest
_STOP_WAIT = 0.6  # seconds at the end for leases that are being ended


def run_lease_keeper_process(pipe: Connection, supervisor_pid: int) -> None:
    """Be the process, and exit.

    Args:
        pipe: The end of the pipe that the supervisor's messages are read from.
        supervisor_pid: The parent.
    """
    set_process_title(PROCESS_TITLE)
    try:
        asyncio.run(LeaseKeeperProcess(pipe, supervisor_pid).run())
    except Exception:  # a fault of ours: it is logged, and the supervisor starts another process
        logger.exception("the process that keeps the leases failed")
        status = 1
    else:
        status = 0
    logging.shutdown()
    os._exit(status)  # whatever a driver still waits for


class _KeptLease:
    """A lease and the worker process that needs it."""

    def __init__(self, message: KeepLease, lease: Lease) -> None:
        self.pid = message.pid
        self.name = message.name
        self.grant = message.lease.grant
        self.beat = message.lease.beat
        self.lease = lease
        self.memory: int | None = None  # bytes, when last seen
        self.note: str | None = None  # how the process died; None: the lease needs no end
        self.over = asyncio.Event()  # nothing is to be renewed any more

    def finish(self, note: str | None = None) -> None:
        """Renew no more; with a note, end the lease."""
        self.note = note
        self.over.set()

    def look(self) -> None:
        """Note the memory that the process uses."""
        self.memory = resident_memory(self.pid) or self.memory  # a zombie has none


class LeaseKeeperProcess:
    """Keeps leases as the messages that come over a pipe say."""

    def __init__(self, pipe: Connection, supervisor_pid: int) -> None:
        self._pipe = pipe
        self._supervisor_pid = supervisor_pid
        self._brokers: dict[tuple[str, str, str], Broker] = {}
        self._kept: dict[str, _KeptLease] = {}  # by consumer
        self._tasks: dict[asyncio.Task[None], _KeptLease] = {}
        self._stopping = asyncio.Event()
        self._host = host_name()

    async def run(self) -> None:
        """Keep leases until told to stop, or the supervisor is gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._read_messages)
        try:
            while not self._stopping.is_set() and is_parent(self._supervisor_pid):
                for kept in self._kept.values():
                    kept.look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_INTERVAL):
                        await self._stopping.wait()
        finally:
            loop.remove_reader(self._pipe.fileno())
            await self._finish()

    async def _finish(self) -> None:
        for kept in self._kept.values():
            kept.finish()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_STOP_WAIT)
            for task in late:
                logger.warning(
                    "the lease of %s was not ended in time: its tasks are handed out again once it"
                    " has lapsed",
                    self._tasks[task].name,
                )
                task.cancel()

    # --- messages ---

    def _read_messages(self) -> None:
        try:
            for message in receive(self._pipe, lease_keeper_messages):
                self._handle(message)
                if self._stopping.is_set():
                    return
        except EOFError:
            self._stopping.set()

    def _handle(self, message: LeaseKeeperMessage) -> None:
        match message:
            case KeepLease():
                self._begin(message)
            case LeaseEnded():
                kept = self._kept.pop(message.consumer, None)
                if kept is not None:
                    kept.finish()
            case WorkerProcessDied():
                for consumer, kept in list(self._kept.items()):
                    if kept.pid == message.pid:
                        del self._kept[consumer]
                        kept.finish(self._note(kept, message.how))
            case StopLeaseKeeper():
                self._stopping.set()

    def _note(self, kept: _KeptLease, how: str) -> str:
        note = f"{kept.name} (pid {kept.pid} on {self._host}) {how}"
        if kept.memory is not None:
            note += f", {kept.memory // 2**20} MiB in use when last seen"
        return note

    def _begin(self, message: KeepLease) -> None:
        lease = message.lease
        try:
            kept = _KeptLease(message, self._broker(lease).lease(lease.grant))
        except Exception as error:
            # Only its type: the text of the error may hold the password.
            logger.error(
                "the lease of %s is kept by itself alone: %s", message.name, type(error).__name__
            )
            return
        kept.look()
        self._kept[lease.grant.consumer] = kept
        task = asyncio.create_task(self._keep(kept))
        self._tasks[task] = kept
        task.add_done_callback(self._tasks.pop)

    def _broker(self, lease: LeaseBegun) -> Broker:
        key = (lease.url, lease.prefix, lease.folder)
        if key not in self._brokers:
            with contextlib.suppress(OSError):  # it was removed: nothing is relative to it
                os.chdir(lease.folder)
            self._brokers[key] = create_broker(lease.url, prefix=lease.prefix)
        return self._brokers[key]

    # --- one lease ---

    async def _keep(self, kept: _KeptLease) -> None:
        """Renew a lease until it is over, and end it if its process died."""
        try:
            while not kept.over.is_set():
                # At once, so that there is a connection when the lease has to be ended quickly.
                if is_running(kept.pid) and not await self._renew(kept):
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(kept.beat):
                        await kept.over.wait()
            if kept.note is not None:
                await self._end(kept, kept.note)
        finally:
            if self._kept.get(kept.grant.consumer) is kept:
                del self._kept[kept.grant.consumer]
            await kept.lease.close()

    async def _renew(self, kept: _KeptLease) -> bool:
        """Renew a lease and return whether there still is one."""
        try:
            async with asyncio.timeout(min(kept.grant.seconds, _CALL_TIMEOUT)):
                return await kept.lease.renew()
        except (Unavailable, TimeoutError):
            return True  # the worker logs it; the lease runs on
        except Exception:  # a fault of the driver must not stop the other leases
            logger.exception("the lease of %s cannot be renewed", kept.name)
            return True

    async def _end(self, kept: _KeptLease, note: str) -> None:
        """End a lease, or wait until it has lapsed."""
        pauses = Backoff(*_END_PAUSES, jitter=False)
        lapses = time.monotonic() + kept.grant.seconds
        while True:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT):
                    taken = await kept.lease.end(note)
            except (Unavailable, TimeoutError):
                pause = pauses.next()
                if time.monotonic() + pause > lapses:
                    return
                await asyncio.sleep(pause)
            except Exception:  # a fault of the driver; the lease lapses by itself
                logger.exception("the lease of %s cannot be ended", kept.name)
                return
            else:
                if taken:
                    what = "task" if taken == 1 else "tasks"
                    logger.warning("gave %d %s back: %s", taken, what, note)
                return
