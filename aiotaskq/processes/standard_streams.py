"""Standard streams on which no write fails: stdout and stderr of our programs, as users find them.

A terminal or a log collector may have any encoding, be full, or be gone, and whoever starts a
program may have closed its streams. None of this is a reason to stop a worker, or to fail a task
that calls `print`. So `guard_streams`, called first in each program, replaces `sys.stdout` and
`sys.stderr`:

- A character that the encoding lacks is written as an escape, in the form that JSON has as well.
- An error of a write is kept and not raised, and the text is lost. A command whose output is its
  purpose ends with `output_failure`, once its work is done.
- Each line is written when it is complete. A log collector reads from a pipe, for which Python
  would keep lines back until it has 8 KiB of them.
- A standard stream that was closed is opened on the null device. Otherwise the next socket would
  get its number, and be written to by whatever prints.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

_ESCAPE = "aiotaskq-escape"  # the name of our handler of encoding errors
_STRICT = ("strict", "surrogateescape")  # handlers that may raise; others are somebody's choice


def guard_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr`, unless somebody has replaced them before."""
    codecs.register_error(_ESCAPE, _escape)
    _open_closed()
    for name, number in (("stdout", 1), ("stderr", 2)):
        now, original = getattr(sys, name), getattr(sys, f"__{name}__")
        # Not a stream that holds text back to show it somewhere else, as those of test tools.
        if now is original:
            setattr(sys, name, _guarded(number, f"<{name}>", now))


def output_failure() -> OSError | None:
    """Flush `sys.stdout`, and return the error that has ended its output."""
    sys.stdout.flush()
    file = _stdout_file()
    return None if file is None else file.failure


def forgive_output() -> None:
    """Forget that output was lost, in a program that has another purpose."""
    if (file := _stdout_file()) is not None:
        file.failure = None


def _stdout_file() -> _Guarded | None:
    file = getattr(sys.stdout, "buffer", None)
    file = getattr(file, "raw", file)
    return file if isinstance(file, _Guarded) else None


class _Guarded(io.FileIO):
    """The file of a standard stream.

    Attributes:
        failure: The first error of a write; None: all was written.
    """

    failure: OSError | None = None
    name: str

    def write(self, data: Any, /) -> int:
        """Write all of the data, or drop the rest after an error. Never raises."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None:  # somebody has made the pipe non-blocking: it is full
                    select.select([], [self], [])
                else:
                    left = left[written:]
        except OSError as error:  # the next write is tried again: a disk may have room by then
            self.failure = self.failure or error
        return size


def _guarded(number: int, name: str, original: TextIO | None) -> TextIO:
    if original is not None:
        with contextlib.suppress(OSError):  # what a site hook has printed cannot be shown
            original.flush()
    raw = _Guarded(number, "w", closefd=False)
    raw.name = name
    unbuffered = getattr(original, "write_through", False)  # python -u
    errors = getattr(original, "errors", None)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=getattr(original, "encoding", "utf-8"),
        errors=_ESCAPE if errors in (None, *_STRICT) else errors,
        newline="\n",
        line_buffering=True,
        write_through=unbuffered,
    )


def _open_closed() -> None:
    """Open the null device for each standard stream that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # For reading only, so that a write fails as it would on a closed stream. The lowest
            # free number is taken, which is this one.
            os.open(os.devnull, os.O_RDONLY)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    numbers = (units[at : at + 2].hex() for at in range(0, len(units), 2))
    return "".join(f"\\u{number}" for number in numbers), error.end
