"""A new file for each test, open drivers on it, and other processes that use it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker
from tests.drivers.sqlite.tools import PREAMBLE, ROOT, Process, Start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
async def broker(url: str) -> AsyncIterator[SQLiteBroker]:
    broker = SQLiteBroker(url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def backend(url: str) -> AsyncIterator[SQLiteBackend]:
    backend = SQLiteBackend(url)
    await backend.open()
    yield backend
    await backend.close()


@pytest.fixture
def start(url: str) -> Iterator[Start]:
    """Start processes that run lines of code with an open `broker` on the same file."""
    started: list[Process] = []

    def go(lines: str) -> Process:
        code = PREAMBLE + textwrap.indent(textwrap.dedent(lines), "    ") + "\nasyncio.run(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()
