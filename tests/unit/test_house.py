"""The program `scripts/check-house` and the rules that it checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(root: Path, *rules: str) -> list[str]:
    """Return the lines that the program prints about a checkout."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check-house", "--root", root, *rules],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == bool(done.stdout)
    return done.stdout.splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package without a fault."""
    write(tmp_path, "aiotaskq/__init__.py", '"""A package."""\n')
    write(tmp_path, "aiotaskq/one.py", '"""A module."""\n\nclass One:\n    """A class."""\n')
    assert check(tmp_path) == []
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_class_name_is_defined_once(checkout: Path) -> None:
    nested = '"""Another."""\n\ndef make() -> type:\n    class One:\n        pass\n    return One\n'
    write(checkout, "aiotaskq/sub/two.py", nested)
    write(checkout, "tests/test_one.py", "class One:\n    pass\n")
    assert check(checkout) == [
        "aiotaskq/one.py:3: class One is also defined in aiotaskq/sub/two.py",
        "aiotaskq/sub/two.py:4: class One is also defined in aiotaskq/one.py",
    ]
    assert len(check(checkout, "class-names")) == 2
    assert check(checkout, "length") == []


def test_a_module_has_500_lines_at_most(checkout: Path) -> None:
    write(checkout, "aiotaskq/fits.py", '"""A module."""\n' + "\n" * 499)
    write(checkout, "tests/test_long.py", "\n" * 501)
    write(checkout, "benchmarks/long.py", "\n" * 501)
    write(checkout, "benchmarks/.venvs/long.py", "\n" * 501)
    assert check(checkout) == ["benchmarks/long.py:501: 501 lines; a module has 500 at most"]


@pytest.mark.parametrize("opener", ["What", "How", "Who", "Where", "From", "Between", "Why"])
def test_the_docstring_of_a_module_opens_with_no_question(checkout: Path, opener: str) -> None:
    write(checkout, "tests/test_one.py", f'"""{opener} it is."""\n')
    [line] = check(checkout, "openers")
    assert line.startswith("tests/test_one.py:1: the docstring opens with a question word")


def test_the_docstring_of_a_class_or_a_function_opens_with_no_question(checkout: Path) -> None:
    text = '''"""A module."""

class Retry:
    """How often it is tried."""

    def ends(self):
        """Whether it ends."""

    def limit(self):
        """Return whether there is a limit."""
'''
    write(checkout, "aiotaskq/two.py", text)
    lines = check(checkout, "openers")
    assert [line.split(":")[1] for line in lines] == ["3", "6"]


def test_the_first_line_of_a_docstring_has_nouns_for_pronouns(checkout: Path) -> None:
    text = '''"""Somewhat, and `what` is quoted.

What follows is free.
"""

class Waiter:
    """Whoever waits."""

    def wait(self):
        """Return what was taken."""
        def inner():
            """Who."""

    def _wait(self):
        """What a private function does is told as it likes."""

async def send():
    """Send it to those who wait for what comes."""
'''
    write(checkout, "aiotaskq/one.py", text)
    found = [line.partition(": the first")[0] for line in check(checkout)]
    assert found == [
        "aiotaskq/one.py:6: Waiter",
        "aiotaskq/one.py:9: wait",
        "aiotaskq/one.py:17: send",
        "aiotaskq/one.py:17: send",
    ]


def test_a_program_without_an_ending_is_read_as_well(checkout: Path) -> None:
    write(checkout, "scripts/tool", '#!/usr/bin/env python3\n"""What it does."""\n')
    write(checkout, "scripts/install", "#!/bin/sh\nWhat it does\n")
    assert len(check(checkout, "openers")) == 1


def test_modules_that_documents_name_exist(checkout: Path) -> None:
    text = '"""A module, see `aiotaskq.one.One` and `aiotaskq.gone`."""\n\nLIMIT: int = 1\n'
    write(checkout, "aiotaskq/sub/two.py", text)
    document = """
`one.py`, `sub/two.py`, `aiotaskq/one.py`, `aiotaskq.sub.two.LIMIT`, `aiotaskq.one.One` exist,
    from aiotaskq.one import One
`two.py` too; `sub/one.py` does not, and neither do `aiotaskq.one.Two` and aiotaskq.three.
"""
    write(checkout, "docs/how-to/read.md", document)
    assert check(checkout) == [
        "aiotaskq/sub/two.py:1: there is no aiotaskq.gone",
        "docs/how-to/read.md:4: there is no file sub/one.py",
        "docs/how-to/read.md:4: there is no aiotaskq.one.Two",
        "docs/how-to/read.md:4: there is no aiotaskq.three",
    ]
