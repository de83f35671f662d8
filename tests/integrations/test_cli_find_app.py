"""The application that a command names, and how it is found."""

from __future__ import annotations

import pytest

from tests.integrations.programs import TASKS, Programs

pytestmark = pytest.mark.timeout(400)


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


@pytest.mark.parametrize("target", ["tasks.py", "./tasks.py", "./tasks:app"])
def test_a_file_in_place_of_a_module_is_told_the_modules_name(
    programs: Programs, target: str
) -> None:
    done = programs.run("call", target, "tasks.add", "1", "2")
    assert done.returncode == 2
    assert "is a file; write the module's name: tasks:app" in done.stderr


def test_a_module_may_run_a_loop_of_its_own_while_it_is_imported(programs: Programs) -> None:
    programs.write(
        "tasks.py", "import asyncio\nasyncio.run(asyncio.sleep(0))\n" + TASKS.format(options="")
    )
    assert programs.call("tasks.add", "1", "2")
