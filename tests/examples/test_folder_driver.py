"""The driver of `examples/folder_driver`, installed as far as the import system can tell."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from tests.examples.running import EXAMPLES, PATIENCE, copied, environment, printed, run, working

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TASKS = """\
import os, time
from aiotaskq import TaskQueue, every

app = TaskQueue("tasks")

@app.task
async def add(x: int, y: int) -> int:
    return x + y

@app.task
def stand_still(path: str) -> str:
    if not os.path.exists(path):
        with open(path, "x") as file:
            file.write(str(os.getpid()))
        time.sleep(3600)
    return "ran again"

@app.task(schedule=every(0.2))
async def look() -> None:
    print("looked", flush=True)
"""
PLAIN = """\
from tasks import add
print(add.delay(2, 8).get(timeout=280), add.delay(3, 4).get(timeout=280))
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which the distribution is installed, and is the default of applications."""
    project = tomllib.loads((EXAMPLES / "folder_driver/pyproject.toml").read_text())["project"]
    site = tmp_path / "site"
    shutil.copytree(EXAMPLES / "folder_driver/aiotaskq_folder", site / "aiotaskq_folder")
    info = site / f"aiotaskq_folder-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in project["entry-points"].items()
        )
    )
    return environment(
        PYTHONPATH=str(site), AIOTASKQ_BROKER_URL=f"folder://{tmp_path}/store", COLUMNS="200"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tasks.py").write_text(TASKS)
    return folder


def test_a_worker_runs_tasks_and_a_schedule(
    folder: Path, env: dict[str, str], tmp_path: Path
) -> None:
    with working("tasks:app", folder, env, options="-B") as worker:
        assert f"transport:   folder://{tmp_path}/store\n" in worker.text
        assert printed("aiotaskq call tasks:app tasks.add 2 8 --wait", folder, env) == "10\n"
        assert printed(["python", "-c", PLAIN], folder, env) == "10 7\n"
        worker.wait_for(r"looked\n(?s:.*)looked\n")
    assert "tasks.look" in printed("aiotaskq schedule tasks:app", folder, env)


def test_what_a_killed_worker_process_held_is_given_back_by_the_keeper(
    folder: Path, env: dict[str, str], tmp_path: Path
) -> None:
    marker = tmp_path / "pid"
    with working("tasks:app", folder, env) as worker:
        sent = printed(
            ["aiotaskq", "call", "tasks:app", "tasks.stand_still", str(marker)], folder, env
        )
        end = time.monotonic() + PATIENCE
        while not (marker.exists() and marker.read_text()):
            assert time.monotonic() < end, worker.text
            time.sleep(0.05)
        os.kill(int(marker.read_text()), signal.SIGKILL)
        worker.wait_for(r"gave 1 task back: .* was killed by signal 9")
        worker.wait_for(rf"\[{sent.strip()}\] succeeded in .*: 'ran again'")
    assert not psutil.pid_exists(int(marker.read_text()))


def test_the_commands_of_an_operator_work(folder: Path, env: dict[str, str]) -> None:
    sent = printed("aiotaskq call tasks:app tasks.add 1 1", folder, env).strip()
    assert re.search(r"default[ │]+1 ", printed("aiotaskq queues tasks:app", folder, env))
    with working("tasks:app", folder, env) as worker:
        worker.wait_for(rf"\[{sent}\] succeeded")
        assert printed(f"aiotaskq result tasks:app {sent} --wait", folder, env).strip() == "2"
    assert not re.search(r"default", printed("aiotaskq queues tasks:app", folder, env))


def test_an_unknown_scheme_is_told_of_it(folder: Path, env: dict[str, str]) -> None:
    done = run("aiotaskq worker tasks:app", folder, {**env, "AIOTASKQ_BROKER_URL": "gopher://h"})
    assert done.returncode == 2
    assert "no broker for gopher://; there are memory://" in done.stderr
    assert "folder:// (from aiotaskq-folder)" in done.stderr


def test_its_other_tests_pass_where_its_author_runs_them(tmp_path: Path) -> None:
    project = copied("folder_driver", tmp_path)
    done = run(
        "python -m pytest -q --ignore tests/test_folder.py", project, environment(), timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
