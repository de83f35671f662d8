"""Texts that people read: escaped and of bounded length. And loggers all of whose lines are so.

Names, ids, errors and notes come from stores, servers and tasks. Raw they could clear a terminal,
forge the next line of a log, or turn a line around (U+202E). Their data stay exact everywhere; only
what is shown is changed, here. Each character that cannot be seen is shown as Python escapes it,
newlines too. The lines of a traceback stay lines, and are indented, so that none of them passes for
another line of the log.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any, Final

MOST_OF_A_NAME: Final = 200
"""Characters of a name or an id that are shown: as long as they may be when they are sent."""

MOST_OF_A_LINE: Final = 4_000
"""Characters of any other text on one line."""

MOST_OF_A_TEXT: Final = 20_000
"""Characters of a text with several lines, such as a traceback."""

_HEADINGS = frozenset(
    {
        "Traceback (most recent call last):",
        "During handling of the above exception, another exception occurred:",
        "The above exception was the direct cause of the following exception:",
    }
)


class Lines(str):
    """An argument of a log line that is a traceback or a stack; it begins on a line of its own."""

    __slots__ = ()


def on_one_line(text: str, most: int = MOST_OF_A_NAME) -> str:
    """Return a text without newlines and without characters that cannot be seen.

    Args:
        text: A name, or any other text.
        most: Characters of it that are shown. Behind them stands how long it is.
    """
    if len(text) > most:
        return f"{on_one_line(text[:most], most)}… ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def on_lines(text: str, *, indent: str = "", most: int = MOST_OF_A_TEXT) -> str:
    """Return a text with its newlines, and without other characters that cannot be seen.

    The middle of a text that is too long is left out, as a traceback begins with the call, and ends
    with the error.

    Args:
        text: A text with several lines.
        indent: The beginning of each line.
        most: Characters of it that are shown.
    """
    if len(text) > most:
        tail = most * 3 // 4
        text = f"{text[: most - tail]}\n… ({len(text):,} characters)\n{text[-tail:]}"
    lines = (on_one_line(line, most) for line in text.split("\n"))
    return "\n".join(f"{indent}{line}" for line in lines)


def as_traceback(text: str) -> str:
    """Return a traceback with its lines; those that begin with something of an error are indented.

    Only Python's own headings stay at the left, where the lines of a log begin.
    """
    lines = on_lines(text.rstrip()).split("\n")
    return "\n".join(
        line if not line or line[0] == " " or line in _HEADINGS else f"  {line}" for line in lines
    )


def get_logger(name: str) -> logging.Logger:
    """Return a logger of the package, all of whose lines are escaped and bounded."""
    logger = logging.getLogger(name)
    if _escaping not in logger.filters:
        logger.addFilter(_escaping)
    return logger


def safe_repr(value: object) -> str:
    """Return the `repr` of a value, or its type where that raises."""
    return _text_of(repr, value)


def _escaped(char: str) -> str:
    return repr(char)[1:-1]


class _ShownText(str):
    """An argument of a log line as it is shown; its `repr` is that of the argument."""

    _given: object

    def __repr__(self) -> str:
        return on_one_line(_text_of(repr, self._given), MOST_OF_A_LINE)


def _text_of(describe: Any, value: object) -> str:
    try:
        return str(describe(value))
    except Exception as error:  # that of a user's object must not fail the log
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def _shown(value: object) -> object:
    """Return an argument of a log line in the form in which it is safe to write."""
    kind = type(value)
    if kind is str:
        if len(value) <= MOST_OF_A_LINE and value.isprintable():  # type: ignore[arg-type,attr-defined]  # a str
            return value
    elif isinstance(value, int | float) or value is None:
        return value
    elif isinstance(value, Lines):
        return as_traceback(value)
    shown = _ShownText(on_one_line(_text_of(str, value), MOST_OF_A_LINE))
    shown._given = value
    return shown


def _shown_message(message: object) -> str:
    """Return the message of a foreign logger, with its lines; all but the first are indented."""
    first, *others = on_lines(_text_of(str, message)).split("\n")
    return "\n".join([first, *(f"  {line}" for line in others)])


class _Escaping(logging.Filter):
    """Changes records before any handler gets them, whosever the handler is."""

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if not args and record.name.partition(".")[0] != "aiotaskq":
            # Others, such as asyncio, put the texts of tasks into the message itself.
            record.msg = _shown_message(record.msg)
        elif isinstance(args, Mapping):
            record.args = {name: _shown(value) for name, value in args.items()}
        elif args:
            record.args = tuple(map(_shown, args))
        if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
            # Formatters take this text instead of making one.
            text = "".join(traceback.format_exception(record.exc_info[1]))
            record.exc_text = as_traceback(text)
        return True


_escaping = _Escaping()
