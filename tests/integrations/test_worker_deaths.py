"""Worker processes that die or stand still, and supervisors that die: real processes."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.integrations.programs import LONG, TASKS, Programs, gone, wait_for
from tests.integrations.sites import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_child_that_is_killed_is_replaced_and_its_task_runs_again(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "-w", "3")
    worker.line(r" ready$", times=3)
    before = worker.worker_pids(3)
    task_id = programs.call("tasks.nap", "2", "x")
    victim = int(worker.line(r"napping x (\d+)").group(1))
    assert victim in before
    os.kill(victim, signal.SIGKILL)
    worker.line(rf"worker process {victim} was killed by signal 9 \(Killed\)")
    worker.line(r" ready$", times=4)
    after = worker.worker_pids(3)
    assert victim not in after
    assert len(set(before) & set(after)) == 2
    worker.line(r"napping x \d+ 1", times=2)
    done = programs.run("result", "tasks:app", task_id, "--timeout", str(LONG))
    assert done.stdout == '"x"\n'
    assert worker.stop() == 0


def test_a_child_that_somebody_else_stops_is_replaced(programs: Programs) -> None:
    worker = programs.worker("tasks:app")
    worker.line(r" ready$")
    [first] = worker.worker_pids(1)
    os.kill(first, signal.SIGTERM)
    worker.line(rf"worker process {first} ended with exit status 0; starting another")
    worker.line(r" ready$", times=2)
    assert worker.stop() == 0


def test_a_lifespan_that_fails_ends_it_and_is_not_tried_forever(programs: Programs) -> None:
    programs.write(
        "tasks.py",
        TASKS.format(options="")
        + """
@app.on_startup
async def up(state) -> None:
    raise LookupError("no database")
""",
    )
    worker = programs.start("worker", "tasks:app", "-w", "3")
    assert worker.wait() == 1
    assert worker.output.count("LookupError: no database") == 1
    assert "ended with exit status 1 at its start" in worker.output


def test_a_process_that_was_frozen_goes_on_under_a_new_lease(programs: Programs) -> None:
    programs.write(
        "tasks.py",
        TASKS.format(options=", worker_lease=2.0, worker_heartbeat=0.5")
        + """
@app.task
async def work(marker: str) -> int:
    print("working", os.getpid(), flush=True)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        time.sleep(0.01)
    return os.getpid()
""",
    )
    frozen = programs.worker()
    (pid,) = frozen.worker_pids(1)
    task_id = programs.call("tasks.work", "x")
    frozen.line(f"working {pid}")
    os.kill(pid, signal.SIGSTOP)
    try:
        other = programs.worker()
        taker = int(other.line(r"working (\d+)").group(1))
        done = programs.run("result", "tasks:app", task_id, "--timeout", str(LONG))
        assert done.stdout == f"{taker}\n"
    finally:
        os.kill(pid, signal.SIGCONT)
    frozen.line("going on under a new lease")
    frozen.line("came too late and was dropped")
    assert other.stop() == 0
    assert programs.call("tasks.add", "1", "2", "--timeout", str(LONG)) == "3"
    assert programs.run("result", "tasks:app", task_id).stdout == f"{taker}\n"
    assert frozen.stop() == 0


def test_children_end_soon_when_the_supervisor_is_killed(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "-w", "2")
    worker.line(r" ready$", times=2)
    children = worker.worker_pids(2)
    programs.call("tasks.nap", "3600", "x")
    worker.line("napping x")
    worker.signal(signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in children), "the children are gone")
    worker.wait()
    shown = programs.run("queues", "tasks:app").stdout
    assert re.search(r"default\D+1\D+0\D+0\D+0", shown), shown  # handed back


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_process_outlives_its_supervisor(site: Site, number: signal.Signals) -> None:
    worker = site.worker(2)
    everyone = worker.all_pids()
    assert len(everyone) == 3
    worker.signal(number)
    wait_for(lambda: all(gone(pid) for pid in everyone), "all are gone")
    worker.wait()
