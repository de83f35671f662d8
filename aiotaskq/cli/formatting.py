"""Values, times and texts in the form in which the commands print them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime

from aiotaskq.readable import on_lines


def fact_lines(facts: Mapping[str, str | None]) -> Iterator[str]:
    """Yield facts as lines, each with its name; those without a value are left out."""
    for name, value in facts.items():
        if value:
            first, *others = on_lines(value.rstrip()).split("\n")
            yield f"  {name:<10} {first}"
            yield from (f"{'':<13}{line}" for line in others)


def local_time(at: datetime) -> str:
    """Return a time in the time zone of this machine."""
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S %z}"


def duration(first: datetime, second: datetime) -> str:
    """Return the time between two moments in its largest unit; 0 s if the second is earlier."""
    seconds = max(0.0, (second - first).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def task_count(count: int) -> str:
    """Return a number of tasks, such as "1 task"."""
    return "1 task" if count == 1 else f"{count:,} tasks"
