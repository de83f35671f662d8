"""Workers that are told to stop: real processes, real signals."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.integrations.programs import TASKS, Programs, gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_ends_it_with_status_0(programs: Programs, number: signal.Signals) -> None:
    worker = programs.worker("tasks:app", "-w", "2")
    worker.line(r" ready$", times=2)
    children = worker.worker_pids(2)
    worker.signal(number)
    assert worker.wait() == 0
    assert all(gone(pid) for pid in children)
    assert "Traceback" not in worker.output


def test_the_signals_of_a_terminal_reach_all_and_end_it_quietly(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "--reload", "-w", "2")
    worker.line(r" ready$", times=2)
    os.killpg(worker.pid, signal.SIGINT)  # as Ctrl-C does
    assert worker.wait() == 0
    assert "Traceback" not in worker.output
    assert "KeyboardInterrupt" not in worker.output


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


@pytest.mark.parametrize("command", ["worker", "scheduler"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_signals_until_the_process_has_ended_do_not_change_its_exit_status(
    programs: Programs, command: str, number: signal.Signals
) -> None:
    program = programs.start(command, "tasks:app")
    program.line(r"ready$")
    program.signal(number)
    program.line("stopping")
    while program.process.poll() is None:
        program.signal(number)
        time.sleep(0.0005)
    assert program.wait() == 0
    assert "Traceback" not in program.output


def test_a_signal_while_a_child_imports_ends_it_at_once(programs: Programs) -> None:
    programs.write("slow.py", "import time\nprint('importing', flush=True)\ntime.sleep(3600)\n")
    worker = programs.start("worker", "slow:app")
    worker.line("importing")
    assert worker.stop() == 0
    assert "killing it" not in worker.output  # as the supervisor does after a while


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
