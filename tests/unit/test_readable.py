"""Texts that people read: nothing of them is raw, endless, or a line of its own."""

from __future__ import annotations

import ast
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiotaskq
from aiotaskq.contract.message import Message
from aiotaskq.readable import Lines, as_traceback, get_logger, on_lines, on_one_line

PACKAGE = Path(aiotaskq.__file__).parent
HOSTILE = "a\x1b[31mb\nc\rd\x00e\u202ef\x9bg\u2028h\x7fi\ud800j\x85k"
SHOWN = r"a\x1b[31mb\nc\rd\x00e\u202ef\x9bg\u2028h\x7fi\ud800j\x85k"
LONG = "x" * 2**20


def test_a_name_is_shown_on_one_line() -> None:
    assert on_one_line(HOSTILE) == SHOWN
    assert on_one_line("plain, größer, 日本") == "plain, größer, 日本"
    assert on_one_line(LONG) == f"{'x' * 200}… (1,048,576 characters)"
    assert len(on_one_line("\u202e" * 2**20)) < 2000


def test_a_text_that_is_too_long_is_cut_once_at_the_given_length() -> None:
    assert on_one_line(LONG, 4_000) == f"{'x' * 4_000}… (1,048,576 characters)"


def test_several_lines_stay_lines_and_are_bounded() -> None:
    assert on_lines("a\x1b\nb\u202e") == "a\\x1b\nb\\u202e"
    shown = on_lines(f"first\n{LONG}\nlast")
    assert shown.startswith("first\nxxx")
    assert shown.endswith("xxx\nlast")
    assert "(1,048,587 characters)" in shown
    assert len(shown) < 21_000


def test_no_line_of_a_traceback_passes_for_a_line_of_the_log() -> None:
    forged = "[2026-01-01 00:00:00: INFO] forged"
    text = f'Traceback (most recent call last):\n  File "x"\nValueError: boom\n{forged}\n\x1b[2J\n'
    assert as_traceback(text).split("\n") == [
        "Traceback (most recent call last):",
        '  File "x"',
        "  ValueError: boom",
        f"  {forged}",
        "  \\x1b[2J",
    ]


def test_a_message_is_shown_with_bounded_names() -> None:
    assert str(Message(id=HOSTILE, task="t")) == f"t[{SHOWN}]"
    assert len(str(Message(id=LONG, task=LONG))) < 500


# --- logs -----------------------------------------------------------------------------------------


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """The output of a handler with the usual formatter, at a logger of the package."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    root = logging.getLogger("aiotaskq")
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)


LOGGER = get_logger("aiotaskq.test")


class Hostile:
    def __str__(self) -> str:
        return HOSTILE

    __repr__ = __str__


class Failing:
    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


@pytest.mark.parametrize(
    "value", [HOSTILE, Hostile(), ValueError(HOSTILE), type("S", (str,), {})(HOSTILE)]
)
def test_an_argument_of_a_line_is_escaped(written: io.StringIO, value: object) -> None:
    LOGGER.error("about %s", value)
    assert written.getvalue() == f"[ERROR] about {SHOWN}\n"


def test_the_repr_of_an_argument_is_that_of_the_argument(written: io.StringIO) -> None:
    LOGGER.error("%r %r %.3r", "a\n", Hostile(), "abcdef")
    assert written.getvalue() == f"[ERROR] 'a\\n' {SHOWN} 'ab\n"


def test_numbers_stay_numbers_and_objects_that_cannot_be_shown_are_named(
    written: io.StringIO,
) -> None:
    LOGGER.error("%d %.1f %s %s", 7, 1.25, None, Failing())
    assert written.getvalue() == "[ERROR] 7 1.2 None <Failing that cannot be shown: ValueError>\n"
    LOGGER.error("%(a)s", {"a": HOSTILE})
    assert SHOWN in written.getvalue()


def test_a_name_of_a_megabyte_does_not_fill_the_log(written: io.StringIO) -> None:
    try:
        raise ValueError(LONG) from KeyError(LONG)
    except ValueError:
        LOGGER.exception("%s %r %s", LONG, LONG, Message(id=LONG, task=LONG))
    assert len(written.getvalue()) < 40_000
    assert "(1,048,576 characters)" in written.getvalue()


def test_tracebacks_keep_their_newlines_and_nothing_else(written: io.StringIO) -> None:
    try:
        raise ValueError(f"{HOSTILE}\n[ERROR] forged")
    except ValueError:
        LOGGER.exception("failed")
    LOGGER.error("told:\n%s", Lines(f"Traceback (most recent call last):\n{HOSTILE}\n"))
    lines = written.getvalue().split("\n")
    assert [line for line in lines if line.startswith("[")] == ["[ERROR] failed", "[ERROR] told:"]
    assert all(line.isprintable() for line in lines)
    assert lines.count("Traceback (most recent call last):") == 2
    assert any(line.strip().startswith("ValueError: a\\x1b[31mb") for line in lines)


def test_a_message_of_a_foreign_logger_is_escaped_and_keeps_its_lines() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    foreign = get_logger("foreign.test")  # as that of asyncio
    foreign.addHandler(handler)
    try:
        foreign.error("Exception in callback\nhandle: \x1b[2J 100%%s\n[ERROR] forged")
        foreign.error("took %s\x1b", HOSTILE)
        foreign.error(Failing())
    finally:
        foreign.removeHandler(handler)
    assert stream.getvalue().split("\n") == [
        "Exception in callback",
        r"  handle: \x1b[2J 100%%s",
        "  [ERROR] forged",
        f"took {SHOWN}\x1b",  # a text with places for arguments stands in the code
        "<Failing that cannot be shown: ValueError>",
        "",
    ]


def test_all_loggers_of_the_package_escape() -> None:
    """As any handler may get their records, and `logging` has no other place for all of them."""
    raw = {
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger"
    }
    assert raw == {
        "readable.py: logging.getLogger(name)",
        "cli/common.py: logging.getLogger()",  # sets handlers and levels, and writes nothing
        "cli/common.py: logging.getLogger('aiotaskq')",
        "drivers/rabbitmq/transport.py: logging.getLogger('aiormq')",
    }


def test_no_command_prints_but_through_the_output() -> None:
    printing = {"print", "typer.echo", "typer.secho", "typer.confirm", "typer.prompt", "Console"}
    raw = [
        f"{path.name}: {ast.unparse(node)}"
        for path in (PACKAGE / "cli").glob("*.py")
        if path.name != "output.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in printing
    ]
    assert not raw
