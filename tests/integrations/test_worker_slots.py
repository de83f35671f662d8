"""Tasks in processes, and workers as real processes: each worker takes the tasks it can start."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.integrations.programs import TASKS, Program, Programs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

PROCESS_TASKS = (
    TASKS.format(options="")
    + """
from pathlib import Path
app.conf.update(worker_process_pool_size=1, worker_grace_period=30)

@app.task(executor="process")
def work(number: int) -> None:
    Path("started").open("a").write(f"{number}\\n")
    print("started", number, "attempt", current_task().attempt, flush=True)
    while not Path("gate").exists():
        time.sleep(0.02)

def send(*numbers: int, **options) -> None:
    for number in numbers:
        work.apply_async([number], **options)
"""
)


@pytest.fixture
def jobs(programs: Programs) -> Programs:
    programs.write("tasks.py", PROCESS_TASKS)
    return programs


def send(programs: Programs, numbers: str, options: str = "") -> None:
    programs.write("send.py", f"import tasks\ntasks.send({numbers}{options})\n")
    subprocess.run([sys.executable, "send.py"], cwd=programs.folder, check=True, timeout=60)


def started(worker: Program) -> list[int]:
    words = [line.split() for line in worker.lines if line.startswith("started ")]
    return [int(number) for _, number, _, _ in words]


def test_two_workers_share_tasks_that_need_processes(jobs: Programs) -> None:
    first, second = jobs.worker(), jobs.worker()
    send(jobs, "*range(12)")
    first.line("^started ")
    second.line("^started ")
    assert len(started(first)) == len(started(second)) == 1
    send(jobs, "99", ", priority=9")
    jobs.write("gate", "")
    wait_for(lambda: len((jobs.folder / "started").read_text().split()) == 13, "all started")
    for worker in (first, second):
        assert worker.stop() == 0
    order = [int(line) for line in (jobs.folder / "started").read_text().split()]
    assert sorted(order) == [*range(12), 99]
    # Right after those that ran when it was sent, and those that a worker had in hand just then.
    assert order.index(99) < 7


def test_sigterm_hands_back_at_once_what_has_not_started(jobs: Programs) -> None:
    first = jobs.worker()
    send(jobs, "*range(8)")
    first.line("^started 0 attempt 1$")
    first.signal(signal.SIGTERM)
    first.line(r"stopping: what runs gets 30 s to finish \(1\)")
    second = jobs.worker()
    second.line("^started 1 attempt 1$")
    jobs.write("gate", "")
    second.line("^started 7 attempt 1$")
    assert first.wait() == 0
    assert second.stop() == 0
    assert (started(first), started(second)) == ([0], [1, 2, 3, 4, 5, 6, 7])
