"""The wheel: its contents, and that it works."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAIN_JOB = """
import asyncio
import sys

import aiotaskq
from aiotaskq import TaskQueue

assert ".whl" in aiotaskq.__file__
clients = {"redis", "asyncpg", "typer", "rich", "uvloop"} & set(sys.modules)
assert not clients, f"importing aiotaskq imports {clients}"

app = TaskQueue("tasks")

@app.task
async def add(x: int, y: int) -> int:
    return x + y

async def main() -> None:
    async with app.worker():
        print(await (await add.kiq(2, 8)).result(timeout=30))

asyncio.run(main())
"""


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    """Run a command and return its output; fail with the output if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_holds_the_package_alone_and_all_of_it(tmp_path: Path) -> None:
    """Its dependencies suffice: the tests of the README's sessions show that."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"aiotaskq"}
    kept = {path for path in (ROOT / "aiotaskq").rglob("*") if path.is_file()}
    kept = {path for path in kept if path.suffix != ".pyc"}
    assert {str(path.relative_to(ROOT)) for path in kept} <= names

    (tmp_path / "job.py").write_text(MAIN_JOB, encoding="utf-8")
    assert run(sys.executable, "job.py", cwd=tmp_path, PYTHONPATH=str(wheel)).strip() == "10"
    assert (tmp_path / "aiotaskq.db").exists()
