"""Values, times and texts in the form in which the commands print them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from aiotaskq.encoding.codec import encode_json
from aiotaskq.errors import EncodeError


def printable(text: str) -> str:
    """Return a text without control characters, which somebody may have sent to the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def indented(text: str, width: int) -> str:
    """Return a text with all lines but the first indented."""
    return ("\n" + " " * width).join(text.splitlines())


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


def json_or_repr(value: Any) -> str:
    """Return a value as JSON, or its `repr` where JSON has no form for it."""
    try:
        return encode_json(value).decode()
    except EncodeError:
        return repr(value)
