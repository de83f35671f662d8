"""Programs whose stdout or stderr is closed, full, gone, or without the characters of a name."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess

import pytest

from tests.integrations.programs import COMMAND, LONG, Programs, environment

pytestmark = pytest.mark.timeout(400)

TASKS = """\
import sys, time
from aiotaskq import Reject, TaskQueue
app = TaskQueue("f\u00e4cher")

@app.task(name="gr\u00f6\u00dfe", queue="\u65e5\u672c")
async def size(text: str) -> str:
    print("in the loop", text, "\U0001f600")
    return text

@app.task(queue="\u65e5\u672c")
def threaded(text: str) -> None:
    print("in a thread", text)

@app.task(queue="\u65e5\u672c", executor="process")
def processed(text: str) -> None:
    print("in a process", text)

@app.task
async def refuse(text: str) -> None:
    raise Reject(text)
"""
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
PLAIN = {"PYTHONUNBUFFERED": ""}  # as a container has it, where nobody thought of it

COMMANDS = [
    ["call", "tasks:app", "größe", "x"],
    ["queues", "tasks:app"],
    ["dead", "list", "tasks:app"],
    ["dead", "list", "tasks:app", "--json"],
    ["schedule", "list", "tasks:app"],
    ["schedule", "list", "tasks:app", "--json"],
    ["queues", "purge", "tasks:app", "default", "-y"],
    ["migrate", "tasks:app"],
    ["--version"],
    ["--help"],
    ["dead", "list", "--help"],
]


@pytest.fixture
def programs(programs: Programs) -> Programs:
    programs.write("tasks.py", TASKS)
    return programs


# --- commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_without_a_reader_ends_as_other_programs_do(
    programs: Programs, command: list[str]
) -> None:
    done = programs.run(*command, stdout="gone", **ASCII)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("stream", "reason"), [("/dev/full", "No space left"), ("closed", "Bad file descriptor")]
)
def test_a_command_whose_output_is_lost_says_so(
    programs: Programs, stream: str, reason: str
) -> None:
    for command in (["queues", "tasks:app"], ["dead", "list", "tasks:app", "--json"], ["--help"]):
        done = programs.run(*command, stdout=stream)
        assert done.returncode == 74
        assert re.fullmatch(f"aiotaskq: the output cannot be written: {reason}.*\n", done.stderr)
    # Nobody can be told.
    assert programs.run("queues", "tasks:app", stdout=stream, stderr=stream).returncode == 74


@pytest.mark.parametrize("stream", ["gone", "/dev/full"])
def test_a_lost_output_undoes_nothing_and_hides_no_mistake(programs: Programs, stream: str) -> None:
    programs.run("call", "tasks:app", "größe", "x", stdout=stream)
    assert "日本" in programs.run("queues", "tasks:app").stdout
    for name in ("a", "b"):
        words = ("schedule", "add", "tasks:app", name, "größe", "x", "--every", "60")
        programs.run(*words, stdout=stream)
    programs.run("schedule", "remove", "tasks:app", "a", "b", stdout=stream)
    assert json.loads(programs.run("schedule", "list", "tasks:app", "--json").stdout) == []
    wrong = programs.run("queues", "no_such_module:app", stdout=stream, stderr=stream)
    assert wrong.returncode == 2


def test_a_closed_stdin_is_an_empty_one(programs: Programs) -> None:
    programs.call("größe", "x")
    done = programs.run("queues", "purge", "tasks:app", "日本", stdin="closed")
    assert (done.returncode, done.stderr) == (130, "stopped\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:replace"])
def test_names_that_the_encoding_lacks_are_escaped(programs: Programs, encoding: str) -> None:
    sent = programs.run("call", "tasks:app", "größe", "日本", PYTHONIOENCODING=encoding)
    assert sent.returncode == 0, sent.stderr
    shown = programs.run("queues", "tasks:app", PYTHONIOENCODING=encoding)
    assert (shown.returncode, shown.stderr) == (0, "")
    plain = {"utf-8": "日本", "ascii:replace": "??"}.get(encoding, r"\u65e5\u672c")
    assert f" {plain} " in shown.stdout
    added = programs.run(
        "schedule",
        "add",
        "tasks:app",
        "é日",
        "größe",
        "x",
        "--every",
        "60",
        PYTHONIOENCODING=encoding,
    )
    assert added.returncode == 0, added.stderr


def test_words_of_the_command_line_are_utf_8_in_any_locale() -> None:
    # In a process of its own: Python reads the locale and the words when it starts.
    done = subprocess.run(
        [*COMMAND, "queues", "größe:app"],
        env=environment(**ASCII),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "größe" in done.stderr.decode()


# --- workers ----------------------------------------------------------------------------------


def test_what_tasks_print_is_seen_at_once_in_any_encoding(programs: Programs) -> None:
    worker = programs.worker("tasks:app", "-Q", "日本", **ASCII, **PLAIN)
    for name in ("größe", "tasks.threaded", "tasks.processed"):
        programs.call(name, "é")
    for place, more in (("the loop", r" \\ud83d\\ude00"), ("a thread", ""), ("a process", "")):
        worker.line(rf"^in {place} \\u00e9{more}$")
    assert worker.stop() == 0
    for line in ("app:         f\u00e4cher", "  . \u65e5\u672c", "  . gr\u00f6\u00dfe"):
        assert line in worker.output


@pytest.mark.parametrize("target", [">&- 2>&- <&-", "2>/dev/full | true"])
def test_a_worker_needs_nobody_that_reads(programs: Programs, target: str) -> None:
    ids = [programs.call(name, "é") for name in ("größe", "tasks.threaded", "tasks.processed")]
    command = " ".join(COMMAND)
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{command} worker tasks:app -Q 日本 --burst {target}; exit ${{PIPESTATUS[0]}}",
        ],
        cwd=programs.folder,
        env=environment(**PLAIN),
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0
    for task_id in ids:
        assert programs.run("result", "tasks:app", task_id).returncode == 0


def test_a_scheduler_needs_nobody_that_reads(programs: Programs) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [*COMMAND, "scheduler", "tasks:app"],
        cwd=programs.folder,
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    ) as scheduler:
        os.close(writer)
        assert scheduler.stderr is not None
        assert any("ready" in line for line in scheduler.stderr)
        scheduler.send_signal(signal.SIGTERM)
        assert scheduler.wait(LONG) == 0
