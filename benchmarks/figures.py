"""Figures of the benchmarks: how they are stored and printed.

A figure has the values of all runs. Tables show the median, the smallest and the largest value.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from aiotaskq import __version__


@dataclass(frozen=True)
class Target:
    """The target of a figure.

    Attributes:
        limit: The limit, in the unit of the figure.
        most: Whether the limit is the largest value allowed; if not, it is the smallest.
    """

    limit: float
    most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.limit if self.most else value >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.limit:,g}"


@dataclass(frozen=True)
class Figure:
    """One line of a table.

    Attributes:
        measure: The name of the measurement.
        unit: The unit of the values.
        runs: The values of all runs, in order.
        who: The library that was measured.
        target: The target of the median, if there is one.
        note: A remark for readers.
    """

    measure: str
    unit: str
    runs: Sequence[float]
    who: str = "aiotaskq"
    target: Target | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


@dataclass(frozen=True)
class Report:
    """All figures of one session, with the machine and the versions."""

    figures: list[Figure] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)  # by name: servers, rivals

    def write(self, file: Path) -> None:
        """Write every run as JSON."""
        report = {
            "version": __version__,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": dict(self.versions),
            "figures": [asdict(figure) for figure in self.figures],
        }
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


def machine() -> dict[str, str]:
    """Return the properties of this machine."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def show(
    figures: Sequence[Figure], *, title: str, console: Console | None = None, who: bool = False
) -> None:
    """Print a table with a line for each figure, with its target and whether it was met."""
    columns = _columns(figures, who=who)
    table = Table(title=title)
    for name in columns:
        left = name in ("measure", "who", "note")
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for figure in figures:
        table.add_row(*(cell(figure) for cell in columns.values()))
    (console or Console()).print(table)


def _columns(figures: Sequence[Figure], *, who: bool) -> dict[str, Callable[[Figure], str]]:
    columns: dict[str, Callable[[Figure], str]] = {"measure": lambda one: one.measure}
    if who:
        columns["who"] = lambda one: one.who
    columns["median"] = lambda one: f"{one.median:,.2f}"
    columns["least"] = lambda one: f"{min(one.runs):,.2f}"
    columns["greatest"] = lambda one: f"{max(one.runs):,.2f}"
    columns["unit"] = lambda one: one.unit
    if any(one.target for one in figures):
        columns["target"] = _verdict
    if any(one.note for one in figures):
        columns["note"] = lambda one: one.note
    return columns


def _verdict(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"{figure.target} {'met' if figure.target.met(figure.median) else 'MISSED'}"
