"""The command line, as a user meets it: what is printed, and with what status it ends."""

from __future__ import annotations

import re
import socket

import pytest

from tests.integrations.programs import LONG, TASKS, Programs

pytestmark = pytest.mark.timeout(150)
IN_TIME = ("--timeout", str(LONG))


# --- help ---------------------------------------------------------------------------------------


def test_the_version(programs: Programs) -> None:
    done = programs.run("--version")
    assert re.fullmatch(r"aiotaskq \d+\.\d+\.\d+\S*\n", done.stdout)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["worker", "call", "result", "queues", "tasks:app", "-A"]),
        (("worker",), ["--concurrency", "--queues", "--reload", "SIGTERM", "[100]", "[25]"]),
        (("call",), ["--keyword", "--wait", "--countdown", "Exit status"]),
        (("result",), ["--timeout", "Exit status"]),
        (("queues",), ["list", "purge"]),
        (("queues", "purge"), ["--yes", "cannot be undone"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(programs: Programs, command: tuple[str, ...], words: list[str], flag: str) -> None:
    done = programs.run(*command, flag, COLUMNS="80")
    assert done.returncode == 0
    assert done.stderr == ""
    for word in words:
        assert word in done.stdout
    assert "[bold]" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_no_command_shows_the_help(programs: Programs) -> None:
    done = programs.run()
    assert "Usage:" in done.stdout
    assert "worker" in done.stdout
    assert done.stderr == ""


# --- the application ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["worker", "tasks:app"]),
        ({}, ["worker", "tasks"]),
        ({}, ["-A", "tasks", "worker", "--loglevel=info"]),
        ({}, ["--app", "tasks:app", "worker", "-l", "INFO"]),
        ({"package/__init__.py": "from tasks import app as anything\n"}, ["worker", "package"]),
        (
            {"package/__init__.py": "", "package/celery.py": "from tasks import app\n"},
            ["-A", "package", "worker"],
        ),
        (
            {"package/__init__.py": "", "package/deep.py": "class X:\n    from tasks import app\n"},
            ["worker", "package.deep:X.app"],
        ),
    ],
    ids=["app", "module", "celery", "option", "package", "submodule", "attribute"],
)
def test_the_application_is_found(
    programs: Programs, files: dict[str, str], words: list[str]
) -> None:
    for name, text in files.items():
        programs.write(name, text)
    worker = programs.start(*words)
    worker.line(r" ready$")
    assert worker.stop() == 0


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
        r"annotations of a cannot be resolved: name 'Missing' is not defined",
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


# --- the worker's output ------------------------------------------------------------------------


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


# --- call, result, queues -----------------------------------------------------------------------


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


def test_a_task_that_is_not_registered_is_sent_all_the_same(programs: Programs) -> None:
    done = programs.run("call", "tasks:app", "elsewhere.job", "1", "--queue", "elsewhere")
    assert done.returncode == 0
    assert "elsewhere.job is not registered in tasks:app" in done.stderr
    assert re.search(r"elsewhere\D+1\D+0", programs.run("queues", "tasks:app").stdout)


def test_a_broker_that_only_one_process_sees_is_refused(programs: Programs) -> None:
    code = "from aiotaskq import TaskQueue\napp = TaskQueue('m', broker='memory://')\n"
    programs.write("alone.py", code)
    for words in (("worker", "alone:app"), ("call", "alone:app", "x.y")):
        done = programs.run(*words)
        assert done.returncode == 2
        assert "memory:// is seen by one process only" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("target", ["tasks.py", "./tasks.py", "./tasks:app"])
def test_a_file_in_place_of_a_module_is_told_the_modules_name(
    programs: Programs, target: str
) -> None:
    done = programs.run("call", target, "tasks.add", "1", "2")
    assert done.returncode == 2
    assert "is a file; write the module's name: tasks:app" in done.stderr


def test_a_negative_number_needs_two_dashes_and_is_told_so(programs: Programs) -> None:
    done = programs.run("call", "tasks:app", "tasks.add", "-1", "2")
    assert done.returncode == 2
    assert "Put -- before a negative number." in done.stderr


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


def test_queues_and_purge(programs: Programs) -> None:
    assert "no queue at sqlite:///aiotaskq.db holds anything" in (
        programs.run("queues", "tasks:app").stdout
    )
    for _ in range(3):
        programs.call("tasks.add", "1", "2")
    programs.call("tasks.add", "1", "2", "--countdown", "3600")
    for words in (("queues", "tasks:app"), ("-A", "tasks", "queues"), ("queues", "list", "tasks")):
        assert re.search(r"default\D+3\D+1\D+0\D+0", programs.run(*words).stdout)

    asked = programs.run("queues", "purge", "tasks:app", "default", typed="n\n")
    assert "Drop 4 tasks waiting in 'default'" in asked.stdout + asked.stderr
    assert asked.returncode != 0
    assert "Traceback" not in asked.stderr
    silent = programs.run("queues", "purge", "tasks:app", "default")  # nobody to answer
    assert silent.returncode != 0
    assert re.search(r"default\D+3\D+1", programs.run("queues", "tasks:app").stdout)

    agreed = programs.run("queues", "purge", "tasks:app", "default", typed="y\n")
    assert "dropped 4 tasks" in agreed.stdout
    assert agreed.returncode == 0
    assert "nothing waits in 'default'" in (
        programs.run("-A", "tasks", "queues", "purge", "default", "-y").stdout
    )
    programs.call("tasks.add", "1", "2")
    assert "dropped 1 task\n" in programs.run("queues", "purge", "tasks", "default", "-y").stdout


def test_a_module_may_run_a_loop_of_its_own_while_it_is_imported(programs: Programs) -> None:
    programs.write(
        "tasks.py", "import asyncio\nasyncio.run(asyncio.sleep(0))\n" + TASKS.format(options="")
    )
    assert programs.call("tasks.add", "1", "2")
