"""Types of the public API: mypy and pyright accept right programs and refuse wrong ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Errors = dict[int, list[str]]  # wrong lines, with their errors


def mypy(file: Path) -> Errors:
    """Check a file as `make types` does."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    done = subprocess.run(
        [*command, "--no-pretty", "--show-absolute-path", "--hide-error-context", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors: Errors = {}
    for name, line, text in re.findall(r"^(.*?):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        # Other files may have errors of another change. The name is enough: from its cache,
        # mypy reports errors of the same text under an earlier path.
        if Path(name).name == file.name:
            errors.setdefault(int(line), []).append(text)
    return errors


def pyright(file: Path) -> Errors:
    """Check a file with pyright's own settings, as an editor does."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyright",
            "--outputjson",
            "--pythonpath",
            sys.executable,
            str(file),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors: Errors = {}
    for found in json.loads(done.stdout)["generalDiagnostics"]:
        if found["severity"] == "error":
            line = found["range"]["start"]["line"] + 1
            errors.setdefault(line, []).append(found["message"])
    return errors


checkers = pytest.mark.parametrize("check", [mypy, pyright])
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@checkers
def test_the_public_api_is_typed(check: Callable[[Path], Errors]) -> None:
    assert check(HERE / "right.py") == {}


@checkers
def test_each_wrong_line_is_refused(check: Callable[[Path], Errors], tmp_path: Path) -> None:
    # Not a Python file here: every check of the project would report its errors.
    file = tmp_path / "wrong.py"
    shutil.copy(HERE / "wrong.txt", file)
    marked = {
        number
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line.endswith("# wrong")
    }
    errors = check(file)
    assert len(marked) > 20
    assert {number: errors.get(number, "is accepted") for number in marked ^ errors.keys()} == {}
