"""`aiotaskq queues`, as a user meets it."""

from __future__ import annotations

import re

import pytest

from tests.integrations.programs import Programs

pytestmark = pytest.mark.timeout(400)


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
