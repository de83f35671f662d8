"""`aiotaskq worker --reload`: the effect of changed files."""

from __future__ import annotations

import signal

import psutil
import pytest

from tests.integrations.programs import LONG, Programs, gone, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


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


def test_nobody_watches_on_when_a_reloading_supervisor_is_killed(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "--reload")
    below = [p.pid for p in psutil.Process(worker.pid).children(recursive=True)]
    worker.signal(signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in below), "all are gone")
    worker.wait()
