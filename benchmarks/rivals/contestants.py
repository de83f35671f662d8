"""Who is measured: read from the folders here, each installed on its own."""

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
    """A contestant could not be installed, did not do its work, or did not end."""


@dataclass(frozen=True)
class Contestant:
    """One line of the comparison: a library, and how it is set up.

    Attributes:
        name: Also the name of its section in `rival.toml`; several may share a library.
        library: The name of its folder.
        settings: How it is set up, for the reader.
        durability: What becomes of tasks whose worker is killed, for the reader.
        store: `redis`, `postgres`, or `rabbitmq`, which has a Redis for results beside it.
        left: Commands that count what is still to be done. Redis: `DATABASE: COMMAND`; an answer
            that is a list counts by its first item if that is a number, else by its length.
            RabbitMQ: `queue: REGULAR EXPRESSION`, which counts what waits and what is held.
        results: The command that counts stored results; empty where none are stored.
        counts: How many tasks a drain has, by workload; one that is missing is not run.
        prepare: Whether an empty database wants tables first.
        environment: What its `bench` is told beside the servers.
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
        """Where it is installed."""
        return ENVIRONMENTS / self.library

    @property
    def pins(self) -> Path:
        """The file with its exact versions."""
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
        """Everything that is installed for it."""
        if self.is_ours:
            used = ("aiotaskq", "redis", "hiredis", "asyncpg", "pamqp", "msgspec", "uvloop")
            return " ".join(f"{name}=={metadata.version(name)}" for name in used)
        return " ".join(self.pins.read_text(encoding="utf-8").split())

    def command(self, *words: str) -> list[str]:
        """Return the command that lets its `bench` do something."""
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
        """Install it where its pins have changed; does nothing otherwise.

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
    """Read all of them, ours first."""
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
