"""The help of the command line and of its commands."""

from __future__ import annotations

import re

import pytest

from tests.integrations.programs import Programs

pytestmark = pytest.mark.timeout(400)


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
