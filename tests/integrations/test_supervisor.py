"""Worker processes under their supervisor: real processes, real signals."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.integrations.programs import LONG, TASKS, Program, Programs, gone, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


def pids(worker: Program, count: int) -> list[int]:
    """Return the pids of the children, once there are as many and all are ready."""
    wait_for(lambda: len(worker.children()) == count, f"{count} children")
    return sorted(child.pid for child in worker.children())


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_ends_it_with_status_0(programs: Programs, number: signal.Signals) -> None:
    worker = programs.worker("tasks:app", "-w", "2")
    worker.line(r" ready$", times=2)
    children = pids(worker, 2)
    worker.signal(number)
    assert worker.wait() == 0
    assert all(gone(pid) for pid in children)
    assert "Traceback" not in worker.output


def test_running_tasks_finish_first(programs: Programs) -> None:
    worker = programs.worker()
    task_id = programs.call("tasks.nap", "1.5", "done")
    worker.line("napping done")
    worker.signal(signal.SIGTERM)
    worker.line(r"stopping: what runs gets 25 s to finish \(1\)")
    assert worker.wait() == 0
    assert programs.run("result", "tasks:app", task_id).stdout == '"done"\n'


def test_a_second_signal_hands_back_what_runs(programs: Programs) -> None:
    worker = programs.worker()
    task_id = programs.call("tasks.nap", "3600", "long")
    worker.line("napping long")
    worker.signal(signal.SIGTERM)
    worker.line("stopping: what runs gets")
    worker.signal(signal.SIGTERM)
    worker.line("stopping now")
    worker.line("handed back unfinished")
    assert worker.wait() == 0
    assert "is PENDING" in programs.run("result", "tasks:app", task_id).stderr
    again = programs.worker()
    again.line(r"napping long \d+ 1$")  # the same attempt
    again.signal(signal.SIGTERM)
    again.signal(signal.SIGTERM)
    again.close()


def test_a_signal_while_a_child_imports_ends_it_at_once(programs: Programs) -> None:
    programs.write("slow.py", "import time\nprint('importing', flush=True)\ntime.sleep(3600)\n")
    worker = programs.start("worker", "slow:app")
    worker.line("importing")
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 20  # the supervisor would kill it after 30


def test_a_task_that_ignores_its_cancellation_does_not_hold_the_process(
    programs: Programs,
) -> None:
    programs.write(
        "stubborn.py",
        TASKS.format(options="")
        + """
@app.task
async def stubborn() -> None:
    print("begun", flush=True)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

@app.task
async def threaded() -> None:
    print("threaded", flush=True)
    await asyncio.to_thread(time.sleep, 3600)
""",
    )
    worker = programs.worker("stubborn:app", "--grace-period", "0")
    for name in ("stubborn", "threaded"):
        programs.run("call", "stubborn:app", f"stubborn.{name}")
    worker.line("begun")
    worker.line("threaded")
    assert worker.stop() == 0
    assert "does not end, killing it" not in worker.output
    shown = programs.run("queues", "stubborn:app").stdout
    assert re.search(r"default\D+2\D+0\D+0\D+0", shown), shown


# --- deaths -------------------------------------------------------------------------------------


def test_a_child_that_is_killed_is_replaced_and_its_task_runs_again(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "-w", "3")
    worker.line(r" ready$", times=3)
    before = pids(worker, 3)
    task_id = programs.call("tasks.nap", "2", "x")
    victim = int(worker.line(r"napping x (\d+)").group(1))
    assert victim in before
    os.kill(victim, signal.SIGKILL)
    worker.line(rf"worker process {victim} was killed by signal 9 \(Killed\)")
    worker.line(r" ready$", times=4)
    after = pids(worker, 3)
    assert victim not in after
    assert len(set(before) & set(after)) == 2
    worker.line(r"napping x \d+ 1", times=2)
    done = programs.run("result", "tasks:app", task_id, "--timeout", str(LONG))
    assert done.stdout == '"x"\n'
    assert worker.stop() == 0


def test_a_child_that_somebody_else_stops_is_replaced(programs: Programs) -> None:
    worker = programs.worker("tasks:app")
    worker.line(r" ready$")
    [first] = pids(worker, 1)
    os.kill(first, signal.SIGTERM)
    worker.line(rf"worker process {first} ended with exit status 0; starting another")
    worker.line(r" ready$", times=2)
    assert worker.stop() == 0


def test_children_end_soon_when_the_supervisor_is_killed(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "-w", "2")
    worker.line(r" ready$", times=2)
    children = pids(worker, 2)
    programs.call("tasks.nap", "3600", "x")
    worker.line("napping x")
    began = time.monotonic()
    worker.signal(signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in children), "the children are gone")
    took = time.monotonic() - began
    worker.wait()
    assert took < 10, worker.output
    shown = programs.run("queues", "tasks:app").stdout
    assert re.search(r"default\D+1\D+0\D+0\D+0", shown), shown  # handed back


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
    (pid,) = pids(frozen, 1)
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


# --- limits -------------------------------------------------------------------------------------


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


def test_a_burst_of_several_processes_ends_by_itself(programs: Programs) -> None:
    for n in range(3):
        programs.call("tasks.add", str(n), "1")
    worker = programs.start("worker", "tasks:app", "--burst", "-w", "3")
    assert worker.wait() == 0
    assert len(re.findall(r"succeeded in [\d.]+s: \d", worker.output)) == 3
    assert len(re.findall(r" ready$", worker.output, re.MULTILINE)) == 3
    assert "died" not in worker.output


# --- reload -------------------------------------------------------------------------------------


def test_changed_code_runs_and_a_mistake_waits_for_the_next_change(programs: Programs) -> None:
    code = (
        "from aiotaskq import TaskQueue\napp = TaskQueue('t')\n"
        "@app.task\nasync def say() -> str:\n    return {!r}\n"
    )
    programs.write("live.py", code.format("first"))
    worker = programs.worker("live:app", "--reload")

    def said() -> str:
        return programs.run("call", "live:app", "live.say", "--timeout", str(LONG)).stdout.strip()

    assert said() == '"first"'
    here = worker.here
    programs.write("live.py", code.format("second"))
    worker.line("a file changed", after=here)
    worker.line(r" ready$", after=here)
    assert said() == '"second"'

    here = worker.here
    programs.write("live.py", "def broken(:\n")
    worker.line(r"SyntaxError: .*live\.py, line 1\)", after=here)
    worker.line("waiting for a change", after=here)
    assert worker.process.poll() is None
    programs.write("live.py", code.format("third"))
    worker.line(r" ready$", after=here)
    assert said() == '"third"'
    assert worker.stop() == 0


def test_a_mistake_is_said_once_by_each_process_though_old_ones_still_run(
    programs: Programs,
) -> None:
    worker = programs.worker("tasks:app", "--reload", "-w", "3")
    worker.line(r" ready$", times=3)
    programs.call("tasks.nap", "3", "x")
    worker.line("napping x")
    programs.write("tasks.py", "1 / 0\n")
    worker.line(r"Task tasks\.nap.* succeeded")  # it had its grace period
    worker.line("waiting for a change", times=3)
    assert worker.stop() == 0
    assert worker.output.count("ZeroDivisionError") == 3


def test_a_reloading_worker_that_waits_for_a_change_can_be_stopped(programs: Programs) -> None:
    programs.write("live.py", "1 / 0\n")
    worker = programs.start("worker", "live:app", "--reload")
    worker.line("waiting for a change")
    assert worker.stop() == 0


def test_the_signals_of_a_terminal_reach_all_and_end_it_quietly(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "--reload", "-w", "2")
    worker.line(r" ready$", times=2)
    os.killpg(worker.pid, signal.SIGINT)  # as Ctrl-C does
    assert worker.wait() == 0
    assert "Traceback" not in worker.output
    assert "KeyboardInterrupt" not in worker.output


def test_nobody_watches_on_when_a_reloading_supervisor_is_killed(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "--reload")
    import psutil

    below = [p.pid for p in psutil.Process(worker.pid).children(recursive=True)]
    worker.signal(signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in below), "all are gone")
    worker.wait()
