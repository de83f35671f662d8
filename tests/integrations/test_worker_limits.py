"""Worker processes that reach a limit and are replaced: tasks, memory, stuck tasks and loops."""

from __future__ import annotations

import pytest

from tests.integrations.programs import LONG, TASKS, Programs
from tests.integrations.sites import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_process_is_replaced_after_so_many_tasks(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "--max-tasks-per-child", "2")
    seen = [int(programs.call("tasks.pid", "--timeout", str(LONG))) for _ in range(5)]
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
    assert worker.stop() == 0
    assert "died" not in worker.output


def test_a_process_that_grows_is_replaced(programs: Programs) -> None:
    programs.write(
        "tasks.py",
        TASKS.format(options="")
        + """
kept = []
@app.task
async def grow() -> int:
    kept.append(bytearray(os.urandom(1024)) * 300_000)
    return os.getpid()
""",
    )
    worker = programs.worker("tasks:app", "--max-memory-per-child", "250MB")
    before = int(programs.call("tasks.grow", "--timeout", str(LONG)))
    worker.line("more than .*: it is replaced")
    after = int(programs.call("tasks.pid", "--timeout", str(LONG)))
    assert before != after
    assert worker.stop() == 0


def test_a_process_that_grows_ends_its_tasks_while_a_sibling_goes_on(local: Site) -> None:
    worker = local.worker(2, "--max-memory-per-child", "200MB")
    before = worker.worker_pids(2)
    task_id = local.call("tasks.swell", "4")
    grown = worker.line(r"swelling (\d+)").group(1)
    worker.line("more than .*: it is replaced")
    other = local.call("tasks.pid", "--timeout", str(LONG))
    assert other != grown
    assert other in map(str, before)
    assert local.result(task_id) == grown
    worker.line(r" ready$", times=3)
    assert "handed back" not in worker.output
    assert "starting another" not in worker.output  # it did not die
    assert worker.stop() == 0


def test_a_process_with_a_stuck_task_is_replaced(local: Site) -> None:
    worker = local.worker(1, worker_max_stuck_tasks=1, task_cancel_grace=0.2)
    local.call("tasks.stubborn")
    worker.line("the process is replaced: 1 task")
    worker.line(r" ready$", times=2)
    assert local.call("tasks.add", "1", "2", "--timeout", str(LONG)) == "3"
    assert "starting another" not in worker.output
    assert worker.stop() == 0


def test_a_process_whose_event_loop_is_stuck_is_killed_and_its_task_runs_again(site: Site) -> None:
    worker = site.worker(2, worker_loop_block_limit=3)
    task_id = site.call("tasks.block")
    victim = worker.line(r"blocking (\d+)").group(1)
    worker.line(rf"process {victim} was killed, as its event loop had been stuck for")
    # The sibling may have looked before the lease keeper had ended the lease.
    gave = rf"gave 1 task back: .*pid {victim} .* event loop had been stuck"
    worker.line(f"{gave}|took 1 task back from workers that died")
    taker = worker.line(r"blocking (\d+)", times=2).group(1)
    assert site.result(task_id) == taker != victim
    worker.line(r" ready$", times=3)
    assert worker.stop() == 0


def test_an_event_loop_that_runs_is_left_alone(local: Site) -> None:
    worker = local.worker(1, worker_loop_block_limit=4)
    assert local.call("tasks.nap", "6", "x", "--timeout", str(LONG)) == '"x"'
    assert worker.stop() == 0
    assert "stuck" not in worker.output
