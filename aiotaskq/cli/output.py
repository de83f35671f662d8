"""Output of the commands. All that they print goes through here, and so none of it is raw.

Names, ids, reasons and errors come from stores, and whoever may send a task chooses them. Lines and
tables are escaped and bounded by `aiotaskq.readable`. JSON is for programs, and stays exact: what
cannot be seen is escaped in the way of JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aiotaskq.encoding.codec import encode_json
from aiotaskq.encoding.forms import UNKNOWN_FORM
from aiotaskq.errors import EncodeError
from aiotaskq.readable import MOST_OF_A_LINE, MOST_OF_A_TEXT, as_traceback, on_one_line, safe_repr

_SEEN = re.compile(r"[ -~\n]+")  # most JSON is all of this


def say(text: str, *, err: bool = False) -> None:
    """Print one line."""
    typer.echo(on_one_line(text, MOST_OF_A_LINE), err=err)


def say_lines(lines: Iterable[str]) -> None:
    """Print several lines."""
    typer.echo("\n".join(on_one_line(line, MOST_OF_A_TEXT) for line in lines))


def say_traceback(text: str) -> None:
    """Print a traceback on stderr."""
    typer.echo(as_traceback(text), err=True)


def say_value(value: Any) -> None:
    """Print a value of a task as JSON, or as its `repr` where JSON has no form for it."""
    typer.echo(json_or_repr(value))


def say_json(value: Any) -> None:
    """Print data for programs. Values of tasks in it are made by `json_data`."""
    try:
        encoded = msgspec.json.encode(value, enc_hook=safe_repr)
    except UnicodeEncodeError:  # lone surrogates, which the standard library escapes
        typer.echo(json.dumps(msgspec.to_builtins(value, enc_hook=safe_repr), indent=2))
    else:
        typer.echo(_readable_json(msgspec.json.format(encoded, indent=2)))


def say_table(table: Table) -> None:
    """Print a table; its cells are made by `cell`."""
    Console().print(table)


def ask(question: str) -> bool:
    """Ask for a yes or a no."""
    return typer.confirm(on_one_line(question, MOST_OF_A_LINE))


def cell(*lines: str) -> Text:
    """Return a cell, or the title, of a table.

    A `Text`, in which brackets are no markup, as they would be in a plain string.
    """
    return Text("\n".join(map(on_one_line, lines)))


def json_data(value: Any) -> Any:
    """Return a value of a task as JSON data; types that JSON has not are tagged, as in a store.

    A value for which there is no tagged form either is its `repr`.
    """
    try:
        return msgspec.json.decode(UNKNOWN_FORM.write(value, json=True))
    except Exception:  # the methods of a user's value may raise anything
        return safe_repr(value)


def json_or_repr(value: Any) -> str:
    """Return a value as JSON, or its `repr` where JSON has no form for it."""
    try:
        return _readable_json(encode_json(value))
    except EncodeError:
        return on_one_line(safe_repr(value), MOST_OF_A_LINE)


def _readable_json(data: bytes) -> str:
    """Return JSON in which characters that cannot be seen are escaped; its value is the same."""
    text = data.decode()
    if _SEEN.fullmatch(text):
        return text
    # Outside of strings there are only characters that can be seen, and the newlines of `indent`.
    return "".join(
        char if char.isprintable() or char == "\n" else _json_escaped(char) for char in text
    )


def _json_escaped(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
