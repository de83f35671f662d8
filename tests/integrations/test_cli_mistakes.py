"""Mistakes in the command or the set-up: one line on stderr, and exit status 2."""

from __future__ import annotations

import re

import pytest

from tests.integrations.programs import TASKS, Programs
from tests.servers import free_port

pytestmark = pytest.mark.timeout(400)


MISTAKES: dict[str, tuple[dict[str, str], list[str], str]] = {
    "no app": ({}, ["worker"], r"which application\?"),
    "no such module": ({}, ["worker", "nothing:app"], r"no module 'nothing' in /"),
    "no such submodule": ({}, ["worker", "tasks.more:app"], r"no module 'tasks.more'"),
    "no such app": ({}, ["worker", "tasks:nothing"], r"tasks has no 'nothing'; it has tasks:app"),
    "no name": ({}, ["worker", "tasks:"], r"'tasks:' names no application"),
    "no module": ({}, ["worker", ":app"], r"':app' names no application"),
    "no queue object": ({}, ["worker", "tasks:add"], r"is a CoroutineTask and no TaskQueue"),
    "none in it": ({"m.py": ""}, ["worker", "m"], r"there is no TaskQueue in m"),
    "none in the package": (
        {"p/__init__.py": "", "p/tasks.py": ""},
        ["worker", "p"],
        r"there is no TaskQueue in p",
    ),
    "several": (
        {"m.py": "from tasks import TaskQueue\na = TaskQueue('a')\nb = TaskQueue('b')\n"},
        ["worker", "m"],
        r"m has several: say m:a or m:b",
    ),
    "missing import": (
        {"m.py": "import os\nimport nowhere.at_all\n"},
        ["worker", "m:app"],
        r"importing m fails: ModuleNotFoundError: No module named 'nowhere' \(/.*m\.py, line 2\)",
    ),
    "error inside": (
        {"m.py": "def f():\n    return 1 / 0\nf()\n"},
        ["worker", "m:app"],
        r"importing m fails: ZeroDivisionError: division by zero \(/.*m\.py, line 2\)",
    ),
    "error in the standard library": (
        {"m.py": "import json\n\njson.loads('{')\n"},
        ["worker", "m:app"],
        r"importing m fails: JSONDecodeError: .*m\.py, line 3\)",
    ),
    "error in the package": (
        {"p/__init__.py": "", "p/tasks.py": "1 / 0\n"},
        ["worker", "p"],
        r"importing p\.tasks fails: ZeroDivisionError: .*tasks\.py, line 1\)",
    ),
    "syntax error": (
        {"m.py": "x = 1\ndef (:\n"},
        ["worker", "m:app"],
        r"importing m fails: SyntaxError: .*\(/.*m\.py, line 2\)",
    ),
    "exit inside": (
        {"m.py": "import sys\nsys.exit('bye')\n"},
        ["worker", "m:app"],
        r"importing m fails: SystemExit: bye \(/.*m\.py, line 2\)",
    ),
    "error of many lines": (
        {"m.py": "raise ValueError('one\\ntwo\\n\\nthree')\n"},
        ["worker", "m:app"],
        r"importing m fails: ValueError: one two three \(",
    ),
    "wrong setting": (
        {"m.py": "from aiotaskq import TaskQueue\n\napp = TaskQueue('a', result_expire=1)\n"},
        ["worker", "m:app"],
        r"importing m fails: .*result_expire.*\(/.*m\.py, line 3\)",
    ),
    "duplicate task": (
        {
            "m.py": "from tasks import app\n"
            "@app.task(name='x')\nasync def a() -> None: ...\n"
            "@app.task(name='x')\nasync def b() -> None: ...\n"
        },
        ["worker", "m:app"],
        r"importing m fails: a task named x is registered already.*m\.py:2.*m\.py, line 4\)",
    ),
    "wrong annotation": (
        {
            "m.py": "from __future__ import annotations\nfrom tasks import app\n"
            "@app.task\nasync def a(x: Missing) -> None: ...\n"
        },
        ["worker", "m:app"],
        r"parameter 'x' of the task m\.a in m is annotated with Missing, which cannot be resolved",
    ),
    "import of a setting": (
        {"tasks.py": TASKS.format(options=", imports=['broken']"), "broken.py": "x\n"},
        ["worker", "tasks:app"],
        r"NameError: name 'x' is not defined \(/.*broken\.py, line 1\)",
    ),
    "missing import of a setting": (
        {"tasks.py": TASKS.format(options=", imports=['nowhere']")},
        ["worker", "tasks:app"],
        r"names nowhere, and there is no such module",
    ),
    "wrong URL": (
        {"tasks.py": TASKS.format(options=", broker='localhost:6379'")},
        ["worker", "tasks:app"],
        r"localhost:6379",
    ),
    "unknown scheme": (
        {"tasks.py": TASKS.format(options=", broker='gopher://localhost'")},
        ["worker", "tasks:app"],
        r"no broker for gopher://; there are .*redis://",
    ),
    "unknown scheme of results": (
        {"tasks.py": TASKS.format(options=", backend='gopher://localhost'")},
        ["worker", "tasks:app"],
        r"no result backend for gopher://; there are .*postgresql://",
    ),
    "bad option": ({}, ["worker", "tasks:app", "--concurency", "3"], r"--concurency"),
    "bad number": ({}, ["worker", "tasks:app", "-c", "0"], r"--concurrency.* 1$"),
    "no number": ({}, ["worker", "tasks:app", "-c", "many"], r"--concurrency.*integer"),
    "bad log level": ({}, ["worker", "tasks:app", "-l", "loud"], r"no log level 'loud'; there are"),
    "bad memory": (
        {},
        ["worker", "tasks:app", "--max-memory-per-child", "lots"],
        r"worker_max_memory_per_child = 'lots'",
    ),
    "no queue": ({}, ["worker", "tasks:app", "-Q", ","], r"-Q names no queue"),
    "no weight at all": (
        {},
        ["worker", "tasks:app", "-Q", "critical:6,low:0"],
        r"-Q gives the queue low the weight 0; .* 1 is the least",
    ),
    "less than no weight": ({}, ["worker", "tasks:app", "-Q", "low:-3"], r"low the weight -3; "),
    "half a weight": ({}, ["worker", "tasks:app", "-Q", "a:1,low:1.5"], r"low the weight 1\.5; "),
    "no number as a weight": (
        {},
        ["worker", "tasks:app", "-Q", "critical:6,low:x"],
        r"-Q gives no weight to low:x, but one in critical:6: write .* or behind none",
    ),
    "some weights": (
        {},
        ["worker", "tasks:app", "-Q", "a:1,b"],
        r"-Q gives no weight to b, but one in a:1: write .* or behind none",
    ),
    "a queue twice": ({}, ["worker", "tasks:app", "-Q", "a,b,a"], r"-Q names the queue a twice"),
    "a weight twice": ({}, ["worker", "tasks:app", "-Q", "a:1,a:2"], r"-Q names the queue a twice"),
    "a word too many": ({}, ["worker", "tasks:app", "info"], r"unexpected 'info'"),
    "bad command": ({}, ["wrker", "tasks:app"], r"wrker"),
    "call: no task": ({}, ["call", "tasks:app"], r"which task\?"),
    "call: no such module": ({}, ["call", "nothing:app", "x"], r"no module 'nothing'"),
    "call: it does not fit": ({}, ["call", "tasks:app", "tasks.add", "1"], r"add\(.*missing.*'y'"),
    "call: no keyword": ({}, ["call", "tasks:app", "tasks.add", "-k", "x"], r"name=value"),
    "call: priority": (
        {},
        ["call", "tasks:app", "tasks.add", "1", "2", "--priority", "10"],
        r"priority is 10; .*0 to 9",
    ),
    "call: no JSON": ({}, ["call", "tasks:app", "tasks.add", "NaN", "2"], r"JSON"),
    "result: no id": ({}, ["result", "tasks:app"], r"which task\?"),
    "queues: bad command": ({}, ["queues", "tasks:app", "prge"], r"no such command: 'prge'"),
    "purge: no queue": ({}, ["queues", "purge", "tasks:app"], r"which queue\?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(programs: Programs, mistake: str) -> None:
    files, words, pattern = MISTAKES[mistake]
    for name, text in files.items():
        programs.write(name, text)
    done = programs.run(*words)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(rf"aiotaskq: .*{pattern}", done.stderr), done.stderr
    assert done.stdout == "" or words[0] == "worker"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("AIOTASKQ_WORKER_CONCURRENCY", "many", "AIOTASKQ_WORKER_CONCURRENCY = 'many': wants"),
        ("AIOTASKQ_WORKER_CONCURENCY", "3", "AIOTASKQ_WORKER_CONCURENCY"),
        ("AIOTASKQ_BROKER_URL", "gopher://secret@host", "gopher://"),
    ],
)
def test_a_wrong_variable_is_one_line_and_status_2(
    programs: Programs, name: str, value: str, pattern: str
) -> None:
    done = programs.run("worker", "tasks:app", **{name: value})
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert pattern in done.stderr
    assert "secret" not in done.stderr
    assert done.returncode == 2


def test_a_server_out_of_reach_is_one_line_where_it_is_not_to_be_waited_for(
    programs: Programs,
) -> None:
    options = f", broker='redis://:secret@127.0.0.1:{free_port()}/0'"
    programs.write(
        "tasks.py", TASKS.format(options=options + ", broker_connection_retry_on_startup=False")
    )
    done = programs.run("worker", "tasks:app", "-w", "3")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "127.0.0.1" in done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert done.returncode == 2


def test_a_broker_that_only_one_process_sees_is_refused(programs: Programs) -> None:
    code = "from aiotaskq import TaskQueue\napp = TaskQueue('m', broker='memory://')\n"
    programs.write("alone.py", code)
    for words in (("worker", "alone:app"), ("call", "alone:app", "x.y")):
        done = programs.run(*words)
        assert done.returncode == 2
        assert "memory:// is seen by one process only" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_negative_number_needs_two_dashes_and_is_told_so(programs: Programs) -> None:
    done = programs.run("call", "tasks:app", "tasks.add", "-1", "2")
    assert done.returncode == 2
    assert "Put -- before a negative number." in done.stderr
