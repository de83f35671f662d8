"""Programs in a folder of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.programs import TASKS, Programs
from tests.integrations.shell import Shell


@pytest.fixture(scope="session", autouse=True)
def shell() -> Iterator[Shell]:
    """What runs commands to their end; there before any test, so that none has left it behind."""
    shell = Shell()
    yield shell
    shell.close()


@pytest.fixture
def programs(tmp_path: Path, shell: Shell) -> Iterator[Programs]:
    """A folder with a ``tasks.py``, and what runs programs there."""
    programs = Programs(tmp_path, shell)
    programs.write("tasks.py", TASKS.format(options=""))
    yield programs
    programs.close()
