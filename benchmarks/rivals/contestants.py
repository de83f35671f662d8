"""The contestants of the comparison, read from the folders here, and their installation."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path

from benchmarks.rivals import workloads

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = HERE.parent / ".venvs"
INSTALL_TIMEOUT = 600.0  # seconds
OURS = "aiotaskq"


class Failed(Exception):
    """A contestant that could not be installed, did not run its tasks, or did not end."""


@dataclass(frozen=True)
class Contestant:
    """One line of the comparison: a library with a set-up.

    Attributes:
        name: Its name, which is also the section in `rival.toml`; several may share a library.
        library: The name of the folder.
        settings: Its set-up, for readers.
        durability: What happens to the tasks of a killed worker, for readers.
        store: `redis`, `postgres`, or `rabbitmq`, which also has a Redis for results.
        left: Commands that count the unfinished tasks. Redis: `DATABASE: COMMAND`; if the answer is
            a list, its first item counts if it is a number, otherwise its length. RabbitMQ:
            `queue: REGULAR EXPRESSION`, which counts waiting and held messages.
        results: The command that counts stored results; empty if none are stored.
        counts: The number of tasks in a drain, by workload; a missing workload is not run.
        prepare: Whether an empty database needs tables first.
        environment: More environment variables of its `bench`.
    """

    name: str
    library: str
    settings: str
    durability: str
    store: str
    left: list[str]
    counts: dict[str, int]
    results: str = ""
    prepare: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return HERE / self.library

    @property
    def home(self) -> Path:
        """The folder in which it is installed."""
        return ENVIRONMENTS / self.library

    @property
    def pins(self) -> Path:
        """The file with its pinned versions."""
        npm = self.folder / "package.json"
        return npm if npm.exists() else self.folder / "requirements.txt"

    @property
    def is_node(self) -> bool:
        return self.pins.name == "package.json"

    @property
    def is_ours(self) -> bool:
        return self.library == OURS

    @cached_property
    def versions(self) -> str:
        """All packages that are installed for it."""
        if self.is_ours:
            used = ("aiotaskq", "redis", "hiredis", "asyncpg", "pamqp", "msgspec", "uvloop")
            return " ".join(f"{name}=={metadata.version(name)}" for name in used)
        return " ".join(self.pins.read_text(encoding="utf-8").split())

    def command(self, *words: str) -> list[str]:
        """Return the command line of its `bench`."""
        if self.is_node:
            return ["node", str(self.folder / "bench.js"), *words]
        python = sys.executable if self.is_ours else str(self.home / "bin" / "python")
        return [python, "-m", f"benchmarks.rivals.{self.library}.bench", *words]

    def variables(self, **more: str) -> dict[str, str]:
        """Return the environment for `command`."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NODE_PATH": str(self.home / "node_modules"),
            **self.environment,
            **more,
        }

    def install(self) -> None:
        """Install it, if its pinned versions have changed.

        Raises:
            Failed: It could not be installed.
        """
        if self.is_ours:
            return
        stamp = self.home / ".installed"
        wanted = hashlib.sha256(self.pins.read_bytes() + sys.version.encode()).hexdigest()
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        if self.is_node:
            shutil.copy(self.pins, self.home)
            npm = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
            self._run(*npm, cwd=self.home)
        else:
            self._run(sys.executable, "-m", "venv", str(self.home))
            pip = [str(self.home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
            self._run(*pip, "install", "--quiet", "--requirement", str(self.pins))
        stamp.write_text(wanted, encoding="utf-8")

    def _run(self, *command: str, cwd: Path | None = None) -> None:
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=INSTALL_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed(f"{self.library} was not installed: {error}") from error
        if done.returncode != 0:
            raise Failed(f"{self.library} was not installed:\n{done.stderr[-1000:]}")


def find() -> list[Contestant]:
    """Return all contestants, aiotaskq first."""
    found = [
        Contestant(name=name, library=file.parent.name, **section)
        for file in sorted(HERE.glob("*/rival.toml"))
        for name, section in tomllib.loads(file.read_text(encoding="utf-8")).items()
    ]
    for one in found:
        unknown = set(one.counts) - set(workloads.NAMES)
        if unknown:
            raise Failed(f"{one.name}: there is no workload {', '.join(sorted(unknown))}")
    return sorted(found, key=lambda one: not one.is_ours)
