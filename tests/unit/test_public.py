"""The public names of the package, and the cost of importing it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import aiotaskq
from aiotaskq import errors, events

ROOT = Path(__file__).parents[2]
# Each of these takes longer to import than all of aiotaskq.
HEAVY = (
    "aiotaskq.drivers.memory",
    "aiotaskq.drivers.postgres",
    "aiotaskq.drivers.redis",
    "aiotaskq.drivers.sqlite",
    "asyncpg",
    "fastapi",
    "flask",
    "pydantic",
    "redis",
    "rich",
    "sqlite3",
    "typer",
    "uvloop",
)


def test_all_is_sorted_and_complete() -> None:
    tree = ast.parse(Path(aiotaskq.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert aiotaskq.__all__ == sorted(imported)
    assert all(hasattr(aiotaskq, name) for name in aiotaskq.__all__)


def test_every_error_is_public() -> None:
    kinds = {
        name
        for name, kind in vars(errors).items()
        if getattr(kind, "__module__", "") == errors.__name__ and not name.startswith("_")
    }
    assert len(kinds) > 10
    assert kinds <= set(aiotaskq.__all__)


def test_every_event_has_a_docstring() -> None:
    kinds = [
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, events.Event)
    ]
    assert len(kinds) > 10
    assert all(kind.__doc__ for kind in kinds)


def test_everything_public_has_a_docstring() -> None:
    assert [name for name in aiotaskq.__all__ if not getattr(aiotaskq, name).__doc__] == []


def test_importing_it_imports_no_client_library() -> None:
    program = f"""
import sys
import aiotaskq
aiotaskq.TaskQueue("t", broker="redis://localhost", backend="postgresql://localhost")
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == []


@pytest.mark.parametrize(
    "name",
    [
        module.name
        for module in pkgutil.walk_packages(aiotaskq.__path__, "aiotaskq.")
        if not module.name.endswith("__main__")
    ],
)
def test_every_module_can_be_imported_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_the_version_is_that_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert aiotaskq.__version__ == project["version"]
