"""How the commands show moments, lengths of time, and what others wrote."""

from __future__ import annotations

from datetime import datetime


def plain(text: str) -> str:
    """Return a text that does nothing to a terminal: who sent it may not be a friend."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def indented(text: str, width: int) -> str:
    """Return a text whose lines after the first begin further to the right."""
    return ("\n" + " " * width).join(text.splitlines())


def moment(at: datetime) -> str:
    """Return a moment by the clock of this machine."""
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S %z}"


def between(first: datetime, second: datetime) -> str:
    """Return how much later the second is, in its largest unit; nothing where it is earlier."""
    seconds = max(0.0, (second - first).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
