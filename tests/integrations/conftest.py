"""Programs in a folder of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.programs import TASKS, Programs
from tests.integrations.shell import Shell
from tests.integrations.sites import Site


@pytest.fixture(scope="session", autouse=True)
def shell() -> Iterator[Shell]:
    """The process that runs commands, made before any test, so that no test has left it behind."""
    shell = Shell()
    yield shell
    shell.close()


@pytest.fixture
def programs(tmp_path: Path, shell: Shell) -> Iterator[Programs]:
    """A folder with a ``tasks.py``, in which programs run."""
    programs = Programs(tmp_path, shell)
    programs.write("tasks.py", TASKS.format(options=""))
    yield programs
    programs.close()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.server)])
def site(request: pytest.FixtureRequest, programs: Programs) -> Site:
    """Tasks for workers with leases, once with each of two brokers."""
    if request.param == "sqlite":
        return Site(programs, f"sqlite:///{programs.folder}/site.db")
    return Site(programs, request.getfixturevalue("redis_url"))


@pytest.fixture
def local(programs: Programs) -> Site:
    """Tasks for workers with leases, and a broker that needs no server."""
    return Site(programs, "sqlite:///local.db")  # relative to the working folder
