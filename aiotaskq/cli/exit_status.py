"""Exit statuses of the commands, as their help texts tell them.

0 is success. A mistake in a command or in the set-up is `SETUP_ERROR` for all commands.
"""

from __future__ import annotations

from aiotaskq.processes.pipe import SETUP_ERROR as SETUP_ERROR

NOT_DONE = 1
"""Something that the command was to act on does not exist, or the user answered no."""

TASK_FAILED = 1
"""The task whose result was wanted has failed."""

NO_RESULT = 3
"""The task whose result was wanted has not ended, or not in time."""

STOPPED = 130
"""Ctrl-C, or the end of the input where an answer was wanted."""

OUTPUT_LOST = 74  # EX_IOERR
"""The command did its work, and its output could not be written, as to a full disk."""
