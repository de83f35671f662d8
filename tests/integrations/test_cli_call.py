"""`aiotaskq call` and `aiotaskq result`, as a user meets them."""

from __future__ import annotations

import re

import pytest

from tests.integrations.programs import LONG, TASKS, Programs

pytestmark = pytest.mark.timeout(400)
IN_TIME = ("--timeout", str(LONG))


def test_call_and_wait(programs: Programs) -> None:
    programs.write(
        "tasks.py",
        TASKS.format(options="")
        + "\n@app.task\nasync def show(*args: object, **kwargs: object) -> list[object]:\n"
        "    return [list(args), kwargs]\n",
    )
    worker = programs.worker()
    assert programs.call("tasks.add", "2", "8", *IN_TIME) == "10"
    assert programs.call("tasks.add", "-k", "x=2", "-k", "y=3", *IN_TIME) == "5"
    shown = programs.call(
        "tasks.show", "text", '"7"', "7", "[1, null]", "true", "a b", "-k", 'k={"a": 1}', *IN_TIME
    )
    assert shown == '[["text","7",7,[1,null],true,"a b"],{"k":{"a":1}}]'
    assert programs.call("tasks.show", *IN_TIME, "--", "-5") == "[[-5],{}]"
    done = programs.run("-A", "tasks", "call", "tasks.add", "1", "1", "--wait")
    assert done.stdout == "2\n"
    assert worker.stop() == 0


def test_a_failed_task_is_status_1(programs: Programs) -> None:
    worker = programs.worker()
    done = programs.run("call", "tasks:app", "tasks.fail", "oh no", *IN_TIME)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "raise ValueError(text)" in done.stderr
    assert done.stderr.splitlines()[-1] == "FAILURE: ValueError: oh no"
    task_id = programs.call("tasks.fail", "again", "--task-id", "my-own-id")
    assert task_id == "my-own-id"
    worker.line("again")
    done = programs.run("result", "tasks:app", task_id, "--wait")
    assert done.returncode == 1
    assert worker.stop() == 0


def test_no_result_in_time_is_status_3(programs: Programs) -> None:
    done = programs.run("call", "tasks:app", "tasks.add", "1", "2", "--timeout", "0.1")
    assert done.returncode == 3
    assert re.fullmatch(r"aiotaskq: no result of \S+ after 0\.1 s\n", done.stderr)
    task_id = programs.call("tasks.add", "1", "2")
    done = programs.run("result", "tasks:app", task_id)
    assert (done.returncode, done.stderr) == (3, f"{task_id} is PENDING\n")
    done = programs.run("-A", "tasks:app", "result", task_id, "--timeout", "0.1")
    assert done.returncode == 3


def test_a_task_that_is_not_registered_is_sent_only_by_force(programs: Programs) -> None:
    done = programs.run("call", "tasks:app", "tasks.ad", "1")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "aiotaskq: tasks:app has no task 'tasks.ad'; did you mean 'tasks.add'? With --force"
    )
    assert programs.run("queues", "tasks:app").stdout.count("default") == 0
    done = programs.run(
        "call", "tasks:app", "elsewhere.job", "1", "--queue", "elsewhere", "--force"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"elsewhere\D+1\D+0", programs.run("queues", "tasks:app").stdout)
