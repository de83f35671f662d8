"""The keeper: a process that renews the leases of worker processes, and ends those of the dead.

A worker's own thread renews its lease as well, and cannot do so while C code holds the
interpreter's lock; and a process that died tells nobody. So the supervisor, which sees its
children live and die, has this process beside it: it holds the connections and the event loop
that the supervisor must not have.

::

    worker process ── Holding, LetGo ──▶ supervisor ── and Died ──▶ keeper ── renew, end ──▶ broker

A process that is stopped (SIGSTOP, a debugger) is not renewed: it is given up after its lease, as
any worker that stands still. Where the system has no /proc, nothing tells that one is stopped;
then only deaths are acted on.

The keeper ignores the signals that end a worker, and leaves when it is told to or when the
supervisor is gone. If it dies itself, another takes its place, and is told everything again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from aiotaskq.contract.broker import Broker, Lease
from aiotaskq.contract.records import Grant
from aiotaskq.drivers import create_broker
from aiotaskq.errors import Unavailable
from aiotaskq.ids import host_name

logger = logging.getLogger("aiotaskq.keeper")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What ends a worker. They are for the supervisor, which tells the other processes."""

NAME = "aiotaskq-keeper"
"""What `ps` and `top` call the process, where the system allows for it."""

_LOOK = 1.0  # seconds between looks at the memory of processes, and whether the supervisor lives
_CALL = 5.0  # seconds that one call of the broker may take
_RETRY = (0.1, 1.0)  # seconds before a lease is ended again after a failure: at first, and later
_FAREWELL = 0.6  # seconds at the end for leases that are being ended
_END_WAIT = 1.0  # seconds that the keeper gets to leave
_RESTART = (0.1, 30.0)  # seconds before a keeper that ended is replaced: at first, and the longest
_STEADY = 10.0  # seconds of life after which its end counts as the first
_PROC = Path("/proc")
_STOPPED = frozenset("TtZXx")  # states in /proc/<pid>/stat; see proc(5)


class Holding(msgspec.Struct, frozen=True, tag=True):
    """A worker process has begun a lease.

    Args:
        grant: The lease.
        url: Of the broker, with its password: for nobody's eyes.
        prefix: Of the broker's names.
        folder: The working folder, which the URL may be relative to.
        beat: Seconds between renewals.
    """

    grant: Grant
    url: str
    prefix: str
    folder: str
    beat: float

    def __repr__(self) -> str:
        return f"<Holding {self.grant.consumer}>"


class LetGo(msgspec.Struct, frozen=True, tag=True):
    """A worker process has ended the lease of a consumer itself."""

    consumer: str


class Held(msgspec.Struct, frozen=True, tag=True):
    """A lease, and the process that lives under it."""

    pid: int
    name: str
    holding: Holding


class Died(msgspec.Struct, frozen=True, tag=True):
    """A process is dead.

    Args:
        pid: Which it was.
        how: Such as "was killed by signal 9 (Killed)".
    """

    pid: int
    how: str


class Leave(msgspec.Struct, frozen=True, tag=True):
    """The keeper is not needed any more."""


Word: TypeAlias = Held | LetGo | Died | Leave
_words = msgspec.msgpack.Decoder(Word)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Let no signal come while a process is started: its copy of us would note it as well."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def start_process(target: Any, args: tuple[Any, ...], name: str, **options: Any) -> BaseProcess:
    """Fork a process, or spawn it where there is no fork."""
    context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    process: BaseProcess = context.Process(target=target, args=args, name=name, **options)
    with signals_held_back():
        process.start()
    return process


class Keeper:
    """The supervisor's side: remembers every lease, and has a keeper while there is any.

    No method waits for the keeper, but for `stop`.
    """

    def __init__(self) -> None:
        self._leases: dict[str, Held] = {}  # by consumer
        self._deaths: list[tuple[float, list[Held], Died]] = []  # until they are of no interest
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._started = 0.0
        self._pause = _RESTART[0]
        self.due: float | None = None
        """When `look` is to be called again, by the monotonic clock."""

    @property
    def sentinels(self) -> list[int]:
        """What is readable when `look` is to be called."""
        return [] if self._process is None else [self._process.sentinel]

    def hold(self, pid: int, name: str, holding: Holding) -> None:
        """Note a lease, which the process `pid` lives under."""
        held = Held(pid, name, holding)
        self._leases[holding.grant.consumer] = held
        self._tell(held)

    def let_go(self, consumer: str) -> None:
        """Note that a lease was ended by the process itself."""
        if self._leases.pop(consumer, None) is not None:
            self._tell(LetGo(consumer))

    def died(self, pid: int, how: str) -> None:
        """Have all leases of a dead process ended now."""
        orphans = [held for held in self._leases.values() if held.pid == pid]
        if not orphans:
            return
        for held in orphans:
            del self._leases[held.holding.grant.consumer]
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if death[0] > now]
        longest = max(held.holding.grant.seconds for held in orphans)
        died = Died(pid, how)
        self._deaths.append((now + longest, orphans, died))
        self._tell(died)

    def look(self) -> None:
        """Start the process if there is something to keep, or another in place of one that died."""
        now = time.monotonic()
        if self._process is not None and not self._process.is_alive():
            first, longest = _RESTART
            self._pause = first if now - self._started > _STEADY else self._pause
            logger.warning(
                "the process that keeps the leases ended; starting another in %.1f s", self._pause
            )
            self._bury()
            self.due = now + self._pause
            self._pause = min(self._pause * 2, longest)
        wanted = bool(self._leases or self._deaths)
        if self._process is None and wanted and (self.due is None or self.due <= now):
            self._start()

    def _start(self) -> None:
        self.due = None
        ours: Connection
        theirs, ours = multiprocessing.Pipe(duplex=False)
        try:
            self._process = start_process(
                _be_keeper, (theirs, ours, os.getpid()), "keeper", daemon=True
            )
        except OSError as error:  # no memory, or too many processes, for now
            ours.close()
            self.due = time.monotonic() + _RESTART[1]
            logger.warning("no process can be started to keep the leases: %s", error)
            return
        finally:
            theirs.close()
        self._pipe = ours
        self._started = time.monotonic()
        for held in self._leases.values():
            self._tell(held)
        for until, orphans, died in self._deaths:
            if until > self._started:
                for held in orphans:
                    self._tell(held)
                self._tell(died)

    def _tell(self, word: Word) -> None:
        if self._pipe is None or self._process is None:
            return  # it is told when it starts
        if not select.select([], [self._pipe], [], 0)[1]:
            self._process.kill()  # it has not listened for long; the next one is told everything
            return
        with contextlib.suppress(OSError):  # it has just died
            self._pipe.send_bytes(msgspec.msgpack.encode(word))

    def stop(self) -> None:
        """Have it leave, once it has ended the leases of the dead; wait a second at most."""
        if self._process is not None:
            if self._deaths:
                self._tell(Leave())
                self._process.join(_END_WAIT)
            self._process.kill()
            self._bury()

    def _bury(self) -> None:
        assert self._process is not None  # there is one
        assert self._pipe is not None
        self._process.join()
        self._process.close()
        self._pipe.close()
        self._process = self._pipe = None


# --- the process itself -------------------------------------------------------------------------


def _be_keeper(pipe: Connection, supervisors: Connection, supervisor: int) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # a fork has the supervisor's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    supervisors.close()  # or we would never see its end
    with contextlib.suppress(OSError):  # no Linux
        (_PROC / "self/comm").write_text(NAME)
    try:
        asyncio.run(Keeping(pipe, supervisor).run())
    except Exception:  # a fault of ours: told, and the supervisor starts another
        logger.exception("the process that keeps the leases failed")
        status = 1
    else:
        status = 0
    logging.shutdown()
    os._exit(status)  # whatever a driver still waits for


class _Ward:
    """A lease that is kept, and by whom it is needed."""

    def __init__(self, held: Held, lease: Lease) -> None:
        self.pid = held.pid
        self.name = held.name
        self.grant = held.holding.grant
        self.beat = held.holding.beat
        self.lease = lease
        self.memory: int | None = None  # bytes, when last seen
        self.note: str | None = None  # how the process died
        self.over = False  # nothing is to be renewed any more
        self.news = asyncio.Event()

    def end(self, note: str | None = None) -> None:
        self.note = note
        self.over = True
        self.news.set()

    def look(self) -> None:
        self.memory = resident(self.pid) or self.memory  # a zombie has none


class Keeping:
    """Keeps leases as the words that come over a pipe say."""

    def __init__(self, pipe: Connection, supervisor: int) -> None:
        self._pipe = pipe
        self._supervisor = supervisor
        self._brokers: dict[tuple[str, str, str], Broker] = {}
        self._wards: dict[str, _Ward] = {}  # by consumer
        self._tasks: dict[asyncio.Task[None], _Ward] = {}
        self._leaving = asyncio.Event()
        self._host = host_name()

    async def run(self) -> None:
        """Keep leases until told to leave, or the supervisor is gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._listen)
        try:
            while not self._leaving.is_set() and os.getppid() == self._supervisor:
                for ward in self._wards.values():
                    ward.look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK):
                        await self._leaving.wait()
        finally:
            loop.remove_reader(self._pipe.fileno())
            await self._finish()

    async def _finish(self) -> None:
        for ward in self._wards.values():
            ward.end()  # the processes hear from the supervisor, or see for themselves
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_FAREWELL)
            for task in late:
                logger.warning("what %s held comes back with its lease", self._tasks[task].name)
                task.cancel()

    def _listen(self) -> None:
        try:
            while not self._leaving.is_set() and self._pipe.poll():
                self._hear(_words.decode(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            self._leaving.set()

    def _hear(self, word: Word) -> None:
        match word:
            case Held():
                self._begin(word)
            case LetGo():
                ward = self._wards.pop(word.consumer, None)
                if ward is not None:
                    ward.end()
            case Died():
                for consumer, ward in list(self._wards.items()):
                    if ward.pid == word.pid:
                        del self._wards[consumer]
                        ward.end(self._note(ward, word.how))
            case Leave():
                self._leaving.set()

    def _note(self, ward: _Ward, how: str) -> str:
        note = f"{ward.name} (pid {ward.pid} on {self._host}) {how}"
        if ward.memory is not None:
            note += f", {ward.memory // 2**20} MiB in use when last seen"
        return note

    def _begin(self, held: Held) -> None:
        holding = held.holding
        try:
            ward = _Ward(held, self._broker(holding).lease(holding.grant))
        except Exception as error:
            # Only its kind: what it says may hold the password.
            logger.error(
                "the lease of %s is kept by itself alone: %s", held.name, type(error).__name__
            )
            return
        ward.look()
        self._wards[holding.grant.consumer] = ward
        task = asyncio.create_task(self._keep(ward))
        self._tasks[task] = ward
        task.add_done_callback(self._tasks.pop)

    def _broker(self, holding: Holding) -> Broker:
        key = (holding.url, holding.prefix, holding.folder)
        if key not in self._brokers:
            with contextlib.suppress(OSError):  # it was removed: nothing is relative to it
                os.chdir(holding.folder)
            self._brokers[key] = create_broker(holding.url, prefix=holding.prefix)
        return self._brokers[key]

    async def _keep(self, ward: _Ward) -> None:
        """Renew a lease until it is over, and end it if its process died.

        One call at a time: none is cancelled to make room for another.
        """
        try:
            while not ward.over:
                # At once, so that the connection is there when it has to be quick.
                if _runs(ward.pid) and not await self._renew(ward):
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ward.beat):
                        await ward.news.wait()
            if ward.note is not None:
                await self._end(ward, ward.note)
        finally:
            if self._wards.get(ward.grant.consumer) is ward:
                del self._wards[ward.grant.consumer]
            await ward.lease.close()

    async def _renew(self, ward: _Ward) -> bool:
        try:
            async with asyncio.timeout(min(ward.grant.seconds, _CALL)):
                return await ward.lease.renew()
        except (Unavailable, TimeoutError):
            return True  # the worker tells of it; the lease runs on
        except Exception:  # a fault of the driver's own must not end the others
            logger.exception("the lease of %s cannot be renewed", ward.name)
            return True

    async def _end(self, ward: _Ward, note: str) -> None:
        pause, longest = _RETRY
        lapses = time.monotonic() + ward.grant.seconds
        while True:
            try:
                async with asyncio.timeout(_CALL):
                    taken = await ward.lease.end(note)
            except (Unavailable, TimeoutError):
                if time.monotonic() + pause > lapses:
                    return  # it has ended by itself
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)
            except Exception:  # a fault of the driver's own; the lease lapses by itself
                logger.exception("the lease of %s cannot be ended", ward.name)
                return
            else:
                if taken:
                    what = "task" if taken == 1 else "tasks"
                    logger.warning("gave %d %s back: %s", taken, what, note)
                return


def _runs(pid: int) -> bool:
    """Whether a process surely lives, and is not stopped."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    state = text.rpartition(")")[2].split(maxsplit=1)[0]  # the command may hold anything
    return state not in _STOPPED


def resident(pid: int | str) -> int | None:
    """Return the memory that a process occupies, in bytes; None where that cannot be seen."""
    try:
        pages = int((_PROC / str(pid) / "statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()
