"""The process that watches files, for `aiotaskq worker --reload`, and the supervisor's side of it.

Theory of operation. Watching needs threads, and the supervisor forks, so it must have none: the
watching is done by another process. That one is spawned, not forked, so that the supervisor does
not load the library that watches. It writes to a pipe, and only the number of messages
matters:

1. Once when it watches. `FileWatcher` waits for that, so that a change from then on is seen.
2. At each change. Changes that come before the supervisor looks are one change.

The process ignores the signals that stop a worker, such as Ctrl-C in a terminal, and ends when it
is killed (`FileWatcher.stop`) or its parent has died. If it dies itself, nothing is reloaded any
more; the worker goes on, and the log says so.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from aiotaskq.errors import ConfigError
from aiotaskq.forks import keep_private
from aiotaskq.processes.operating_system import start_process
from aiotaskq.processes.parent import is_parent, parent_pid
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.supervisor")

_PARENT_LOOK_INTERVAL = 200  # milliseconds


class FileWatcher:
    """The supervisor's side: starts the process and hears of changed files.

    Attributes:
        pipe: Readable when something changed.

    Raises:
        ConfigError: The library that watches files is missing, or the folder cannot be watched.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("watchfiles") is None:
            raise ConfigError(
                "--reload needs the library 'watchfiles': pip install 'aiotaskq[reload]'"
            )
        self.pipe, childs_end = multiprocessing.Pipe(duplex=False)
        keep_private(self.pipe.fileno())
        self._process = start_process(
            _watch_files,
            (childs_end,),
            name="aiotaskq-reload",
            ignore_stop_signals=True,  # Ctrl-C is for the supervisor, which ends the process
            daemon=True,
            spawn=True,
        )
        childs_end.close()
        try:
            self.pipe.recv_bytes()
        except EOFError:
            self.stop()
            raise ConfigError(f"--reload cannot watch the files in {Path.cwd()}") from None

    def changed(self) -> bool:
        """Return whether a file has changed since the last call."""
        changed = False
        while not self.pipe.closed and self.pipe.poll():
            try:
                self.pipe.recv_bytes()
                changed = True
            except EOFError:
                logger.error(
                    "the process that watches files ended: changes are not seen any more until the"
                    " worker is restarted"
                )
                self.pipe.close()
        return changed

    def stop(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGKILL)
        self._process.collect()
        self.pipe.close()


def _watch_files(pipe: Connection) -> None:
    """Be the process: tell of changed Python files below the working folder."""
    from watchfiles import PythonFilter, watch

    parent = parent_pid()
    begun = False
    for changes in watch(
        ".", watch_filter=PythonFilter(), rust_timeout=_PARENT_LOOK_INTERVAL, yield_on_timeout=True
    ):
        if not is_parent(parent):
            return
        if changes or not begun:
            pipe.send_bytes(b"changed" if begun else b"begun")
        begun = True
