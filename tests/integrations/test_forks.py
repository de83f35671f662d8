"""Worker processes whose tasks fork: signals, deaths and orphans. Real processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.integrations.programs import LONG, Program, Programs, gone, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

TASKS = """\
import asyncio, multiprocessing, os, subprocess, sys, time
from aiotaskq import TaskQueue, current_task
app = TaskQueue("tasks", worker_lease=4000.0, worker_heartbeat=0.5{options})

def sleep() -> None:
    time.sleep(3600)

def stopped(method: str) -> list[int | None]:
    context = multiprocessing.get_context(method)
    process = context.Process(target=sleep)
    process.start()
    process.terminate()
    process.join()
    with context.Pool(2) as pool:
        return [process.exitcode, *pool.map(abs, [-1, -2])]

def fork(seconds: float = 3600) -> int:
    child = os.fork()
    if child == 0:
        time.sleep(seconds)
        os._exit(0)
    return child

@app.task
async def in_loop() -> list[int | None]:
    return stopped("fork")

@app.task
def in_thread() -> list[int | None]:
    return stopped("fork")

@app.task(executor="process")
def in_process() -> list[int | None]:
    return stopped("fork")

@app.task
async def nap(seconds: float) -> int:
    child = fork()
    print("forked", os.getpid(), child, flush=True)
    await asyncio.sleep(seconds)
    return os.getpid()

@app.task
def nap_in_thread(seconds: float) -> int:
    child = fork()
    print("forked", os.getpid(), child, flush=True)
    time.sleep(seconds)
    return os.getpid()

@app.task(executor="process")
def nap_in_process(seconds: float) -> int:
    child = fork()
    print("forked", os.getpid(), child, flush=True)
    time.sleep(seconds)
    return os.getpid()

@app.task
def start(apart: bool) -> int:
    command = [sys.executable, "-c", "import time; time.sleep(3600)"]
    return subprocess.Popen(command, start_new_session=apart).pid

@app.task(executor="process", timeout=1)
def hang() -> None:
    child = fork()
    print("forked", os.getpid(), child, flush=True)
    time.sleep(3600)

@app.task
async def pid() -> int:
    return os.getpid()
"""


@pytest.fixture
def forked() -> Iterator[list[int]]:
    """Pids of children, which are killed after the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def work(programs: Programs, *arguments: str, url: str | None = None, **options: object) -> Program:
    shown = "".join(f", {name}={value!r}" for name, value in options.items())
    programs.write("tasks.py", TASKS.format(options=shown))
    more = {} if url is None else {"AIOTASKQ_BROKER_URL": url}
    return programs.worker("tasks:app", *arguments, **more)


def call(programs: Programs, name: str, *arguments: str) -> object:
    return json.loads(programs.call(f"tasks.{name}", *arguments, "--timeout", str(LONG)))


def test_a_child_that_a_task_ends_ends_alone(programs: Programs) -> None:
    worker = work(programs)
    for name in ("in_loop", "in_thread", "in_process"):
        assert call(programs, name) == [-signal.SIGTERM, 1, 2]
    assert worker.stop() == 0
    assert worker.output.count(" ready\n") == 1  # no process was stopped or replaced
    assert worker.output.count("stopping") == 1


@pytest.mark.parametrize(
    ("broker", "name"),
    [
        ("sqlite", "nap"),
        pytest.param("redis", "nap_in_thread", marks=pytest.mark.server),
        pytest.param("postgres", "nap", marks=pytest.mark.server),
        pytest.param("rabbitmq", "nap_in_thread", marks=pytest.mark.server),
    ],
)
def test_a_worker_that_is_killed_is_replaced_at_once_while_a_fork_of_it_lives(
    programs: Programs,
    forked: list[int],
    request: pytest.FixtureRequest,
    broker: str,
    name: str,
) -> None:
    url = None
    options: dict[str, object] = {"worker_end_orphans": False, "prefix": f"t{os.getpid()}"}
    if broker == "rabbitmq":
        url = request.getfixturevalue("rabbit_server").url()
        options["result_backend"] = "sqlite:///results.db"
    elif broker != "sqlite":
        url = request.getfixturevalue(f"{broker}_url")
    worker = work(programs, url=url, **options)
    arguments = ("call", "tasks:app", f"tasks.{name}", "0.5")
    more = {} if url is None else {"AIOTASKQ_BROKER_URL": url}
    task_id = programs.run(*arguments, **more).stdout.strip()
    first = worker.line(r"forked (\d+) (\d+)")
    forked.append(int(first.group(2)))
    os.kill(int(first.group(1)), signal.SIGKILL)
    worker.line("was killed by signal 9")
    second = worker.line(r"forked (\d+) (\d+)", times=2)
    forked.append(int(second.group(2)))
    done = programs.run("result", "tasks:app", task_id, "--timeout", str(LONG), **more)
    assert done.stdout.strip() == second.group(1)
    assert not gone(forked[0])
    worker.signal(signal.SIGTERM)
    assert worker.process.wait(LONG) == 0  # though forks hold what it held
    for pid in forked:
        os.kill(pid, signal.SIGKILL)
    worker.wait()


def test_the_death_of_a_process_of_the_pool_is_seen_while_a_fork_of_it_lives(
    programs: Programs, forked: list[int]
) -> None:
    worker = work(programs, worker_end_orphans=False)
    task_id = programs.call("tasks.nap_in_process", "3600")
    found = worker.line(r"forked (\d+) (\d+)")
    forked.append(int(found.group(2)))
    os.kill(int(found.group(1)), signal.SIGKILL)
    done = programs.run("result", "tasks:app", task_id, "--timeout", str(LONG))
    assert "ended under it, by signal 9" in done.stderr
    assert not gone(forked[0])
    worker.signal(signal.SIGTERM)
    assert worker.process.wait(LONG) == 0


@pytest.mark.parametrize("how", ["max tasks", "reload"])
def test_a_process_is_replaced_while_a_fork_of_it_lives(
    programs: Programs, forked: list[int], how: str
) -> None:
    option = ("--max-tasks-per-child", "1") if how == "max tasks" else ("--reload",)
    worker = work(programs, *option, worker_end_orphans=False)
    here = worker.here
    first = call(programs, "nap_in_thread", "0")
    forked.append(int(worker.line(rf"forked {first} (\d+)").group(1)))
    if how == "reload":
        programs.write("tasks.py", TASKS.format(options=""))
    worker.line(r" ready$", after=here)
    assert call(programs, "pid") != first
    assert not gone(forked[0])
    worker.signal(signal.SIGTERM)
    assert worker.process.wait(LONG) == 0


def test_what_a_worker_process_leaves_behind_ends_with_it(
    programs: Programs, forked: list[int]
) -> None:
    worker = work(programs)
    apart = call(programs, "start", "true")
    left = call(programs, "start", "false")
    assert isinstance(apart, int)
    assert isinstance(left, int)
    forked.append(apart)
    programs.call("tasks.nap_in_process", "3600")
    found = worker.line(r"forked (\d+) (\d+)")
    in_pool = [int(found.group(1)), int(found.group(2))]
    [killed] = worker.worker_pids(1)
    os.kill(killed, signal.SIGKILL)
    worker.line(f"that worker process {killed} has left behind")
    wait_for(lambda: all(gone(pid) for pid in [left, *in_pool]), "all are gone")
    assert not gone(apart)  # it has a session of its own
    worker.line(r" ready$", times=2)
    other = call(programs, "start", "false")
    assert isinstance(other, int)
    worker.signal(signal.SIGTERM)
    worker.line("Again to stop at once")
    worker.signal(signal.SIGINT)
    assert worker.process.wait(LONG) == 0
    assert gone(other)


def test_children_of_a_process_task_end_with_its_timeout(programs: Programs) -> None:
    worker = work(programs)
    programs.call("tasks.hang")
    found = worker.line(r"forked (\d+) (\d+)")
    wait_for(lambda: all(gone(int(found.group(n))) for n in (1, 2)), "both are gone")
    assert worker.stop() == 0
