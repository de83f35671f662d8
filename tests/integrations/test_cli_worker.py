"""`aiotaskq worker`, as a user meets it: its output, and the queues it serves."""

from __future__ import annotations

import re
import socket

import pytest

from tests.integrations.programs import TASKS, Programs
from tests.servers import free_port

pytestmark = pytest.mark.timeout(400)


# --- output ---------------------------------------------------------------------------------------


def test_the_banner(programs: Programs) -> None:
    programs.write(
        "tasks.py",
        TASKS.format(
            options=", broker='sqlite:///q.db', backend='postgresql://me:secret@127.0.0.1:1/results'"
        ),
    )
    words = ("-c", "7", "-Q", "critical,default", "-n", "worker@%h", "-w", "2", "--threads", "3")
    worker = programs.start("worker", "tasks:app", *words)
    worker.line(r"cannot begin, trying again: ")
    assert worker.stop() == 0
    banner = worker.output
    host = socket.gethostname()
    assert f"on worker@{host}-1" in banner
    assert re.search(r"app: +tasks \(tasks:app\)", banner)
    assert re.search(r"transport: +sqlite:///q\.db", banner)
    assert re.search(r"results: +postgresql://me:\*+@127\.0\.0\.1:1/results", banner) or re.search(
        r"results: +postgresql://\S*127\.0\.0\.1:1/results", banner
    )
    assert re.search(r"concurrency: +7 tasks at once, 3 threads, 2 processes", banner)
    queues = banner.index("[queues]")
    assert queues < banner.index(". critical") < banner.index(". default") < banner.index("[tasks]")
    for name in ("tasks.add", "tasks.fail", "tasks.nap"):
        assert f". {name}\n" in banner
    assert "secret" not in banner


def test_the_banner_tells_which_tasks_go_elsewhere(programs: Programs) -> None:
    programs.write(
        "routed.py",
        "from aiotaskq import TaskQueue\napp = TaskQueue('r')\n"
        "@app.task(queue='reports')\nasync def render() -> None: ...\n"
        "@app.task\nasync def add() -> None: ...\n",
    )
    worker = programs.worker("routed:app")
    worker.line(r" ready$")
    assert "  . routed.render  (goes to reports, which is not served here)" in worker.output
    assert "  . routed.add\n" in worker.output
    assert worker.stop() == 0


def test_the_lines_of_a_task(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "-n", "me@%h")
    worker.line(rf"me@{re.escape(socket.gethostname())} ready$")
    task_id = programs.call("tasks.add", "2", "8")
    worker.line(rf"INFO/.*Task tasks\.add\[{task_id}\] received")
    worker.line(rf"INFO/.*Task tasks\.add\[{task_id}\] succeeded in \d+\.\d+s: 10")
    task_id = programs.call("tasks.fail", "oh")
    worker.line(rf"ERROR/.*Task tasks\.fail\[{task_id}\] raised after .*ValueError\('oh'\)")
    worker.line(r"^Traceback")
    assert worker.stop() == 0


def test_the_log_level_decides_what_is_said(programs: Programs) -> None:
    worker = programs.start("worker", "tasks:app", "-l", "ERROR", "--burst")
    programs.call("tasks.add", "2", "8")
    assert worker.wait() == 0
    programs.call("tasks.add", "2", "8")
    programs.call("tasks.fail", "oh")
    worker = programs.start("worker", "tasks:app", "-l", "ERROR", "--burst")
    assert worker.wait() == 0
    assert "received" not in worker.output
    assert "ready" not in worker.output
    assert "ValueError" in worker.output


def test_a_server_out_of_reach_is_waited_for_and_the_worker_can_be_stopped(
    programs: Programs,
) -> None:
    programs.write(
        "tasks.py", TASKS.format(options=f", broker='redis://127.0.0.1:{free_port()}/0'")
    )
    worker = programs.start("worker", "tasks:app")
    worker.line(r"cannot begin, trying again: ")
    assert worker.stop() == 0
    assert "Traceback" not in worker.output


# --- queues ---------------------------------------------------------------------------------------


def test_queues_are_drained_in_their_order(programs: Programs) -> None:
    for queue in ("low", "high", "other"):
        programs.call("tasks.nap", "0", queue, "--queue", queue)
    worker = programs.start("worker", "tasks:app", "-Q", "high,low", "-c", "1", "--burst")
    assert worker.wait() == 0
    assert re.findall(r"^napping (\w+)", worker.output, re.MULTILINE) == ["high", "low"]


def test_queues_with_weights_share_the_worker(programs: Programs) -> None:
    for queue in ("low", "high", "ns:any"):
        for _ in range(2):
            programs.call("tasks.nap", "0", queue, "--queue", queue)
    words = ("-Q", "low:1,high:2,ns:any:1", "-c", "1", "--burst")
    worker = programs.start("worker", "tasks:app", *words)
    assert worker.wait() == 0
    order = re.findall(r"^napping (\S+)", worker.output, re.MULTILINE)
    assert order[:4] == ["high", "low", "ns:any", "high"]
    assert sorted(order) == sorted(["low", "high", "ns:any"] * 2)
    assert "  . low  (weight 1 of 4)\n  . high  (weight 2 of 4)\n" in worker.output
    assert "  . ns:any  (weight 1 of 4)\n" in worker.output


def test_a_colon_without_a_number_behind_it_is_part_of_a_queues_name(programs: Programs) -> None:
    programs.call("tasks.nap", "0", "here", "--queue", "ns:high")
    worker = programs.start("worker", "tasks:app", "-Q", "ns:high,low", "-c", "1", "--burst")
    assert worker.wait() == 0
    assert "napping here" in worker.output
    assert "  . ns:high\n  . low\n" in worker.output


def test_a_burst_of_several_processes_ends_by_itself(programs: Programs) -> None:
    for n in range(3):
        programs.call("tasks.add", str(n), "1")
    worker = programs.start("worker", "tasks:app", "--burst", "-w", "3")
    assert worker.wait() == 0
    assert len(re.findall(r"succeeded in [\d.]+s: \d", worker.output)) == 3
    assert len(re.findall(r" ready$", worker.output, re.MULTILINE)) == 3
    assert "died" not in worker.output
