"""Shell sessions of documents: they are typed in, and the output is compared.

Lines that begin with ``$`` are commands. Lines that begin with ``>>>`` are input of the Python
shell started before. The others are output. Programs that do not end run until the section ends.

Text that differs between runs is compared by its form: times, the name of the host, process ids and
task ids. An id in the document stands for the same id in the rest of the section. ``...`` stands
for anything.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from tests.examples.running import ID, PATIENCE, Program, run

# Programs that keep running, and commands that may be repeated until the output matches.
_GOING_ON = ("aiotaskq worker", "aiotaskq -A", "uvicorn", "flask --app")
_ASKING = ("curl -s http://127.0.0.1", "redis-cli", "psql")

# Text that differs between runs: its form in a document, and the form in the output.
_FORMS = {
    "anything": (r"\.\.\.", r"(?s:.*?)"),
    "moment": (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", r"\d{4}-\d\d-\d\d [\d:]+,\d{3}"),
    "seconds": (r"\d+\.\d{6}s", r"\d+\.\d+s"),
    "worker": (r"\bmyhost:\d+", r"\S+:\d+"),
    "id": (ID, ID),
}
_VARIABLE = re.compile("|".join(f"(?P<{name}>{shown})" for name, (shown, _) in _FORMS.items()))


class Step(NamedTuple):
    """A command, its input, and its expected output."""

    command: str
    typed: str
    expected: str


def steps(block: str) -> Iterator[Step]:
    """Yield the steps of a session."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, rest = part.partition("\n")
        lines = rest.splitlines(keepends=True)
        typed = "".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))
        expected = "".join(line for line in lines if not line.startswith((">>> ", "... ")))
        yield Step(command, typed, expected)


class Session:
    """The terminals of one section.

    Args:
        folder: The working folder at the beginning of each block.
        env: The environment of all commands.
        elsewhere: Addresses in the document, with the addresses of the test servers.
    """

    def __init__(self, folder: Path, env: Mapping[str, str], elsewhere: Mapping[str, str]) -> None:
        self._folder = folder
        self._env = env
        self._elsewhere = elsewhere
        self._ids: dict[str, str] = {}
        self._going_on: list[tuple[Program, str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._stack.close()

    def type(self, step: Step) -> None:
        """Run one step and compare its output."""
        command = self._here(step.command)
        if command.startswith("cd "):
            self._folder = self._root(shlex.split(command)[1])
        elif command.startswith(_GOING_ON):
            program = Program(command, self._folder, self._env)
            self._stack.callback(program.stop)
            self._going_on.append((program, step.expected))
            self._wait_for_first_lines(program, step.expected)
        else:
            self._run(command, step)

    def finish(self) -> None:
        """Compare the output of the programs that still run, to the last line shown."""
        for program, expected in self._going_on:
            self._bind(program.wait_for(self._pattern(expected)))

    def _root(self, name: str) -> Path:
        return (
            next(top for top in (self._folder, *self._folder.parents) if (top / name).is_dir())
            / name
        )

    def _wait_for_first_lines(self, program: Program, expected: str) -> None:
        """Wait until the program is ready; its lines about tasks come later."""
        kept = [line for line in expected.splitlines(keepends=True) if "] Task " not in line]
        program.wait_for(self._pattern("".join(kept)))

    def _run(self, command: str, step: Step) -> None:
        pattern = self._pattern(step.expected)
        end = time.monotonic() + PATIENCE
        while True:
            done = run(command, self._folder, self._env, stdin=self._here(step.typed))
            assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}"
            found = pattern.fullmatch(_tidy(done.stdout))
            if found is not None:
                self._bind(found)
                return
            if not command.startswith(_ASKING) or time.monotonic() > end:
                raise AssertionError(
                    f"{command} printed\n{done.stdout}\nwhere the document has\n{step.expected}"
                )

    def _here(self, text: str) -> str:
        for theirs, ours in [*self._elsewhere.items(), *self._ids.items()]:
            text = text.replace(theirs, ours)
        return text

    def _pattern(self, expected: str) -> re.Pattern[str]:
        """Return the pattern for an output in the document, with a group for each new id."""
        text, parts, at = _tidy(self._here(expected)), [], 0
        bound = set(self._ids.values())
        named: set[str] = set()
        for found in _VARIABLE.finditer(text):
            parts.append(re.escape(text[at : found.start()]))
            at = found.end()
            kind, name = str(found.lastgroup), f"id_{found[0].replace('-', '_')}"
            if kind != "id":
                parts.append(_FORMS[kind][1])
            elif found[0] in bound:
                parts.append(found[0])
            elif name in named:
                parts.append(f"(?P={name})")
            else:
                named.add(name)
                parts.append(f"(?P<{name}>{ID})")
        return re.compile("".join([*parts, re.escape(text[at:])]))

    def _bind(self, found: re.Match[str]) -> None:
        for name, value in found.groupdict().items():
            self._ids[name.removeprefix("id_").replace("_", "-")] = value


def _tidy(text: str) -> str:
    """Remove spaces at the ends of lines, and empty lines at the end."""
    return "".join(f"{line.rstrip()}\n" for line in text.rstrip("\n").splitlines())
