"""Leases that the supervisor's side keeps: real worker processes, real deaths.

Where a lease is to make no difference it is much longer than any test waits.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal

import msgspec
import psutil
import pytest

from aiotaskq.contract.records import DeadLetter, DeathDetails
from aiotaskq.drivers import create_broker
from tests.integrations.programs import LONG, TASKS, Program, Programs, gone, wait_for
from tests.servers import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

FOREVER = 100 * LONG  # seconds

MORE = """
import re
from pathlib import Path

def once(name: str) -> bool:
    try:
        Path(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

@app.task
async def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)

@app.task
async def hold(seconds: float) -> int:
    print("holding", os.getpid(), flush=True)
    began = time.perf_counter()
    sum(range(10**7))
    rate = 10**7 / (time.perf_counter() - began)
    sum(range(int(rate * seconds)))  # one call of C code, which lets no other thread run
    print("held", flush=True)
    return os.getpid()

@app.task
async def block() -> int:
    print("blocking", os.getpid(), flush=True)
    if once("blocked"):
        time.sleep(3600)
    return os.getpid()

@app.task
async def swell(seconds: float) -> int:
    print("swelling", os.getpid(), flush=True)
    memory = bytearray(os.urandom(1024)) * 300_000
    await asyncio.sleep(seconds)
    return os.getpid()

@app.task(timeout=0.2)
async def stubborn() -> None:
    print("stubborn", os.getpid(), flush=True)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
"""


class Site:
    """A folder with tasks, and a broker."""

    def __init__(self, programs: Programs, url: str) -> None:
        self.programs = programs
        self.url = url

    def worker(
        self, count: int, *arguments: str, lease: float = FOREVER, **options: object
    ) -> Ward:
        beat = min(lease / 5, 0.5)
        options = {"worker_lease": lease, "worker_heartbeat": beat, **options}
        settings = "".join(f", {name}={value!r}" for name, value in options.items())
        self.programs.write("tasks.py", TASKS.format(options=settings) + MORE)
        program = self.programs.worker(
            "tasks:app", "-w", str(count), *arguments, AIOTASKQ_BROKER_URL=self.url
        )
        program.line(r" ready$", times=count)
        return Ward(program, count)

    def call(self, *arguments: str) -> str:
        done = self.programs.run("call", "tasks:app", *arguments, AIOTASKQ_BROKER_URL=self.url)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def result(self, task_id: str) -> str:
        done = self.programs.run(
            "result", "tasks:app", task_id, "--timeout", str(LONG), AIOTASKQ_BROKER_URL=self.url
        )
        return done.stdout.strip() or done.stderr.strip()

    def dead(self) -> list[DeadLetter]:
        broker = create_broker(self.url, prefix="aiotaskq")

        async def look() -> list[DeadLetter]:
            await broker.open()
            try:
                return list(await broker.dead("default"))
            finally:
                await broker.close()

        return asyncio.run(look())


class Ward:
    """A worker program and the processes below it."""

    def __init__(self, program: Program, count: int) -> None:
        self.program = program
        wait_for(lambda: len(program.children()) == count, f"{count} children")
        self.children = sorted(child.pid for child in program.children())

    def keeper(self) -> int:
        wait_for(self.program.keepers, "a keeper")
        [keeper] = self.program.keepers()
        return keeper.pid

    def everyone(self) -> list[int]:
        self.keeper()
        below = psutil.Process(self.program.pid).children(recursive=True)
        return [process.pid for process in below]


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.server)])
def site(request: pytest.FixtureRequest, programs: Programs) -> Site:
    if request.param == "sqlite":
        return Site(programs, f"sqlite:///{programs.folder}/site.db")
    return Site(programs, request.getfixturevalue("redis_url"))


@pytest.fixture
def local(programs: Programs) -> Site:
    return Site(programs, "sqlite:///local.db")  # relative to the working folder


# --- deaths -------------------------------------------------------------------------------------


def test_a_sibling_gets_what_a_killed_process_held_at_once(site: Site) -> None:
    worker = site.worker(2)
    task_id = site.call("tasks.nap", "3", "x")
    victim = int(worker.program.line(r"napping x (\d+)").group(1))
    os.kill(victim, signal.SIGKILL)
    taker = int(worker.program.line(r"napping x (\d+) 1$", times=2).group(1))  # the same attempt
    assert taker != victim
    note = rf"worker-\d \(pid {victim} on \S+\) was killed by signal 9 \(Killed\), \d+ MiB in use"
    worker.program.line(f"gave 1 task back: {note}")
    assert site.result(task_id) == '"x"'
    assert worker.program.stop() == 0


def test_the_replacement_of_the_only_process_gets_it_at_once(local: Site) -> None:
    worker = local.worker(1)
    task_id = local.call("tasks.nap", "1", "x")
    worker.program.line("napping x")
    os.kill(worker.children[0], signal.SIGKILL)
    worker.program.line(rf"process {worker.children[0]} was killed .* starting another in 0\.1 s")
    worker.program.line("napping x", times=2)
    assert local.result(task_id) == '"x"'
    assert worker.program.stop() == 0


def test_how_workers_died_is_kept_with_the_task_that_killed_them(site: Site) -> None:
    worker = site.worker(1, max_crashes=2)
    task_id = site.call("tasks.die", str(int(signal.SIGSEGV)))
    worker.program.line("goes to the dead letters")
    assert "WorkerLost" in site.result(task_id)
    [letter] = site.dead()
    assert letter.crashes == 2
    note = r"worker-1 \(pid \d+ on \S+\) was killed by signal 11 \(Segmentation fault\)"
    assert re.search(note, letter.reason)
    assert re.match(note, msgspec.json.decode(letter.details, type=DeathDetails).crash_note)
    assert worker.program.stop() == 0


def test_a_process_that_dies_while_all_stop_hands_over_as_well(site: Site) -> None:
    worker = site.worker(2)
    task_id = site.call("tasks.nap", "3", "x")
    victim = int(worker.program.line(r"napping x (\d+)").group(1))
    worker.program.signal(signal.SIGTERM)
    worker.program.line("stopping: what runs gets")
    os.kill(victim, signal.SIGKILL)
    assert worker.program.wait() == 0
    other = site.worker(1)
    other.program.line("napping x")
    assert site.result(task_id) == '"x"'
    assert other.program.stop() == 0


@pytest.mark.server
def test_a_death_while_the_broker_is_away_is_told_when_it_is_back(
    redis_url: str, redis_server: RedisServer, programs: Programs
) -> None:
    site = Site(programs, redis_url)
    worker = site.worker(2)
    task_id = site.call("tasks.nap", "3", "x")
    victim = int(worker.program.line(r"napping x (\d+)").group(1))
    redis_server.stop()
    try:
        os.kill(victim, signal.SIGKILL)
        worker.program.line(f"process {victim} was killed")
    finally:
        redis_server.start()
    worker.program.line("napping x", times=2)
    assert site.result(task_id) == '"x"'
    assert worker.program.stop() == 0


# --- life ---------------------------------------------------------------------------------------


def test_a_process_that_c_code_holds_for_longer_than_its_lease_keeps_its_task(site: Site) -> None:
    worker = site.worker(2, lease=2.5, worker_loop_block_warning=None)
    task_id = site.call("tasks.hold", "7")
    holder = worker.program.line(r"holding (\d+)").group(1)
    worker.program.line("^held$")
    assert site.result(task_id) == holder
    assert len(re.findall("^holding", worker.program.output, re.MULTILINE)) == 1
    assert "under a new lease" not in worker.program.output
    assert worker.program.stop() == 0


def test_a_process_that_is_stopped_is_given_up_after_its_lease(site: Site) -> None:
    worker = site.worker(2, lease=2.0)
    task_id = site.call("tasks.nap", "3", "x")
    frozen = int(worker.program.line(r"napping x (\d+)").group(1))
    os.kill(frozen, signal.SIGSTOP)
    try:
        taker = int(worker.program.line(r"napping x (\d+)", times=2).group(1))
        assert taker != frozen
        assert site.result(task_id) == '"x"'
    finally:
        os.kill(frozen, signal.SIGCONT)
    worker.program.line("going on under a new lease")
    # The new lease is kept as well.
    here = worker.program.here
    site.call("tasks.nap", "2", "y")
    worker.program.line("napping y", after=here)
    assert worker.program.stop() == 0


# --- the keeper itself --------------------------------------------------------------------------


def test_a_keeper_that_died_is_replaced_and_knows_everything(site: Site) -> None:
    worker = site.worker(2)
    first = worker.keeper()
    os.kill(first, signal.SIGKILL)
    worker.program.line("the process that keeps the leases ended; starting another")
    wait_for(lambda: any(each.pid != first for each in worker.program.keepers()), "a new keeper")
    site.call("tasks.nap", "3", "x")
    victim = int(worker.program.line(r"napping x (\d+)").group(1))
    os.kill(victim, signal.SIGKILL)
    worker.program.line("napping x", times=2)
    assert worker.program.stop() == 0


def test_a_death_that_a_dead_keeper_was_told_of_is_told_to_the_next(local: Site) -> None:
    worker = local.worker(2)
    local.call("tasks.nap", "3", "x")
    victim = int(worker.program.line(r"napping x (\d+)").group(1))
    keeper = worker.keeper()
    os.kill(keeper, signal.SIGSTOP)  # so that it hears nothing
    os.kill(victim, signal.SIGKILL)
    worker.program.line(f"process {victim} was killed")
    os.kill(keeper, signal.SIGKILL)
    worker.program.line("napping x", times=2)
    assert worker.program.stop() == 0


def test_a_keeper_is_deaf_to_the_signals_that_end_a_worker(local: Site) -> None:
    worker = local.worker(1)
    keeper = worker.keeper()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(keeper, number)
    local.call("tasks.nap", "1", "x")
    worker.program.line("napping x")
    os.kill(worker.children[0], signal.SIGKILL)
    worker.program.line("gave 1 task back")
    assert worker.keeper() == keeper
    worker.program.line("napping x", times=2)
    assert worker.program.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_process_outlives_its_supervisor(site: Site, number: signal.Signals) -> None:
    worker = site.worker(2)
    everyone = worker.everyone()
    assert len(everyone) == 3
    worker.program.signal(number)
    wait_for(lambda: all(gone(pid) for pid in everyone), "all are gone")
    worker.program.wait()


def test_a_stopped_keeper_does_not_hold_the_supervisor(local: Site) -> None:
    worker = local.worker(1)
    keeper = worker.keeper()
    os.kill(keeper, signal.SIGSTOP)
    assert worker.program.stop() == 0
    assert gone(keeper)


# --- what wants to be replaced ------------------------------------------------------------------


def test_a_process_whose_event_loop_is_stuck_is_killed_and_its_task_runs_again(site: Site) -> None:
    worker = site.worker(2, worker_loop_block_limit=3)
    task_id = site.call("tasks.block")
    victim = worker.program.line(r"blocking (\d+)").group(1)
    worker.program.line(rf"process {victim} was killed, as its event loop had been stuck for")
    worker.program.line(rf"gave 1 task back: .*pid {victim} .* event loop had been stuck")
    taker = worker.program.line(r"blocking (\d+)", times=2).group(1)
    assert site.result(task_id) == taker != victim
    worker.program.line(r" ready$", times=3)
    assert worker.program.stop() == 0


def test_an_event_loop_that_runs_is_left_alone(local: Site) -> None:
    worker = local.worker(1, worker_loop_block_limit=4)
    assert local.call("tasks.nap", "6", "x", "--timeout", str(LONG)) == '"x"'
    assert worker.program.stop() == 0
    assert "stuck" not in worker.program.output


def test_a_process_that_grows_ends_its_tasks_while_a_sibling_goes_on(local: Site) -> None:
    worker = local.worker(2, "--max-memory-per-child", "200MB")
    task_id = local.call("tasks.swell", "4")
    grown = worker.program.line(r"swelling (\d+)").group(1)
    worker.program.line("more than .*: it is replaced")
    other = local.call("tasks.pid", "--timeout", str(LONG))
    assert other != grown
    assert other in map(str, worker.children)
    assert local.result(task_id) == grown
    worker.program.line(r" ready$", times=3)
    assert "handed back" not in worker.program.output
    assert "starting another" not in worker.program.output  # it did not die
    assert worker.program.stop() == 0


def test_a_process_with_a_stuck_task_is_replaced(local: Site) -> None:
    worker = local.worker(1, worker_max_stuck_tasks=1, task_cancel_grace=0.2)
    local.call("tasks.stubborn")
    worker.program.line("the process is replaced: 1 task")
    worker.program.line(r" ready$", times=2)
    assert local.call("tasks.add", "1", "2", "--timeout", str(LONG)) == "3"
    assert "starting another" not in worker.program.output
    assert worker.program.stop() == 0
