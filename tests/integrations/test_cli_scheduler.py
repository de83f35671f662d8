"""`aiotaskq scheduler` and `aiotaskq worker -B`, as a user meets them."""

from __future__ import annotations

import re
import signal

import pytest

from tests.integrations.programs import Programs

pytestmark = pytest.mark.timeout(400)

TASKS = """\
import time
from aiotaskq import TaskQueue, every
app = TaskQueue("tasks"{options})

@app.task(schedule=every(0.5))
async def look() -> int:
    {work}
    return 42
"""


@pytest.fixture
def programs(programs: Programs) -> Programs:
    write(programs)
    return programs


def write(programs: Programs, work: str = "pass", options: str = "", more: str = "") -> None:
    programs.write("tasks.py", TASKS.format(options=options, work=work) + more)


def assert_one_line(text: str, complaint: str) -> None:
    assert re.fullmatch(rf"aiotaskq: .*{complaint}.*\n", text), text


@pytest.mark.parametrize(
    "words", [("scheduler", "tasks:app"), ("beat", "tasks"), ("-A", "tasks", "beat", "-l", "info")]
)
def test_a_scheduler_says_what_it_runs_sends_it_and_ends_when_told(
    programs: Programs, words: tuple[str, ...]
) -> None:
    scheduler = programs.start(*words)
    scheduler.line(r"^\.> transport:   sqlite:///aiotaskq\.db$")
    scheduler.line(r"^  \. tasks\.look: every 0\.5 s, tasks\.look$")
    scheduler.line("scheduler ready")
    scheduler.line(r"sent tasks\.look\[tasks\.look@\d{4}-.*Z\] of tasks\.look$")
    assert scheduler.stop() == 0


def test_a_worker_with_a_scheduler_runs_what_is_due_though_its_tasks_block_the_loop(
    programs: Programs,
) -> None:
    write(programs, work="time.sleep(1.4)")
    worker = programs.start("worker", "tasks:app", "-B")
    worker.line("scheduler ready")
    # Two runs come due while one task keeps the loop from running: another thread sends them.
    worker.line(r"tasks\.look\[.*\] received")
    worker.line(r"sent tasks\.look\[.*\] of tasks\.look")
    worker.line(r"tasks\.look\[.*\] succeeded in .*: 42")
    assert worker.stop() == 0


def test_each_process_of_a_worker_may_die_and_the_schedules_go_on(programs: Programs) -> None:
    write(programs, work="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    worker = programs.start("worker", "tasks:app", "-B")
    worker.line("scheduler ready")
    worker.line("scheduler ready", times=2)
    assert worker.stop() == 0


@pytest.mark.parametrize(
    ("options", "more", "complaint"),
    [
        (', broker="memory://"', "", "memory:// is seen by one process only"),
        (
            "",
            'app.conf.beat_schedule = {"x": {"task": "tasks.look"}}',
            "beat_schedule.*: 'x': it has no 'schedule'",
        ),
        (
            "",
            'app.conf.beat_schedule = {"x": {"task": "tasks.look", "schedule": 9, "args": [1]}}',
            r"the schedule 'x': look\(\).*: too many positional arguments",
        ),
        (
            "",
            'app.conf.beat_schedule = {"tasks.look": {"task": "tasks.look", "schedule": 9}}',
            "the task of this name has a schedule of its own",
        ),
    ],
)
@pytest.mark.parametrize("words", [("scheduler", "tasks:app"), ("worker", "tasks:app", "-B")])
def test_a_mistake_in_what_is_declared_is_one_line(
    programs: Programs, words: tuple[str, ...], options: str, more: str, complaint: str
) -> None:
    write(programs, options=options, more=more)
    ended = programs.run(*words)
    assert ended.returncode == 2
    assert_one_line(ended.stderr, complaint)


def test_a_server_that_is_away_is_waited_for_or_not_as_the_settings_say(
    programs: Programs,
) -> None:
    away = {"AIOTASKQ_BROKER_URL": "redis://127.0.0.1:1/0", "AIOTASKQ_BROKER_PUBLISH_TIMEOUT": "0"}
    scheduler = programs.start("scheduler", "tasks:app", **away)
    scheduler.line("no runs can be sent now, trying again: redis://127.0.0.1:1/0")
    scheduler.signal(signal.SIGINT)
    assert scheduler.wait() == 0
    ended = programs.run(
        "scheduler", "tasks:app", **away, AIOTASKQ_BROKER_CONNECTION_RETRY_ON_STARTUP="no"
    )
    assert ended.returncode == 2
    assert_one_line(ended.stderr, "redis://127.0.0.1:1/0")
