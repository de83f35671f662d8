"""`aiotaskq dead`, as a user meets it: output and exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from aiotaskq.cli import main
from tests.integrations.programs import LONG, Programs, assert_help, environment

pytestmark = pytest.mark.timeout(400)

TASKS = """\
import os
from aiotaskq import Reject, Retry, TaskQueue
app = TaskQueue("tasks"{options})

def check(text):
    if not os.environ.get("MENDED"):
        raise Reject(text)

@app.task
async def pay(order: int) -> int:
    check(f"order {{order}} is [bold]closed[/bold]\\x1b[31m")
    return order

@app.task(retry=Retry(max_attempts=2, delay=0.01))
async def fetch(url: str, *, deep: bool = False) -> str:
    raise OSError(f"no route to {{url}}")
"""
STORES = ["embedded", "redis"]


@pytest.fixture
def programs(programs: Programs) -> Programs:
    programs.write("tasks.py", TASKS.format(options=""))
    return programs


BURY = """\
import asyncio, sys
from tasks import app, fetch, pay

async def main():
    calls = {"pay": pay.s(7), "fetch": fetch.s("http://x", deep=True)}
    calls["other"] = pay.with_options(queue="other").s(8)
    async with app:
        handles = await app.kiq_many([calls[name] for name in sys.argv[1:]])
        async with app.worker(queues=["default", "other"], burst=True):
            await asyncio.gather(*(handle.wait() for handle in handles))
    print(*(handle.id for handle in handles))

asyncio.run(main())
"""


def bury(programs: Programs, *names: str) -> list[str]:
    """Have tasks among the dead letters; return their ids."""
    programs.write("bury.py", BURY)
    done = subprocess.run(
        [sys.executable, "bury.py", *names],
        cwd=programs.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def three(programs: Programs) -> tuple[str, str, str]:
    one, two, three = bury(programs, "pay", "fetch", "other")
    return one, two, three


# --- list ---------------------------------------------------------------------------------------


def test_there_are_none(programs: Programs) -> None:
    for words in (("dead", "tasks:app"), ("-A", "tasks", "dead"), ("dead", "list", "tasks")):
        done = programs.run(*words)
        assert done.stdout == "no dead letters at sqlite:///aiotaskq.db\n"
        assert (done.stderr, done.returncode) == ("", 0)
    done = programs.run("dead", "tasks:app", "--queue", "q", "--reason", "x")
    assert done.stdout.endswith(" with queue 'q', reason 'x'\n")


def test_a_list_fits_the_terminal_and_no_id_is_cut(
    programs: Programs, three: tuple[str, str, str]
) -> None:
    done = programs.run("dead", "tasks:app", COLUMNS="80")
    assert (done.stderr, done.returncode) == ("", 0)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for task_id in three:
        assert task_id in done.stdout
    assert re.search(rf"{three[1]} +tasks\.fetch +\d\d-\d\d \d\d:\d\d +2 ", done.stdout)
    assert re.search(r"failed 2 times.* default +\d+ [sm] ago +0 ", done.stdout)
    # What a reason holds is neither markup nor a command for the terminal.
    assert r"order 7 is [bold]closed[/bold]\x1b[31m" in done.stdout


def test_a_list_is_of_what_was_asked_for(programs: Programs, three: tuple[str, str, str]) -> None:
    def listed(*options: str) -> list[str]:
        done = programs.run("dead", "list", "tasks:app", "--json", *options)
        assert done.returncode == 0, done.stderr
        return [one["id"] for one in json.loads(done.stdout)]

    assert set(listed()) == set(three)
    assert listed("--queue", "other") == [three[2]]
    assert listed("--task", "*.fetch") == [three[1]]
    assert listed("--reason", "ORDER 7") == [three[0]]
    assert listed("--task", "tasks.pay", "--reason", "route") == []
    more = programs.run("dead", "tasks:app", "--limit", "1")
    assert sum(task_id in more.stdout for task_id in three) == 1
    assert "there are more" in more.stderr


# --- show ---------------------------------------------------------------------------------------


def test_all_that_is_known_is_shown(programs: Programs, three: tuple[str, str, str]) -> None:
    done = programs.run("dead", "show", "tasks:app", three[1])
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.splitlines()[0] == three[1]
    for name, value in (
        ("task", r"tasks\.fetch"),
        ("queue", "default"),
        ("reason", r"failed 2 times, the last time with OSError: no route to http://x"),
        ("died", r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ \(\d+ [sm] ago\)"),
        ("buried by", r"\S+:\d+"),
        ("attempts", "2"),
        ("crashes", "0"),
        ("args", r'\["http://x"\]'),
        ("kwargs", r'{"deep":true}'),
        ("payload", r"\d+ bytes"),
    ):
        assert re.search(rf"^  {name} +{value}$", done.stdout, re.MULTILINE), name
    attempts = re.findall(r"^  attempt (\d), \S+ \S+ \S+, \S+: OSError: no ", done.stdout, re.M)
    assert attempts == ["1", "2"]
    assert done.stdout.count('    raise OSError(f"no route to {url}")') == 2


def test_show_as_json_has_the_payload(programs: Programs, three: tuple[str, str, str]) -> None:
    done = programs.run("dead", "show", "tasks:app", three[1], three[0], "--json")
    by_id = {one["id"]: one for one in json.loads(done.stdout)}
    assert set(by_id) == {three[0], three[1]}
    shown = by_id[three[1]]
    assert (shown["task"], shown["args"]) == ("tasks.fetch", '["http://x"]')
    assert [one["error"] for one in shown["attempts"]] == ["OSError: no route to http://x"] * 2
    assert isinstance(shown["payload"], str)


def test_an_id_that_is_not_there_is_told(programs: Programs, three: tuple[str, str, str]) -> None:
    done = programs.run("dead", "show", "tasks:app", three[0], "nothing")
    assert done.stdout.startswith(three[0])
    assert done.stderr == "no dead letter has the id nothing\n"
    assert done.returncode == 1
    for verb in ("retry", "discard"):
        done = programs.run("dead", verb, "tasks:app", "nothing")
        assert (done.stdout, done.returncode) == ("", 1)
        assert done.stderr == "no dead letter has the id nothing\n"


# --- retry and discard --------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_a_retried_task_ends_well_once_it_is_mended(
    programs: Programs, store: str, request: pytest.FixtureRequest
) -> None:
    if store == "redis":
        url = request.getfixturevalue("redis_url")
        programs.write("tasks.py", TASKS.format(options=f", broker={url!r}"))
    (task_id,) = bury(programs, "pay")
    assert programs.run("result", "tasks:app", task_id).returncode == 1
    done = programs.run("dead", "retry", "tasks:app", task_id)
    assert (done.stdout, done.returncode) == ("sent 1 task back to its queue\n", 0), done.stderr
    assert programs.run("result", "tasks:app", task_id).returncode == 3  # it waits
    done = programs.run("worker", "tasks:app", "--burst", MENDED="yes")
    assert done.returncode == 0, done.stderr
    assert programs.run("result", "tasks:app", task_id).stdout == "7\n"
    assert "no dead letters" in programs.run("dead", "tasks:app").stdout


@pytest.mark.parametrize(
    ("verb", "word", "done_so"),
    [
        ("retry", "Run 2 tasks again?", "sent 2 tasks back to their queues\n"),
        ("discard", "Drop 2 tasks for good?", "dropped 2 tasks\n"),
    ],
)
def test_it_asks_before_it_touches_several(
    programs: Programs, three: tuple[str, str, str], verb: str, word: str, done_so: str
) -> None:
    asked = programs.run("dead", verb, "tasks:app", "--task", "tasks.pay", typed="n\n")
    assert word in asked.stdout
    assert "nothing was" in asked.stderr
    assert asked.returncode == 1
    silent = programs.run("dead", verb, "tasks:app", "--all")  # nobody to answer
    assert silent.returncode == 130
    agreed = programs.run("dead", verb, "tasks:app", "--task", "tasks.pay", typed="y\n")
    assert agreed.stdout.endswith(done_so)
    assert agreed.returncode == 0
    one = programs.run("-A", "tasks", "dead", verb, "--all")  # a single one is not asked for
    assert "1 task" in one.stdout
    none = programs.run("dead", verb, "tasks:app", "--all", "-y")
    assert none.stdout == "no dead letters at sqlite:///aiotaskq.db\n"
    assert none.returncode == 0


def test_a_limit_spares_the_others(programs: Programs, three: tuple[str, str, str]) -> None:
    done = programs.run("dead", "discard", "tasks:app", "--all", "--limit", "2", "--yes")
    assert done.stdout == "dropped 2 tasks\n"
    assert "dropped 1 task\n" in programs.run("dead", "discard", "tasks", "--all", "-y").stdout


# --- mistakes and help --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["dead"], r"which application\?.* dead list tasks:app"),
        (["dead", "tasks:app", "retyr"], r"no such command: 'retyr'; there are list, show, retry"),
        (["dead", "show", "tasks:app"], r"which task\? aiotaskq dead show tasks:app ID"),
        (["dead", "retry", "tasks:app"], r"which dead letters\? Give their ids, --queue, --task"),
        (["dead", "discard", "tasks:app", "-y"], r"or --all"),
        (["dead", "retry", "tasks:app", "--all", "--task", "x"], r"--all means all dead letters"),
        (["dead", "discard", "tasks:app", "id", "--all"], r"--all means all dead letters"),
        (["dead", "tasks:app", "--limit", "0"], r"--limit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_the_mend(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:  # found out before the application is imported
        main(words)
    printed = capsys.readouterr()
    assert re.search(complaint, printed.err), printed.err
    assert len(printed.err.splitlines()) == 1
    assert (printed.out, ended.value.code) == ("", 2)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["list", "show", "retry", "discard"]),
        (("list",), ["--queue", "--task", "--reason", "--limit", "--json"]),
        (("show",), ["--json", "Exit status"]),
        (("retry",), ["--all", "--yes", "forgotten", "Exit status"]),
        (("discard",), ["--all", "cannot be undone", "Exit status"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help(
    command: tuple[str, ...],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert_help(["dead", *command], words, capsys)
