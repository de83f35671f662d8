"""Commands of aiotaskq, run to their end without loading Python and the package for each.

One process has loaded both, and forks for each command: a process with a folder, an environment and
streams of its own, in a hundredth of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

# --- in the test run ------------------------------------------------------------------------------


class Shell:
    """The process that forks, and the way to ask it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        assert self._ask("") == "ready"

    def run(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str],
        typed: str | None,
        timeout: float,
        streams: Mapping[str, str],
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it is killed if it takes longer than `timeout` seconds.

        A stream ("in", "out" or "err") may be another file, ``closed``, or a pipe whose reader is
        ``gone``.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "in").write_text(typed or "")
            request = {
                "arguments": arguments,
                "cwd": str(cwd),
                "env": dict(env),
                "folder": name,
                "timeout": timeout,
                "streams": dict(streams),
            }
            with self._lock:
                status = int(self._ask(json.dumps(request)))
            out, err = (
                "" if name in streams else (folder / name).read_text(errors="replace")
                for name in ("out", "err")
            )
        if status == _LATE:
            raise subprocess.TimeoutExpired(arguments, timeout, out, err)
        return subprocess.CompletedProcess(arguments, status, out, err)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._streams_closed()

    def _streams_closed(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


# --- in the process that forks --------------------------------------------------------------------

_LATE = -1000  # no signal has this number


def _serve() -> None:
    import aiotaskq.cli
    import aiotaskq.drivers.redis
    import aiotaskq.drivers.sqlite
    import aiotaskq.worker  # noqa: F401 - modules that commands load and that start nothing

    for line in sys.stdin:
        status = "ready" if line == "\n" else str(_run(json.loads(line)))
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def _run(request: Mapping[str, object]) -> int:
    child = os.fork()
    if child == 0:
        _become(request)
    late = threading.Event()

    def end() -> None:
        late.set()
        os.kill(child, 9)

    watch = threading.Timer(float(str(request["timeout"])), end)
    watch.start()
    _, status = os.waitpid(child, 0)
    watch.cancel()
    watch.join()
    return _LATE if late.is_set() else os.waitstatus_to_exitcode(status)


def _become(request: Mapping[str, object]) -> NoReturn:
    """Be a process that was started with ``python -m aiotaskq``."""
    status: object = 1
    try:
        os.setsid()
        os.chdir(str(request["cwd"]))
        os.environ.clear()
        os.environ.update(request["env"])  # type: ignore[call-overload]  # read from JSON
        time.tzset()
        sys.argv = ["aiotaskq", *request["arguments"]]  # type: ignore[misc]  # read from JSON
        sys.path[0] = str(request["cwd"])
        folder = Path(str(request["folder"]))
        encoding, _, errors = str(os.environ.get("PYTHONIOENCODING", "")).partition(":")
        for stream in (sys.stdout, sys.stderr):
            if encoding and isinstance(stream, TextIOWrapper):
                stream.reconfigure(encoding=encoding, errors=errors or "strict")
        for number, mode in enumerate(("in", "out", "err")):
            _redirect(number, str(request["streams"].get(mode, folder / mode)))  # type: ignore[attr-defined]  # as above
        from aiotaskq.cli import main

        main()
    except SystemExit as ended:
        status = ended.code
    except BaseException as error:  # as Python itself does
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


def _redirect(number: int, target: str) -> None:
    if target == "closed":
        os.close(number)
        setattr(sys, f"__{('stdin', 'stdout', 'stderr')[number]}__", None)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    elif target == "gone":
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(writer)
        os.close(reader)
    else:
        with Path(target).open("w" if number else "r") as file:
            os.dup2(file.fileno(), number)


if __name__ == "__main__":
    _serve()
