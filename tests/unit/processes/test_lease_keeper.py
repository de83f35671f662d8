"""The lease keeper, over a broker of the test itself."""

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
from aiotaskq.processes import lease_keeper as keeper
from aiotaskq.processes.lease_keeper import Died, Held, Holding, Keeping, Leave, LetGo, Word

pytestmark = pytest.mark.may_block(reason="a keeper reads /proc, and serves nobody meanwhile")

PATIENCE = 20.0
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


class Desk:
    """A lease keeper on this event loop, and the supervisor's end of its pipe."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        self.made: list[tuple[str, str]] = []
        self._pipe, self.ours = Pipe(duplex=False)
        self.keeping = Keeping(self._pipe, os.getppid())

    def create(self, url: str, *, prefix: str) -> Any:
        self.made.append((url, prefix))
        return self.broker

    def tell(self, *words: Word) -> None:
        for word in words:
            self.ours.send_bytes(msgspec.msgpack.encode(word))

    def hold(self, pid: int, consumer: str = "c1", seconds: float = 60.0) -> None:
        grant = Grant(consumer, ("default",), seconds)
        holding = Holding(grant, SECRET, "aiotaskq", "/", BEAT)
        self.tell(Held(pid, "worker-1", holding))

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
async def running(desk: Desk) -> AsyncIterator[None]:
    main = asyncio.create_task(desk.keeping.run())
    yield
    desk.tell(Leave())
    async with asyncio.timeout(PATIENCE):
        await main


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(os.curdir)  # the keeper changes to the directory of the worker
    made = Desk()
    monkeypatch.setattr(keeper, "create_broker", made.create)
    yield made
    made.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


async def test_leases_of_a_process_that_lives_are_renewed(desk: Desk) -> None:
    async with running(desk):
        desk.hold(os.getpid(), "c1")
        desk.hold(os.getpid(), "c2")
        first, second = await desk.lease("c1"), await desk.lease("c2")
        await until(lambda: first.renewals > 3 and second.renewals > 3)
        assert desk.made == [(SECRET, "aiotaskq")]  # one driver for both
    assert first.closed
    assert first.notes == []


async def test_a_process_that_is_stopped_is_not_renewed(
    desk: Desk, sleeper: subprocess.Popen[bytes]
) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    os.waitpid(sleeper.pid, os.WUNTRACED)
    async with running(desk):
        desk.hold(sleeper.pid)
        lease = await desk.lease()
        await asyncio.sleep(5 * BEAT)
        assert lease.renewals == 0
        os.kill(sleeper.pid, signal.SIGCONT)
        await until(lambda: lease.renewals > 1)


async def test_a_zombie_is_not_renewed(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    async with running(desk):
        desk.hold(sleeper.pid)
        lease = await desk.lease()
        await asyncio.sleep(5 * BEAT)
        assert lease.renewals == 0


async def test_a_lease_that_was_let_go_is_left_alone(desk: Desk) -> None:
    async with running(desk):
        desk.hold(os.getpid())
        lease = await desk.lease()
        desk.tell(LetGo("c1"), LetGo("unknown"))
        await until(lambda: lease.closed)
        desk.tell(Died(os.getpid(), "was killed"))
    assert lease.notes == []


async def test_a_lease_that_was_lost_is_forgotten(desk: Desk) -> None:
    async with running(desk):
        desk.hold(os.getpid())
        lease = await desk.lease()
        lease.lost = True
        await until(lambda: lease.closed)
        desk.tell(Died(os.getpid(), "was killed"))
    assert lease.notes == []


async def test_every_lease_of_a_dead_process_is_ended_with_a_note(
    desk: Desk, sleeper: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(desk):
        desk.hold(sleeper.pid, "c1")
        desk.hold(sleeper.pid, "c2")
        desk.hold(os.getpid(), "c3")
        leases = [await desk.lease(consumer) for consumer in ("c1", "c2", "c3")]
        sleeper.kill()
        desk.tell(Died(sleeper.pid, "was killed by signal 9 (Killed)"))
        await until(lambda: leases[0].closed and leases[1].closed)
    [note] = leases[0].notes
    assert note.startswith(f"worker-1 (pid {sleeper.pid} on ")
    assert ") was killed by signal 9 (Killed), " in note
    assert note.endswith(" MiB in use when last seen")
    assert len(leases[1].notes) == 1
    assert leases[2].notes == []
    assert f"gave 2 tasks back: {note}" in caplog.text


async def test_the_lease_of_a_dead_process_is_ended_at_once_though_it_was_never_renewed(
    desk: Desk,
) -> None:
    desk.hold(2**22 + 1)  # no such pid
    desk.tell(Died(2**22 + 1, "ended with exit status 1"))
    async with running(desk):
        lease = await desk.lease()
        await until(lambda: lease.closed)
    assert lease.renewals == 0
    assert len(lease.notes) == 1


async def test_a_broker_that_is_away_is_asked_again(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(desk):
        desk.hold(os.getpid())
        lease = await desk.lease()
        lease.failures = [BrokerUnavailable("away"), OSError("a fault of the driver's")]
        await until(lambda: not lease.failures)
        seen = lease.renewals
        await until(lambda: lease.renewals > seen)
        lease.failures = [BrokerUnavailable("away")] * 3
        desk.tell(Died(os.getpid(), "was killed"))
        await until(lambda: lease.closed)
    assert len(lease.notes) == 1
    assert caplog.text.count("cannot be renewed") == 1  # the worker itself reports an outage


async def test_a_lease_that_lapsed_meanwhile_needs_no_end(desk: Desk) -> None:
    async with running(desk):
        desk.hold(os.getpid(), seconds=0.3)
        lease = await desk.lease()
        desk.tell(Died(os.getpid(), "was killed"))
        lease.failures = [BrokerUnavailable("away")] * 1000
        await until(lambda: lease.closed)
    assert lease.notes == []


async def test_a_driver_that_cannot_be_created_harms_no_other_and_shows_no_password(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(url: str, *, prefix: str) -> Any:
        raise ValueError(url)

    async with running(desk):
        with monkeypatch.context() as patch:
            patch.setattr(keeper, "create_broker", fail)
            desk.hold(os.getpid(), "c1")
            await until(lambda: "kept by itself alone" in caplog.text)
        desk.hold(os.getpid(), "c2")
        await desk.lease("c2")
    assert caplog.records[0].levelno == logging.ERROR
    assert "swordfish" not in caplog.text


def test_nothing_that_may_be_logged_shows_the_password() -> None:
    holding = Holding(Grant("c1", ("default",), 1.0), SECRET, "aiotaskq", "/", BEAT)
    held = Held(1, "worker-1", holding)
    assert "swordfish" not in f"{holding!r} {holding} {held!r} {held}"


@pytest.mark.parametrize("told", [True, False], ids=["told", "end of the pipe"])
async def test_it_exits_on_request_or_at_the_end_of_its_pipe(desk: Desk, told: bool) -> None:
    main = asyncio.create_task(desk.keeping.run())
    desk.hold(os.getpid())
    lease = await desk.lease()
    if told:
        desk.tell(Leave())
    else:
        desk.ours.close()
    async with asyncio.timeout(PATIENCE):
        await main
    assert lease.closed


async def test_it_exits_when_its_parent_is_another_process() -> None:
    ours, theirs = Pipe(duplex=False)
    async with asyncio.timeout(PATIENCE):
        await Keeping(ours, os.getpid()).run()  # a process is never its own parent
    ours.close()
    theirs.close()
