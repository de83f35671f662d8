"""The wheel, built and installed alone in an empty environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAIN_JOB = """
import asyncio
import sys

from aiotaskq import TaskQueue

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


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; fail with that if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_installed_alone_in_an_empty_environment(tmp_path: Path) -> None:
    """It holds the package and nothing else, and does the main job on the embedded default."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"aiotaskq"}
    assert "aiotaskq/py.typed" in names
    assert any(name.endswith(".lua") for name in names)

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "--disable-pip-version-check", "-q", "install", wheel, cwd=tmp_path)
    (tmp_path / "job.py").write_text(MAIN_JOB, encoding="utf-8")
    assert run(python, "job.py", cwd=tmp_path).strip() == "10"
    assert (tmp_path / "aiotaskq.db").exists()
    version = run(tmp_path / "venv" / "bin" / "aiotaskq", "--version", cwd=tmp_path)
    assert version.startswith("aiotaskq ")
