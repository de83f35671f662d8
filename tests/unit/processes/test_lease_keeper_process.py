"""The lease keeper process, in the event loop of a test and with a broker of the test's own."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from multiprocessing import Pipe
from typing import Any

import msgspec
import pytest

from aiotaskq.contract.records import Grant
from aiotaskq.errors import BrokerUnavailable
from aiotaskq.processes import lease_keeper_process
from aiotaskq.processes.lease_keeper_process import LeaseKeeperProcess
from aiotaskq.processes.pipe import (
    KeepLease,
    LeaseBegun,
    LeaseEnded,
    LeaseKeeperMessage,
    StopLeaseKeeper,
    WorkerProcessDied,
)

pytestmark = pytest.mark.may_block(reason="the lease keeper reads /proc, and serves nobody else")

PATIENCE = 120.0
BEAT = 0.05
SECRET = "redis://:swordfish@localhost/0"


class FakeLease:
    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.renewals = 0
        self.notes: list[str] = []
        self.closed = False
        self.lost = False
        self.failures: list[Exception] = []

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    async def renew(self) -> bool:
        self.renewals += 1
        self._fail()
        return not self.lost

    async def end(self, note: str) -> int:
        self._fail()
        self.notes.append(note)
        return 2

    async def close(self) -> None:
        self.closed = True


class FakeBroker:
    def __init__(self) -> None:
        self.leases: dict[str, FakeLease] = {}

    def lease(self, grant: Grant) -> FakeLease:
        return self.leases.setdefault(grant.consumer, FakeLease(grant))


class Supervision:
    """A lease keeper in this event loop, and the supervisor's end of its pipe."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        self.made: list[tuple[str, str]] = []
        self._pipe, self.ours = Pipe(duplex=False)
        self.keeper = LeaseKeeperProcess(self._pipe, os.getppid())

    def create(self, url: str, *, prefix: str) -> Any:
        self.made.append((url, prefix))
        return self.broker

    def tell(self, *messages: LeaseKeeperMessage) -> None:
        for message in messages:
            self.ours.send_bytes(msgspec.msgpack.encode(message))

    def hold(self, pid: int, consumer: str = "c1", seconds: float = 60.0) -> None:
        grant = Grant(consumer, ("default",), seconds)
        begun = LeaseBegun(grant, SECRET, "aiotaskq", "/", BEAT)
        self.tell(KeepLease(pid, "worker-1", begun))

    async def lease(self, consumer: str = "c1") -> FakeLease:
        await until(lambda: consumer in self.broker.leases)
        return self.broker.leases[consumer]

    def close(self) -> None:
        self.ours.close()
        self._pipe.close()


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(supervision: Supervision) -> AsyncIterator[None]:
    main = asyncio.create_task(supervision.keeper.run())
    yield
    supervision.tell(StopLeaseKeeper())
    async with asyncio.timeout(PATIENCE):
        await main


@pytest.fixture
def supervision(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervision]:
    monkeypatch.chdir(os.curdir)  # it goes where the worker is
    made = Supervision()
    monkeypatch.setattr(lease_keeper_process, "create_broker", made.create)
    yield made
    made.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


async def test_leases_of_a_process_that_lives_are_renewed(supervision: Supervision) -> None:
    async with running(supervision):
        supervision.hold(os.getpid(), "c1")
        supervision.hold(os.getpid(), "c2")
        first, second = await supervision.lease("c1"), await supervision.lease("c2")
        await until(lambda: first.renewals > 3 and second.renewals > 3)
        assert supervision.made == [(SECRET, "aiotaskq")]  # one driver for both
    assert first.closed
    assert first.notes == []


async def test_a_process_that_is_stopped_is_not_renewed(
    supervision: Supervision, sleeper: subprocess.Popen[bytes]
) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    os.waitpid(sleeper.pid, os.WUNTRACED)
    async with running(supervision):
        supervision.hold(sleeper.pid)
        lease = await supervision.lease()
        await asyncio.sleep(5 * BEAT)
        assert lease.renewals == 0
        os.kill(sleeper.pid, signal.SIGCONT)
        await until(lambda: lease.renewals > 1)


async def test_a_zombie_is_not_renewed(
    supervision: Supervision, sleeper: subprocess.Popen[bytes]
) -> None:
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    async with running(supervision):
        supervision.hold(sleeper.pid)
        lease = await supervision.lease()
        await asyncio.sleep(5 * BEAT)
        assert lease.renewals == 0


async def test_a_lease_that_its_process_has_ended_is_left_alone(supervision: Supervision) -> None:
    async with running(supervision):
        supervision.hold(os.getpid())
        lease = await supervision.lease()
        supervision.tell(LeaseEnded("c1"), LeaseEnded("unknown"))
        await until(lambda: lease.closed)
        supervision.tell(WorkerProcessDied(os.getpid(), "was killed"))
    assert lease.notes == []


async def test_a_lease_that_was_lost_is_forgotten(supervision: Supervision) -> None:
    async with running(supervision):
        supervision.hold(os.getpid())
        lease = await supervision.lease()
        lease.lost = True
        await until(lambda: lease.closed)
        supervision.tell(WorkerProcessDied(os.getpid(), "was killed"))
    assert lease.notes == []


async def test_every_lease_of_a_dead_process_is_ended_with_a_note(
    supervision: Supervision, sleeper: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(supervision):
        supervision.hold(sleeper.pid, "c1")
        supervision.hold(sleeper.pid, "c2")
        supervision.hold(os.getpid(), "c3")
        leases = [await supervision.lease(consumer) for consumer in ("c1", "c2", "c3")]
        sleeper.kill()
        supervision.tell(WorkerProcessDied(sleeper.pid, "was killed by signal 9 (Killed)"))
        await until(lambda: leases[0].closed and leases[1].closed)
    [note] = leases[0].notes
    assert note.startswith(f"worker-1 (pid {sleeper.pid} on ")
    assert ") was killed by signal 9 (Killed), " in note
    assert note.endswith(" MiB in use when last seen")
    assert len(leases[1].notes) == 1
    assert leases[2].notes == []
    assert f"gave 2 tasks back: {note}" in caplog.text


async def test_a_death_is_told_at_once_though_its_lease_was_never_renewed(
    supervision: Supervision,
) -> None:
    supervision.hold(2**22 + 1)  # no such pid
    supervision.tell(WorkerProcessDied(2**22 + 1, "ended with exit status 1"))
    async with running(supervision):
        lease = await supervision.lease()
        await until(lambda: lease.closed)
    assert lease.renewals == 0
    assert len(lease.notes) == 1


async def test_a_broker_that_is_away_is_asked_again(
    supervision: Supervision, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(supervision):
        supervision.hold(os.getpid())
        lease = await supervision.lease()
        lease.failures = [BrokerUnavailable("away"), OSError("a fault of the driver's")]
        await until(lambda: not lease.failures)
        seen = lease.renewals
        await until(lambda: lease.renewals > seen)
        lease.failures = [BrokerUnavailable("away")] * 3
        supervision.tell(WorkerProcessDied(os.getpid(), "was killed"))
        await until(lambda: lease.closed)
    assert len(lease.notes) == 1
    assert caplog.text.count("cannot be renewed") == 1  # an outage is told by the worker itself


async def test_a_lease_that_lapsed_meanwhile_needs_no_end(supervision: Supervision) -> None:
    async with running(supervision):
        supervision.hold(os.getpid(), seconds=0.3)
        lease = await supervision.lease()
        supervision.tell(WorkerProcessDied(os.getpid(), "was killed"))
        lease.failures = [BrokerUnavailable("away")] * 1000
        await until(lambda: lease.closed)
    assert lease.notes == []


async def test_a_driver_that_cannot_be_made_costs_nobody_else_and_no_password(
    supervision: Supervision, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(url: str, *, prefix: str) -> Any:
        raise ValueError(url)

    async with running(supervision):
        with monkeypatch.context() as patch:
            patch.setattr(lease_keeper_process, "create_broker", fail)
            supervision.hold(os.getpid(), "c1")
            await until(lambda: "kept by itself alone" in caplog.text)
        supervision.hold(os.getpid(), "c2")
        await supervision.lease("c2")
    assert caplog.records[0].levelno == logging.ERROR
    assert "swordfish" not in caplog.text


def test_nothing_that_may_be_logged_shows_the_password() -> None:
    begun = LeaseBegun(Grant("c1", ("default",), 1.0), SECRET, "aiotaskq", "/", BEAT)
    kept = KeepLease(1, "worker-1", begun)
    assert "swordfish" not in f"{begun!r} {begun} {kept!r} {kept}"


@pytest.mark.parametrize("told", [True, False], ids=["told", "end of the pipe"])
async def test_it_leaves_when_told_or_when_nobody_can_tell_it_anything(
    supervision: Supervision, told: bool
) -> None:
    main = asyncio.create_task(supervision.keeper.run())
    supervision.hold(os.getpid())
    lease = await supervision.lease()
    if told:
        supervision.tell(StopLeaseKeeper())
    else:
        supervision.ours.close()
    async with asyncio.timeout(PATIENCE):
        await main
    assert lease.closed


async def test_it_leaves_when_the_supervisor_is_another_process() -> None:
    ours, theirs = Pipe(duplex=False)
    async with asyncio.timeout(PATIENCE):
        await LeaseKeeperProcess(ours, os.getpid()).run()  # nobody is the parent of itself
    ours.close()
    theirs.close()
